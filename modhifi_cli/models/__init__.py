"""Where networks come from: one file per source or family, each with `load` (a `LoadedModel`) and `build` (untrained).

Nothing heavy is imported here; libraries are imported inside the functions that use them.
"""

import importlib
import inspect
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modhifi_cli.errors import ConfigError, DataError, is_number

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "modhifi_cli.models."
# What constructors of torchvision, timm and transformers take that leads out of the folder.
_REACHING = re.compile(
    r"pretrained|checkpoint(_|$)|^weights|auto_map|remote|quantization|adapter|kernels|_implementation|base_model|^file"
    r"|_file$|_dir$|^path|_path$|url|repo|hub|pipelines"
)
_ELSEWHERE = re.compile(r"[/\\]|^~|^[A-Za-z_-]+:")  # a path, or timm's hf-hub:NAME and local-dir:FOLDER
_SIZES = re.compile(r"size|dim|num|width|depth|channels|layers|heads|ffn|inner|n_|classes|planes|\]$")
_FREE_TEXT = ("id2label", "label2id")
_LARGEST, _DEEPEST = 2**24, 12


def build_architecture(
    architecture: Mapping[str, Any], *, allow: str | bool = False, largest: int = _LARGEST
) -> "nn.Module":
    """The network that an architecture description stands for, dense, with untrained weights, in evaluation mode.

    The description comes from a file, so only the functions `build` of the files of `modhifi_cli.models` are ever
    called, and only with arguments that neither fetch nor open anything (`_refuse_reaching`).

    Args:
        architecture: ``{"builder": "modhifi_cli.models.X.build", "kwargs": {...}}``; other keys are not looked at.
        allow: The user's own code that the description may name (``package.module:function``), from whoever calls;
            True for whatever it names.
        largest: The largest size that its arguments may ask for, where the saved weights tell.

    Raises:
        DataError: If the description names no builder of this package, or one that refuses its arguments, or code that
            was not allowed.
    """
    builder = architecture.get("builder") if isinstance(architecture, Mapping) else None
    kwargs = architecture.get("kwargs", {}) if isinstance(architecture, Mapping) else {}
    named = isinstance(builder, str) and re.fullmatch(re.escape(_PREFIX) + r"[a-z]\w*\.build", builder) is not None
    if not named or not isinstance(kwargs, Mapping):
        raise DataError(
            f"architecture description: expected a builder under {_PREFIX}* with kwargs, got {builder!r}; "
            "the file is damaged or was not written by modhifi, save the model again."
        )
    module_name, _, function_name = builder.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"architecture description: builder {builder} does not exist in this version of modhifi ({error}); "
            "install the version that wrote the file."
        ) from error
    if getattr(function, "__module__", None) != module_name:
        raise DataError(f"architecture description: {builder} is no builder of this package; save the model again.")
    own = {"allow": allow} if "allow" in inspect.signature(function).parameters else {}
    if "allow" in kwargs:
        raise DataError("architecture description: a folder cannot allow code; the file was not written by modhifi.")
    if not own:
        _refuse_reaching(kwargs, largest=largest)
    try:
        model = function(**kwargs, **own)
    except (TypeError, ValueError, ConfigError, RuntimeError, ArithmeticError, AttributeError, LookupError) as error:
        told = " ".join(str(error).split())[:200]
        raise DataError(
            f"architecture description: {builder} does not take {_short(kwargs)} ({type(error).__name__}: {told}); "
            "the file is damaged or was written by another version of modhifi."
        ) from error
    return model.eval()


def _refuse_reaching(value: Any, key: str = "kwargs", depth: int = 0, *, largest: int) -> None:
    """Refuse arguments by which a library fetches, opens or runs something, and sizes that no network has.

    Raises:
        DataError: About the first.
    """
    if depth > _DEEPEST:
        raise DataError("architecture description: nested too deep; the file was not written by modhifi.")
    if isinstance(value, Mapping):
        for name, one in value.items():
            if one not in (None, False) and _REACHING.search(str(name)) and not _is_size(str(name), one):
                raise DataError(
                    f"architecture description: {key}.{name} would fetch, open or run something, which a folder may not "
                    "ask for; remove it if you know it, and save the model again."
                )
            if name not in _FREE_TEXT:
                _refuse_reaching(one, f"{key}.{name}", depth + 1, largest=largest)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            _refuse_reaching(one, f"{key}[{number}]", depth + 1, largest=largest)
    elif isinstance(value, str) and _ELSEWHERE.search(value):
        raise DataError(
            f"architecture description: {key}={value[:80]!r} names a place outside the folder, which a folder may not; "
            "the file was not written by modhifi."
        )
    elif isinstance(value, int) and _SIZES.search(key.rpartition(".")[2]) and abs(value) > largest:
        raise DataError(
            f"architecture description: {key}={value} is larger than its weights can be; the file is damaged, restore it."
        )


def _is_size(name: str, value: Any) -> bool:
    """Whether this is a number by the name of a size, or several: sizes of windows open nothing, and a 1 may be a yes."""
    several = value if isinstance(value, list | tuple) else [value]
    return bool(_SIZES.search(name)) and all(is_number(one) for one in several)


def _short(value: Any) -> str:
    text = str(dict(value))
    return text if len(text) <= 200 else f"{text[:199]}…"
