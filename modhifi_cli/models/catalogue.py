"""Which networks the libraries offer: names by library and kind, and one small network for each file of timm."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.records import Progress

LIBRARIES = ("torchvision", "timm", "transformers")


def kinds(library: str) -> dict[str, str]:
    """Every network of a library: name → what it does, or for timm the module file that holds it.

    Raises:
        ConfigError: If there is no such library.
    """
    if library == "torchvision":
        from modhifi_cli.models.torchvision import names

        return {name: kind for kind, found in names().items() for name in found}
    if library == "timm":
        import timm

        return {name: file for file in timm.list_modules() for name in timm.list_models(module=file)}
    if library == "transformers":
        from modhifi_cli.models.transformers import names as families

        return families()
    raise ConfigError(f"library: there is no library '{library}' here, {nearest(library, LIBRARIES)}")


def matching(library: str, patterns: Sequence[str]) -> dict[str, str]:
    """The networks of a library whose names match one of the patterns (``*`` and ``?`` as in a shell), as `kinds`.

    Raises:
        ConfigError: If a pattern matches none; the message names what is nearest.
    """
    known = kinds(library)
    found: dict[str, str] = {}
    for pattern in patterns:
        mine = [name for name in known if fnmatchcase(name, pattern)]
        if not mine:
            bare = pattern.translate(str.maketrans("", "", "*?[]"))
            raise ConfigError(f"pattern: {library} has no network that matches '{pattern}', {nearest(bare, known)}")
        found |= {name: known[name] for name in mine}
    return dict(sorted(found.items()))


def smallest_of_each_file(known: dict[str, str], smallest: dict[str, str]) -> Iterator[Progress]:
    """Find the network with the fewest parameters in each module file of timm, without making any weights.

    Args:
        known: Network name → module file.
        smallest: Filled: module file → name. A file none of whose networks can be made stands with its first name.
    """
    import timm
    import torch

    files: dict[str, list[str]] = {}
    for name, file in known.items():
        files.setdefault(file, []).append(name)
    for number, (file, names) in enumerate(sorted(files.items())):
        yield Progress("families", file, number, len(files))
        sizes = {}
        whole = [name for name in names if not name.startswith("test_")] or names  # tiny ones that only test timm
        for name in whole if len(whole) > 1 else ():
            try:
                with torch.device("meta"), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
            # A network that cannot be made here will say why when it is examined itself.
            except Exception:
                continue
        smallest[file] = min(sizes, key=lambda name: sizes[name]) if sizes else whole[0]
    yield Progress("families", "done", len(files), len(files))
