"""What a network answers, whether it reads images or tokens: the one place that knows both ways of calling it."""

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
