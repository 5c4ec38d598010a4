"""The last layer, refitted to the dense network's logits once everything in front of it has been edited (M9)."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import held_out_images
from modhifi_cli.engine.image_walk import Activations
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.numerics.refit import refit
from modhifi_cli.records import Edit, ModuleEdit, Progress


@torch.no_grad()
def find_classifier(
    model: nn.Module, example: Tensor, *, wanted: str = "classifier=refit", advice: str = "set classifier=keep"
) -> str:
    """Name of the linear layer whose output is the network's output.

    Args:
        model: Network in evaluation mode.
        example: A batch it takes, ``[batch, channels, height, width]``.
        wanted: Who asks, for messages.
        advice: What the user can do instead, for messages.

    Raises:
        UnsupportedModelError: If the logits do not come straight out of a linear layer with a bias.
    """
    made: dict[int, str] = {}
    alive = []

    def remember(name: str) -> object:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            made[id(output)] = name
            alive.append(output)

        return hook

    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(remember(name)) for name, module in linear.items()]
    try:
        name = made.get(id(model(example)))
    finally:
        for handle in handles:
            handle.remove()
    if name is None or linear[name].bias is None:
        raise UnsupportedModelError(
            f"{wanted}: the logits of {type(model).__name__} do not come straight out of a linear layer with a "
            f"bias; {advice}."
        )
    return name


class DenseLogits:
    """The dense network's logits on the calibration images, taken before anything is edited.

    Args:
        layer: Name of the classifier.
    """

    def __init__(self, layer: str) -> None:
        self.layer = layer
        self.logits = torch.empty(0)

    def gather(self, activations: Activations) -> Iterator[Progress]:
        """Run the network as it stands over all images."""
        found: list[Tensor] = []
        yield from activations.outputs(self.layer, found.append, item="dense logits")
        self.logits = torch.cat(found)


def refit_classifier_(
    model: nn.Module, activations: Activations, aims: DenseLogits, result: list[Edit]
) -> Iterator[Progress]:
    """Refit the classifier of the edited network in place; the edit is appended to `result`.

    Raises:
        NumericsError: If there are fewer than five images, or values are not finite.
    """
    rows: list[Tensor] = []
    yield from activations.walk({aims.layer: lambda inputs: rows.append(inputs.clone())}, item="classifier")
    inputs = torch.cat(rows)
    layer = model.get_submodule(aims.layer)
    held_out = held_out_images(torch.arange(len(inputs), device=inputs.device))
    found = refit(inputs, aims.logits, layer.weight.detach(), layer.bias.detach(), held_out=held_out)
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        layer.bias.copy_(found.bias)
    tensors = {name: getattr(layer, name).detach().cpu().clone() for name in ("weight", "bias")}
    facts = {"ridge": found.ridge, "error_before": found.error_before, "error_after": found.error_after}
    empty = torch.arange(0)
    result.append(Edit("classifier", 0, (ModuleEdit(aims.layer, tensors=tensors),), empty, empty, facts))
