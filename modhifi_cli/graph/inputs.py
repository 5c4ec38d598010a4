"""Whether a network takes an image batch and always goes the same way through its modules, in one sentence if not.

Groups, cuts and costs are read from single forwards, so a forward that decides on the values of its tensors would be
understood for some images only. Such decisions are found by running the network on several inputs under a mode that
follows what was computed from the images and notes every Python value that is taken out of it.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modhifi_cli.errors import UnsupportedModelError, first_line
from modhifi_cli.graph.answers import tensors_of

_TORCH = str(Path(torch.__file__).parent)
# What forwards raise on images that they were not made for; timm asserts sizes.
FORWARD_ERRORS = (
    RuntimeError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError,
)  # fmt: skip
# What torch says where maps have become smaller than a kernel, a window or one pixel.
_TOO_SMALL = ("kernel size can't be greater", "output size is too small", "calculated padded input size")
_MISFIT = (
    "doesn't match model",
    "to have",
    "shapes cannot be multiplied",
    "size mismatch",
    "must match",
    "is invalid for input of size",
)


def check_images(model: nn.Module, example: Tensor) -> Tensor:
    """Run a network on images and on others of the same shape, and refuse what cannot be traced.

    Args:
        model: Network in evaluation mode; left as found.
        example: Two images or more, ``[batch, channels, height, width]``.

    Returns:
        Its logits of `example`, ``[batch, classes]``.

    Raises:
        UnsupportedModelError: If the forward needs other inputs than an image batch, fails on it (because the images
            are too small, say), gives anything else than logits, or decides on the values of its tensors.
    """
    if more := _other_inputs(model):
        raise UnsupportedModelError(
            f"{type(model).__name__}.forward needs other inputs than an image batch ({', '.join(more)}); an adapter is "
            "missing: let the factory return a module whose forward takes the images alone and fills in the others."
        )
    other = torch.randn(example.shape, generator=torch.Generator().manual_seed(1)).to(example)
    first: tuple[list[str], list[tuple[str, Any]]] | None = None
    logits = example
    for number, images in enumerate((example, -example, 3 * other, torch.zeros_like(example))):
        try:
            answer, path = _followed(model, images)
        except FORWARD_ERRORS as error:
            raise not_taken(model, tuple(example.shape), error) from error
        if number == 0:
            logits, first = _logits_of(model, answer, example), path
        assert first is not None
        if reason := _difference(first, path):
            raise UnsupportedModelError(
                f"the forward of {type(model).__name__} is dynamic: {reason}; it cannot be traced, so write it as the "
                "same tensor operations for every image."
            )
    return logits


def refuse_finished(model: nn.Module) -> None:
    """Refuse a network that was prepared for use and holds no weights that can be cut.

    Raises:
        UnsupportedModelError: If it is TorchScript, or quantised.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("model: modules of TorchScript cannot be cut; give the module that it was made of.")
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise UnsupportedModelError(
                f"model: {name or 'it'} is quantised ({type(module).__name__}) and cannot be cut; prune the network that it was "
                "made of, and quantise the new one."
            )


def not_taken(model: nn.Module, shape: Sequence[int], error: Exception) -> UnsupportedModelError:
    """The one sentence for a forward that failed on images of a shape ``[batch, channels, height, width]``."""
    text = first_line(error).rstrip(".")
    said = f"the network {type(model).__name__} does not take an image batch of shape {tuple(shape)}: {text}"
    lower = text.lower()
    if any(words in lower for words in _TOO_SMALL):
        size = "×".join(str(edge) for edge in shape[-2:])
        return UnsupportedModelError(
            f"{said}; images of {size} pixels are smaller than the network allows, set a larger "
            "model.preprocess.size."
        )
    if isinstance(error, RuntimeError | AssertionError) and any(words in lower for words in _MISFIT):
        return UnsupportedModelError(
            f"{said}; give the size and the channels that it was made for (model.preprocess.size, and one number of "
            "model.preprocess.mean for each channel)."
        )
    return UnsupportedModelError(f"{said}.")


def _other_inputs(model: nn.Module) -> list[str]:
    """Parameters of the forward that have to be given beside the first."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):  # compiled or scripted: the forward itself will say
        return []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional[1:] if p.default is p.empty]
    needed += [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    return [p.name for p in needed]


def _logits_of(model: nn.Module, answer: object, example: Tensor) -> Tensor:
    fits = isinstance(answer, Tensor) and answer.dim() == 2 and answer.shape[0] == example.shape[0]
    if not fits:
        told = f"a tensor {list(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
        raise UnsupportedModelError(
            f"{type(model).__name__} gives {told} for {example.shape[0]} images, expected logits [images, classes]; an "
            "adapter is missing: let the factory return a module whose forward gives the logits alone."
        )
    return answer


def _followed(model: nn.Module, images: Tensor) -> tuple[object, tuple[list[str], list[tuple[str, Any]]]]:
    """The answer, the modules in the order in which they were entered, and the values that were taken out of tensors."""
    entered: list[str] = []
    handles = [
        module.register_forward_pre_hook(_note(entered, name)) for name, module in model.named_modules() if name
    ]
    try:
        with torch.no_grad(), _Decisions(images) as decisions:
            answer = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return answer, (entered, decisions.taken)


def _note(entered: list[str], name: str) -> Callable:
    def hook(module: nn.Module, inputs: tuple) -> None:
        entered.append(name)

    return hook


def _difference(first: tuple[list[str], list], other: tuple[list[str], list]) -> str | None:
    for (place, value), (there, again) in zip(first[1], other[1], strict=False):
        if place != there or value != again:
            return f"it takes the value of a tensor that depends on the image at {place}"
    if first[0] != other[0]:
        pairs = zip([*first[0], None], [*other[0], None], strict=False)
        name = next(mine or theirs for mine, theirs in pairs if mine != theirs)
        return f"module '{name}' runs for some images only"
    return None


class _Decisions(TorchFunctionMode):
    """Follows every tensor that was computed from the images, and notes plain Python values that come out of them."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._from_images = {id(images): images}  # holds them, so that an id is never given to another tensor
        self.taken: list[tuple[str, Any]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if any(id(tensor) in self._from_images for tensor in tensors_of((args, kwargs))):
            if isinstance(result, bool | int | float):
                self.taken.append((_caller(), result if result == result else "nan"))
            for tensor in tensors_of(result):
                self._from_images[id(tensor)] = tensor
        return result


def _caller() -> str:
    """File and line of the code outside torch that is at work."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"
