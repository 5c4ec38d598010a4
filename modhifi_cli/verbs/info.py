"""`modhifi info`: the groups of coupled channels of a network and what hangs on each."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.graph.components import ComponentGroup
from modhifi_cli.graph.heads import COUNTS, head_count
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces


def info(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    from modhifi_cli.engine.plan import discover
    from modhifi_cli.graph.counting import CostModel

    if pieces.is_decoder(settings):
        _of_decoder(settings, console)
        return
    loaded = config.build(_shapes_alone(settings["model"]))
    example = pieces.example_inputs(loaded.preprocess, 2)
    _, groups, refused = discover(loaded.model, example, exclude=tuple(settings["exclude"]), products=True)
    cost = CostModel(loaded.model, example[:1], groups)
    sizes = [group.components for group in groups]
    rows = []
    for number, group in enumerate(groups):
        without = cost.counts([*sizes[:number], 0, *sizes[number + 1 :]])
        rows.append(
            {
                "group": group.name,
                "components": group.components,
                "component": _component(loaded.model, group),
                "parameters": cost.dense.parameters - without.parameters,
                "FLOPs (MACs)": cost.dense.macs - without.macs,
                "producers": list(dict.fromkeys(slot.module for slot in group.producers)),
                "consumers": [slot.module for slot in group.consumers],
            }
        )
    console.note(f"{loaded.name}: {cost.dense.parameters:,} parameters, {cost.dense.macs:,} FLOPs (MACs) for one image")
    console.table("groups of coupled components, with what hangs on each", rows)
    for refusal in refused:
        console.note(f"left alone: {refusal.name}: {refusal.reason}")
    console.result(
        {
            "model": loaded.name,
            "parameters": cost.dense.parameters,
            "macs": cost.dense.macs,
            "groups": rows,
            "refused": [dataclasses.asdict(refusal) for refusal in refused],
        }
    )


def _component(model: nn.Module, group: ComponentGroup) -> str:
    """What one component of an image network's group is."""
    if group.product:
        return "Q/K feature"
    counted = any(slot.module.rpartition(".")[2] in COUNTS for slot in group.followers)
    return "head" if counted or head_count(model.get_submodule(group.name)) is not None else "channel"


def _shapes_alone(model: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the same network without its weights: nothing is downloaded, no file is needed."""
    return dict(model) | ({"weights": "random"} if model.get("weights") == "default" else {})


def _of_decoder(settings: Mapping[str, Any], console: Console) -> None:
    """The same for a language model: neurons and heads of every layer, and what one of them carries."""
    from modhifi_cli.graph.decoder import component_parameters, find_parts
    from modhifi_cli.models import hf

    node = settings["model"]
    if node.get("path") is None:  # a GGUF file says shapes and weights together
        loaded = config.build(node)
        name, model = loaded.name, loaded.model
    else:
        model = hf.outline(**{key: node.get(key) for key in ("path", "revision", "dtype", "trust_remote_code")})
        name = node.get("name") or Path(str(node["path"])).name
    decoder = find_parts(model, exclude=tuple(settings["exclude"]), check=False)
    layers = [model.get_submodule(name) for name in decoder.layers]
    whole = sum(parameter.numel() for parameter in model.parameters())
    decoded = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
    rows = [
        {
            "group": part.name,
            "components": part.components,
            "component": part.unit,
            "parameters": part.components * component_parameters(model, part),
            "producers": [slot.module for slot in part.group.producers],
            "consumers": [part.consumer.module],
        }
        for part in decoder.parts
    ]
    console.note(
        f"{name}: {whole:,} parameters, {decoded:,} of them in {len(layers)} decoder layers and "
        f"{whole - decoded:,} in embeddings, head and the last norm"
    )
    console.table("groups of neurons and heads, with what hangs on each", rows)
    for refusal in decoder.refused:
        console.note(f"left alone: {refusal.name}: {refusal.reason}")
    console.result(
        {
            "model": name,
            "parameters": whole,
            "decoder_parameters": decoded,
            "groups": rows,
            "refused": [dataclasses.asdict(refusal) for refusal in decoder.refused],
        }
    )
