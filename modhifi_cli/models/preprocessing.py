"""A model's own preprocessing with single values replaced by the user's, for weights trained another way."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from modhifi_cli.errors import ConfigError, is_whole, nearest
from modhifi_cli.records import Preprocess

# ImageNet's channel statistics, on the 0..1 scale, as every library here uses them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def adjusted(preprocess: Preprocess, settings: Mapping[str, Any] | None) -> Preprocess:
    """The preprocessing with some of its fields replaced.

    Args:
        preprocess: What the maker of the model says.
        settings: Fields of `Preprocess` to replace, or None. `size` may be one number, `resize` may be None.

    Raises:
        ConfigError: If a field is unknown or its value is out of range.
    """
    if not settings:
        return preprocess
    known = [field.name for field in dataclasses.fields(Preprocess)]
    for key in settings:
        if key not in known:
            raise ConfigError(f"model.preprocess: unknown field '{key}', {nearest(str(key), known)}")
    values = dict(settings)
    if "size" in values:
        values["size"] = _size(values["size"])
    if values.get("resize") is not None:
        values["resize"] = _whole("resize", values["resize"])
    channels = len(values.get("mean", preprocess.mean))
    for key in ("mean", "std"):
        if key in values:
            values[key] = _numbers(key, values[key], channels, positive=key == "std")
    if len(values.get("std", preprocess.std)) != channels:
        raise ConfigError("model.preprocess: mean and std must have one number per channel each; set both.")
    if values.get("interpolation", "bilinear") not in _INTERPOLATIONS:
        raise ConfigError(
            f"model.preprocess.interpolation: expected one of {', '.join(_INTERPOLATIONS)}, "
            f"got {values['interpolation']!r}."
        )
    return dataclasses.replace(preprocess, **values)


def _size(value: Any) -> tuple[int, int]:
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(pair) != 2:
        raise ConfigError(f"model.preprocess.size: expected one number or [height, width] in pixels, got {value!r}.")
    return _whole("size", pair[0]), _whole("size", pair[1])


def _whole(key: str, value: Any) -> int:
    if not is_whole(value) or value < 1:
        raise ConfigError(f"model.preprocess.{key}: expected pixels, a whole number above 0, got {value!r}.")
    return value


def _numbers(key: str, value: Any, channels: int, *, positive: bool) -> tuple[float, ...]:
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    fits = len(numbers) == channels and all(isinstance(number, (int, float)) for number in numbers)
    if not fits or (positive and min(numbers) <= 0):
        raise ConfigError(
            f"model.preprocess.{key}: expected {channels} {'positive ' if positive else ''}numbers on the 0..1 scale, "
            f"one per channel, got {value!r}."
        )
    return tuple(float(number) for number in numbers)


def named_classes(names: Sequence[str] | None, logits: int | None) -> tuple[str, ...] | None:
    """The user's class names, one for each logit, or None.

    Raises:
        ConfigError: If there are not as many as logits, or two are the same.
    """
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise ConfigError(f"model.classes: expected a list of names in the order of the logits, got {names!r}.")
    found = tuple(str(name) for name in names)
    if logits is not None and len(found) != logits:
        raise ConfigError(f"model.classes: expected {logits} names, one for each logit, got {len(found)}.")
    if len(set(found)) < len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise ConfigError(f"model.classes: {twice} stands there twice; give every logit its own name.")
    return found
