"""Errors a user can cause, each one clear sentence: the place, what was expected, what came, what to do.

The command line turns every `ModHiFiError` into that sentence on standard error and exit code 2, without a traceback.
Anything else that is raised is a defect of ours and keeps its traceback.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeGuard


class ModHiFiError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(ModHiFiError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class DataError(ModHiFiError):
    """A file, folder, array, image or saved run is missing, damaged or does not fit."""


class UnsupportedModelError(ModHiFiError):
    """The network holds something that cannot be edited correctly, so it is refused."""


class NotRunnableError(UnsupportedModelError):
    """The library's own network does not run as it is, so that nothing can be said of it."""


class NumericsError(ModHiFiError):
    """A number is not finite, or a system of equations cannot be solved as asked."""


class EndedElsewhere(ModHiFiError):
    """Another process of the same run has met an error and said so; this one ends with it, and says nothing."""


class IllPosedError(NumericsError):
    """The calibration data say nothing of one layer, so that its components cannot be told apart; others may be fine."""


# Import name of a package that is not installed with the core → the extra of pyproject.toml that brings it.
EXTRAS: Mapping[str, str] = {
    "accelerate": "language",
    "datasets": "language",
    "gguf": "language",
    "lm_eval": "language",
    "onnx": "onnx",
    "onnxruntime": "onnx",
    "onnxscript": "onnx",
    "openvino": "openvino",
    "hydra_plugins.hydra_joblib_launcher": "launchers",
    "hydra_plugins.hydra_submitit_launcher": "launchers",
    "hydra_plugins.hydra_optuna_sweeper": "search",
    "tensorboard": "tracker",
    "torch_pruning": "rivals",
}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a card or the processor's allocator had no memory left; torch need not be loaded to ask."""
    return any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def package_missing(what: str, package: str) -> ConfigError:
    """The error for a package that is installed on request only, with the words that install it.

    Args:
        what: What the user asked for, as it is typed: ``"export=[onnx]"``.
        package: Import name of the package, one of `EXTRAS`.
    """
    extra = EXTRAS[package]
    return ConfigError(
        f"{what} needs the package {package.rpartition('.')[2]}, which is not installed; install the extra [{extra}]: "
        f"pip install 'modhifi[{extra}]', or pip install -e '.[{extra}]' in a checkout."
    )


def need_packages(what: str, *packages: str) -> None:
    """Refuse a feature whose packages are not all installed, before any work is done; nothing is imported.

    Args:
        what: What the user asked for, as it is typed: ``"export=[onnx]"``.
        packages: Import names, of `EXTRAS`.

    Raises:
        ConfigError: For the first package that is missing.
    """
    for package in packages:
        try:
            found = importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):  # the package around it is missing, or it is half imported
            found = False
        if not found:
            raise package_missing(what, package)


def first_line(error: BaseException, silent: str | None = None) -> str:
    """The first line of what an error says; `silent`, or its type, where it says nothing."""
    return (str(error).strip().splitlines() or [silent or type(error).__name__])[0]


def reason(error: BaseException) -> str:
    """What an error says, short and without its full stop, for a sentence that goes on behind it."""
    return first_line(error, "no message").rstrip(".")[:200]


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a setting is a whole number; true and false, which Python counts as numbers, are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def whole_numbers(value: object) -> list[int] | None:
    """A setting that is one whole number or a list of such, as a list; None where it is anything else."""
    found = [value] if is_whole(value) else value
    if not isinstance(found, Sequence) or isinstance(found, str) or not all(map(is_whole, found)):
        return None
    return list(found)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a setting is a number, whole or not; true and false are none, NaN and infinity are."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def need_whole(place: str, value: object, least: int, meaning: str = "") -> None:
    """Refuse a setting that is no whole number from `least`, whose meaning may be told: `` (off)``.

    Raises:
        ConfigError: With the place, what it must be and what came.
    """
    if not is_whole(value) or value < least:
        raise ConfigError(f"{place} must be a whole number from {least}{meaning}; got {value!r}.")


def nearest(name: object, known: Iterable[str], *, limit: int = 3) -> str:
    """A hint for an unknown name: ``"did you mean 'a' or 'b'?"``, or the known names when nothing is near.

    Args:
        name: What the user wrote; anything that YAML can be.
        known: The names that exist.
        limit: How many near names to offer at most.
    """
    known = sorted(set(known))
    close = difflib.get_close_matches(str(name), known, n=limit, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(f"'{candidate}'" for candidate in close) + "?"
    shown = ", ".join(known[:20]) + (f", … ({len(known)} in all)" if len(known) > 20 else "")
    return f"known: {shown}."
