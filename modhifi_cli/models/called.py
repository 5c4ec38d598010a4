"""A network that takes or gives anything, as one that takes one tensor and gives one: what pruning looks at.

Batches may be tensors, lists, tuples or dictionaries of tensors; several of them travel packed in one tensor
``[batch, numbers]`` and are unpacked right before the network is called, by its own forward or by a function of the
user's, ``function(network, batch)``. Whatever comes out is laid side by side in one tensor ``[batch, numbers]``. The
network itself stays what it is: it is edited inside, and given back by itself.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.graph.answers import tensors_of

INSIDE = "network."  # what names of modules begin with in the wrapper
# Where data sets keep what the network reads, and what is true of it.
_INPUTS = ("pixel_values", "images", "image", "inputs", "input_values", "input_features", "input", "x", "data", "img")
_LABELS = ("labels", "label", "targets", "target", "y", "class")


@dataclass(frozen=True)
class Leaf:
    """One tensor of a batch.

    Attributes:
        shape: Without the batch.
        dtype: Its type.
        limit: For whole numbers, one above the largest seen.
        constant: The one value that all whole numbers have (a mask of ones): it is no input, and does not travel.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    limit: int = 0
    constant: int | None = None


class Form:
    """How a batch's tensors lie in one tensor ``[batch, numbers]``.

    Args:
        batch: One batch; what is no tensor in it is left out (None stands there).

    Raises:
        DataError: If it holds no tensor, or tensors of different lengths.
    """

    def __init__(self, batch: Any) -> None:
        found = list(tensors_of(batch))
        lengths = {len(tensor) for tensor in found if tensor.dim()}
        if len(lengths) != 1 or any(not tensor.dim() for tensor in found):
            raise DataError(
                f"batches: expected tensors with one entry for each sample, got {len(found)} tensors of lengths "
                f"{sorted(lengths)}; give model and batch to a function of your own (forward=)."
            )
        self._tree = _shaped(batch)

    @property
    def alone(self) -> bool:
        """Whether there is one floating tensor and nothing else: then it travels as it is."""
        return isinstance(self._tree, Leaf) and self._tree.dtype.is_floating_point

    def pack(self, batch: Any) -> Tensor:
        """``[batch, numbers]`` float32 (float64 where something is), or the tensor itself where it is alone.

        Raises:
            DataError: If the batch has another form than the first one.
        """
        if self.alone and isinstance(batch, Tensor):
            return batch
        parts = _leaves(self._tree, batch)
        for leaf, tensor in parts:
            if not isinstance(tensor, Tensor) or tensor.shape[1:] != leaf.shape:
                told = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise DataError(
                    f"batches: expected a tensor [batch, {', '.join(map(str, leaf.shape))}] as in the first batch, got "
                    f"{told}; give all batches one shape."
                )
            if leaf.constant is not None and bool((tensor != leaf.constant).any()):
                raise DataError(
                    f"batches: a tensor [batch, {', '.join(map(str, leaf.shape))}] holds nothing but {leaf.constant} in the "
                    "first batch and other values later; put batches with different values (padding) first."
                )
        wide = torch.float64 if any(leaf.dtype == torch.float64 for leaf, _ in parts) else torch.float32
        moving = [tensor for leaf, tensor in parts if leaf.constant is None]
        return torch.cat([tensor.reshape(len(tensor), -1).to(wide) for tensor in moving], 1)

    @property
    def highest(self) -> int:
        """The highest whole number that travels, 0 where none does."""
        leaves = (leaf for leaf, _ in _leaves(self._tree, self._tree))
        return max((leaf.limit - 1 for leaf in leaves if leaf.limit and leaf.constant is None), default=0)

    def shaped(self, packed: Tensor) -> Tensor:
        """``[batch, numbers]`` in the shape in which it travels: a lone floating tensor has its own."""
        return packed.reshape(-1, *self._tree.shape) if self.alone else packed

    def unpack(self, packed: Tensor) -> Any:
        """The batch again; floating tensors in the packed one's type, whole numbers within what was seen."""
        if self.alone:
            return packed
        place = 0

        def read(leaf: Leaf) -> Tensor:
            nonlocal place
            if leaf.constant is not None:
                return torch.full((packed.shape[0], *leaf.shape), leaf.constant, dtype=leaf.dtype, device=packed.device)
            count = math.prod(leaf.shape)
            part = packed[:, place : place + count].reshape(-1, *leaf.shape)
            place += count
            if leaf.dtype.is_floating_point:
                return part
            if leaf.dtype == torch.bool:
                return part > 0.5
            # Inputs that were drawn to try the network out are no ids; they are folded into the range.
            return part.round().long().remainder(leaf.limit).to(leaf.dtype)

        return _read(self._tree, read)


class Called(nn.Module):
    """The wrapper.

    Args:
        network: The network; it is held, not copied.
        form: Of its batches.
        function: Gives its answer for a batch; None calls it with the batch (a dictionary by keyword, a list or tuple by
            position).
    """

    def __init__(self, network: nn.Module, form: Form, function: Callable[[nn.Module, Any], Any] | None = None) -> None:
        super().__init__()
        self.network = network
        self._form, self._function = form, function

    def forward(self, packed: Tensor) -> Tensor:
        """Packed inputs → everything the network says, ``[batch, numbers]``.

        Raises:
            UnsupportedModelError: If it says nothing that belongs to single samples.
        """
        batch = self._form.unpack(packed)
        if self._function is not None:
            answer = self._function(self.network, batch)
        elif isinstance(batch, Mapping):
            answer = self.network(**batch)
        elif isinstance(batch, list | tuple):
            answer = self.network(*batch)
        else:
            answer = self.network(batch)
        return side_by_side(answer, packed.shape[0])


class Sent(Called):
    """The same where everything that is not an image travels as one, ``[batch, 1, 1, numbers]``: what a run keeps and shows.

    Args:
        network: The network; it is held, not copied.
        batch: A batch as it comes from the user's data.
        function: As of `Called`.
    """

    def __init__(self, network: nn.Module, batch: Any, function: Callable[[nn.Module, Any], Any] | None = None) -> None:
        self._names = () if function is not None else named_inputs(network, batch)
        super().__init__(network, Form(read_of(batch, self._names, function)), function)

    def forward(self, packed: Tensor) -> Tensor:
        """``[batch, 1, 1, numbers]`` → everything the network says, ``[batch, numbers]``."""
        return super().forward(self._form.shaped(packed.flatten(1)))

    def refuse(self, dtype: torch.dtype) -> None:
        """Refuse to travel in a precision that does not tell all ids of tokens apart.

        Raises:
            ConfigError: If whole numbers of the batches are higher than those that the precision holds one by one.
        """
        told_apart = int(2 / torch.finfo(dtype).eps)
        if self._form.highest > told_apart:
            name = str(dtype).removeprefix("torch.")
            raise ConfigError(
                f"runtime.dtype={name}: the network reads whole numbers up to {self._form.highest}, and {name} tells only "
                f"those up to {told_apart} apart; use runtime.dtype=float32."
            )

    def packed(self, batch: Any) -> tuple[Tensor, Tensor | None]:
        """A batch as the wrapper takes it, and its labels.

        Raises:
            DataError: If it has another form than the first.
        """
        sent = self._form.pack(read_of(batch, self._names, self._function))
        return sent.reshape(len(sent), 1, 1, -1), labels_of(batch)


def read_of(
    batch: Any, names: Sequence[str], function: Callable[[nn.Module, Any], Any] | None, key: str | int | None = None
) -> Any:
    """What of a batch is read.

    Args:
        batch: As it comes from the user's data.
        names: Inputs that the network takes by name (`named_inputs`); empty where it takes one.
        function: Of the user's, which reads all of a batch; or None.
        key: Where the one input stands, as of `parted`.

    Raises:
        DataError: If one of the names or the key is not there.
    """
    if function is not None:
        return batch
    if not names:
        return parted(batch, key)[0]
    if not isinstance(batch, Mapping) or any(name not in batch for name in names):
        raise DataError(
            f"batches: expected dictionaries with {', '.join(names)} as in the first batch, got {type(batch).__name__}; "
            "give all batches one form."
        )
    return {name: batch[name] for name in names}


def side_by_side(answer: Any, samples: int) -> Tensor:
    """Everything floating in an answer as one tensor ``[samples, numbers]``; a tensor of that shape stays itself.

    Raises:
        UnsupportedModelError: If a floating tensor does not have one entry for each sample, or there is none.
    """
    # shape, not len: an export with a free batch would take the length for a number.
    if isinstance(answer, Tensor) and answer.dim() == 2 and answer.shape[0] == samples:
        return answer
    found = [tensor for tensor in tensors_of(answer) if tensor.is_floating_point()]
    wrong = next((tensor for tensor in found if not tensor.dim() or tensor.shape[0] != samples), None)
    if wrong is not None or not found:
        told = f"a tensor {list(wrong.shape)}" if wrong is not None else f"a {type(answer).__name__} without numbers"
        raise UnsupportedModelError(
            f"the network gives {told} for {samples} samples, expected numbers for each sample; choose what of its answer "
            "counts by a function of model and batch (forward=, model.forward)."
        )
    return torch.cat([tensor.reshape(samples, -1) for tensor in found], 1)


def parted(batch: Any, key: str | int | None) -> tuple[Any, Tensor | None]:
    """What the network reads of a batch, and its labels.

    Args:
        batch: A tensor; ``(images, labels, …)`` whose first is read and whose second, one whole number a sample, are the
            labels; or a dictionary, read at `key`, or at the usual names of images.
        key: Name or place of what is read; None guesses as above.

    Raises:
        DataError: If the key is not there, or none of the usual names is.
    """
    if isinstance(batch, Mapping):
        tensors = [name for name, value in batch.items() if isinstance(value, Tensor) and name not in _LABELS]
        usual = next((name for name in _INPUTS if name in batch), tensors[0] if len(tensors) == 1 else None)
        chosen = usual if key is None else key
        if chosen not in batch:
            names = ", ".join(map(str, batch))
            raise DataError(
                f"batches: it is not clear which of {names} the network reads; name it (inputs=), or give a function of "
                "model and batch (forward=, model.forward with model.example)."
            )
        truth = next((batch[name] for name in _LABELS if name in batch), None)
        return batch[chosen], _labels(truth, batch[chosen])
    if isinstance(batch, list | tuple):
        place = 0 if key is None else key
        if not isinstance(place, int) or not -len(batch) <= place < len(batch):
            raise DataError(f"batches: there is no entry {key!r} in a batch of {len(batch)}; give its place (inputs=).")
        others = [one for number, one in enumerate(batch) if number != place % len(batch)]
        return batch[place], _labels(others[0] if others else None, batch[place])
    return batch, None


def labels_of(batch: Any) -> Tensor | None:
    """Labels of a batch that a function of the user's reads as a whole: under a usual name, or the second of a pair."""
    if isinstance(batch, Mapping):
        first = next(tensors_of(batch), None)
        return _labels(next((batch[name] for name in _LABELS if name in batch), None), first)
    return parted(batch, None)[1]


def named_inputs(model: nn.Module, batch: Any) -> tuple[str, ...]:
    """Keys of a batch that the network's forward takes by name, where these are more than one; labels are not read."""
    if not isinstance(batch, Mapping):
        return ()
    known = inspect.signature(model.forward).parameters
    found = tuple(n for n, value in batch.items() if n in known and n not in _LABELS and isinstance(value, Tensor))
    return found if len(found) > 1 or found == ("input_ids",) else ()


def _labels(found: Any, inputs: Any) -> Tensor | None:
    if isinstance(found, Sequence) and not isinstance(found, str) and all(isinstance(one, int) for one in found):
        found = torch.tensor(found)
    # Maps, boxes and masks are no labels; a list of numbers of a wrong length is told of where it is read.
    return found if isinstance(found, Tensor) and found.dim() < 2 and isinstance(inputs, Tensor) else None


def _shaped(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        whole = not batch.is_floating_point() and batch.dtype != torch.bool
        limit = int(batch.max()) + 1 if whole and batch.numel() else 0
        if whole and batch.numel() and int(batch.min()) < 0:
            raise DataError("batches: whole numbers must not be negative; give a function of model and batch (forward=).")
        fixed = not batch.is_floating_point() and batch.numel() > 1 and bool((batch == batch.flatten()[0]).all())
        return Leaf(tuple(batch.shape[1:]), batch.dtype, limit, int(batch.flatten()[0]) if fixed else None)
    if isinstance(batch, Mapping):
        return {key: _shaped(value) for key, value in batch.items() if any(True for _ in tensors_of(value))}
    if isinstance(batch, list | tuple):
        return tuple(_shaped(value) for value in batch)
    return None


def _leaves(tree: Any, batch: Any) -> list[tuple[Leaf, Any]]:
    if isinstance(tree, Leaf):
        return [(tree, batch)]
    if isinstance(tree, Mapping):
        return [pair for key, part in tree.items() for pair in _leaves(part, batch.get(key))]
    if isinstance(tree, tuple):
        return [pair for part, value in zip(tree, batch, strict=True) for pair in _leaves(part, value)]
    return []


def _read(tree: Any, read: Callable[[Leaf], Tensor]) -> Any:
    if isinstance(tree, Leaf):
        return read(tree)
    if isinstance(tree, Mapping):
        return {key: _read(part, read) for key, part in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_read(part, read) for part in tree)
    return None
