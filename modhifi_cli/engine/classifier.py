"""The last layer, refitted to the dense network's logits once everything in front of it has been edited (M9)."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.engine.edit import tensor_edits
from modhifi_cli.engine.gathering import held_out_images
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.walk import Walk
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.graph.components import Refusal
from modhifi_cli.numerics.refit import refit
from modhifi_cli.records import Edit, EditState, Progress

_ITEM = "dense logits"  # in progress


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

    def remember(name: str) -> Callable[[nn.Module, tuple, Tensor], None]:
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


@dataclass(frozen=True)
class Aims:
    """What the last layer shall give: the dense network's logits.

    Attributes:
        walk: The walk over the images.
        layer: Name of the classifier.
        logits: On all calibration images, ``[images, classes]``; None where the dense network is kept and can be asked
            at the end.
    """

    walk: ImageWalk
    layer: str
    logits: Tensor | None


def aims_of(walk: Walk, classifier: str) -> Generator[Progress, None, tuple[Aims | None, tuple[Refusal, ...]]]:
    """Aims for the last layer where it is to be refitted, and why it is left alone where it cannot be.

    Args:
        walk: The dense network.
        classifier: ``"keep"``, ``"refit"``, or ``"auto"``: refit where the logits come out of a linear layer.

    Raises:
        UnsupportedModelError: If it must be refitted and cannot be.
    """
    if classifier == "keep":
        return None, ()
    if not isinstance(walk, ImageWalk):
        if classifier == "refit":
            raise UnsupportedModelError("classifier=refit: only networks that read images have one; set classifier=keep.")
        return None, ()
    try:
        layer = find_classifier(walk.model, walk.example)
    except UnsupportedModelError as error:
        if classifier == "refit":
            raise
        why = str(error).partition(": ")[2].partition(";")[0]
        return None, (Refusal("classifier", f"kept as it is: {why}"),)
    logits = None if walk.keeps_dense else (yield from walk.dense_answers(layer, item=_ITEM))
    return Aims(walk, layer, logits), ()


def refit_classifier_(aims: Aims) -> Generator[Progress, None, Edit]:
    """Refit the classifier of the edited network in place.

    Raises:
        NumericsError: If there are fewer than five images, or values are not finite.
    """
    walk, rows = aims.walk, list[Tensor]()
    yield from walk.activations.walk({aims.layer: lambda inputs: rows.append(inputs.clone())}, item="classifier")
    inputs = walk.team.gather(torch.cat(rows))
    logits = aims.logits if aims.logits is not None else (yield from walk.dense_answers(aims.layer, item=_ITEM))
    layer = walk.model.get_submodule(aims.layer)
    assert isinstance(layer, nn.Linear)  # as `find_classifier` found it
    held_out = held_out_images(torch.arange(len(inputs), device=inputs.device))
    found = refit(inputs, logits, layer.weight.detach(), layer.bias.detach(), held_out=held_out)
    with torch.no_grad():
        layer.weight.copy_(found.weight)
        layer.bias.copy_(found.bias)
    facts = {"ridge": found.ridge, "error_before": found.error_before, "error_after": found.error_after}
    nothing, state = torch.arange(0), EditState("classifier")
    return Edit("classifier", 0, tensor_edits(walk.model, [aims.layer]), nothing, nothing, facts, state)
