"""Which layers are edited: found in the trace, chosen by the method, by number or by name."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError, nearest
from modhifi_cli.graph.segments import Segments
from modhifi_cli.unlearning.closings import find_closings, read_positions
from modhifi_cli.unlearning.method import Layer, Method


def choose_layers(
    model: nn.Module,
    segments: Segments,
    example: Tensor,
    classifier: str,
    layers: str | Sequence[str],
    method: Method,
) -> tuple[Layer, ...]:
    """The layers that are edited, in execution order.

    ``"auto"`` takes the method's `depth` late layers, or where it has none the last stage: every layer whose output
    has as few positions as the last one's, or the last third of the layers where that is more than half of them all
    (plain transformers). ``"last N"`` takes the N last ones in front of the classifier.

    Raises:
        ConfigError: If a name matches nothing, or ``last N`` asks for more layers than there are.
        UnsupportedModelError: If there is no layer to edit.
    """
    known = _editable(model, segments, example, classifier)
    body = [layer for layer in known if not layer.classifier]
    if method.closings:
        found = find_closings(model, segments, example, {layer.name: layer.norm for layer in body}, classifier)
        visits = segments.trace.visits
        ended = max((visits[closing.place].leave for closing in found.values()), default=0)
        open_ended = any(visits[layer.name].enter > ended for layer in body)
        body = [replace(layer, closing=found[layer.name]) for layer in body if layer.name in found]
        known = [*body, *(layer for layer in known if layer.classifier)]
        if open_ended or not body:
            raise UnsupportedModelError(
                "the network's last block does not end in one layer's output plus a stream, which method=collapse solves; "
                "use method=contrast."
            )
    ends = [layer for layer in known if layer.classifier] if method.edits_classifier else []
    if layers == "auto":
        if method.depth is not None:
            return (*body[len(body) - min(method.depth, len(body)) :], *ends)
        chosen = _last_stage(model, body, example)
    elif isinstance(layers, str) and layers.split()[:1] == ["last"]:
        number = layers.removeprefix("last").strip()
        if not number.isdigit() or not 1 <= int(number) <= len(body):
            raise ConfigError(
                f"layers='{layers}' must be 'last N' with N from 1 to {len(body)}, the layers in front of the classifier."
            )
        chosen = body[-int(number) :]
    else:
        names = [layers] if isinstance(layers, str) else list(layers)
        matched = {name: [layer for layer in known if _is_under(layer.name, name)] for name in names}
        for name, found in matched.items():
            if not found:
                raise ConfigError(
                    f"layers: the network has no layer '{name}' that can be edited; "
                    f"{nearest(name, {part for layer in known for part in _beginnings(layer.name)})}"
                )
        wanted = {layer.name for found in matched.values() for layer in found}
        return tuple(layer for layer in known if layer.name in wanted or layer in ends)
    if not chosen and not ends:
        raise UnsupportedModelError(
            "the network has no convolution or linear layer in front of its classifier to edit."
        )
    return (*chosen, *ends)


def _editable(model: nn.Module, segments: Segments, example: Tensor, classifier: str) -> list[Layer]:
    """Convolutions without groups and linear layers that run once, in execution order, up to the classifier."""
    trace = segments.trace
    modules = dict(model.named_modules())
    found = []
    once = [name for name in trace.visits if name not in trace.calls]
    linear = [name for name in once if isinstance(modules[name], nn.Linear)]
    read = read_positions(model, example, linear) if linear else {}
    for name in once:
        module = modules[name]
        plain = isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros"
        if plain or isinstance(module, nn.Linear):
            norm = trace.norm_of.get(name)
            if norm is not None and modules[norm].running_mean is None:
                norm = None
            found.append(Layer(name, module, norm, name == classifier, read.get(name)))
    return found


def _last_stage(model: nn.Module, body: Sequence[Layer], example: Tensor) -> list[Layer]:
    positions: dict[str, int] = {}

    def remember(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            per_output = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
            positions[name] = output[0].numel() // per_output

        return hook

    handles = [layer.module.register_forward_hook(remember(layer.name)) for layer in body]
    try:
        with torch.no_grad():
            model(example)
    finally:
        for handle in handles:
            handle.remove()
    stage = [layer for layer in body if positions[layer.name] == positions[body[-1].name]] if body else []
    if 2 * len(stage) > len(body):
        return list(body[-max(1, len(body) // 3) :])
    return stage


def _is_under(name: str, beginning: str) -> bool:
    return name == beginning or name.startswith(beginning + ".")


def _beginnings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
