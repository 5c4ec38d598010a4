"""What a network answers, whether it reads images or tokens, and whatever its answer is wrapped in."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def respond(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of any network.

    Args:
        model: The network in evaluation mode.
        inputs: Images ``[batch, channels, height, width]``, cast to the network's type, or token ids
            ``[batch, length]`` int64.

    Returns:
        ``[batch, classes]`` for images, ``[batch, length, vocabulary]`` for token ids (no cache is used).
    """
    if inputs.is_floating_point():
        return model(inputs.to(next(model.parameters()).dtype))
    return model(input_ids=inputs, use_cache=False).logits


def tensors_of(output: object) -> Iterator[Tensor]:
    """The tensors of a module's output or of a call's arguments, whatever containers they come in."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors_of(value)


def mapped(output: object, change: Callable[[Tensor], Tensor]) -> object:
    """The same containers with every tensor changed; transformers' outputs stay what they are (they take numbers as keys)."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, dict):
        items = {key: mapped(value, change) for key, value in output.items()}
        return items if type(output) is dict else type(output)(**items)
    if isinstance(output, list | tuple):
        values = [mapped(value, change) for value in output]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    return output


def flattened(output: object) -> Tensor:
    """All floating-point numbers of an output behind each other, ``[numbers]``: to compare answers of any form."""
    return torch.cat([tensor.flatten() for tensor in tensors_of(output) if tensor.is_floating_point()])
