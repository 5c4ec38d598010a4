"""Errors a user can cause, each one clear sentence: the place, what was expected, what came, what to do.

The command line turns every `ModHiFiError` into that sentence on standard error and exit code 2, without a traceback.
Anything else that is raised is a defect of ours and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class ModHiFiError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(ModHiFiError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class DataError(ModHiFiError):
    """A file, folder, array, image or saved run is missing, damaged or does not fit."""


class UnsupportedModelError(ModHiFiError):
    """The network holds something that cannot be edited correctly, so it is refused."""


class NumericsError(ModHiFiError):
    """A number is not finite, or a system of equations cannot be solved as asked."""


def package_missing(what: str, package: str) -> ConfigError:
    """The error for a package that is installed on request only, with the words that install it."""
    return ConfigError(
        f"{what} needs the package {package}, which is not installed; in the project's folder: "
        "pip install -e '.[language]'."
    )


def is_whole(value: object) -> bool:
    """Whether a setting is a whole number; true and false, which Python counts as numbers, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a setting is a number, whole or not; true and false are none, NaN and infinity are."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def nearest(name: str, known: Iterable[str], *, limit: int = 3) -> str:
    """A hint for an unknown name: ``"did you mean 'a' or 'b'?"``, or the known names when nothing is near.

    Args:
        name: What the user wrote.
        known: The names that exist.
        limit: How many near names to offer at most.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{candidate}'" for candidate in close) + "?"
    shown = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
    return f"known: {shown}."
