"""`modhifi replay`: apply a run's saved edits to the dense network, without data."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts
from modhifi_cli.records import Edit, Progress
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces
from modhifi_cli.verbs.opened import open_run


def replay(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    from modhifi_cli.graph.surgery import weights_hash

    # The saved network may be lost: edits and dense weights are enough to make it again.
    opened = open_run(settings, console, needs=("config.yaml", "edits.json", "edits.safetensors"))
    source = opened.folder
    edits, made_on = opened.edits()
    before = pieces.settings_of(source, unverified=opened.unverified)
    if settings["model"]["weights"] is not None:
        before["model"]["weights"] = "default"  # what the run says of them is not looked at
    opened.refuse_reaching(before, "model")
    if settings["model"]["weights"] is not None:
        before["model"]["weights"] = settings["model"]["weights"]
    loaded = opened.build(before["model"])
    found = weights_hash(loaded.model)
    if edits and found != made_on:
        raise DataError(
            f"run={source}: its edits were made on dense weights with sha256 {str(made_on)[:12]}, these have "
            f"{found[:12]}; give the same weights with model.weights=FILE."
        )
    model = loaded.model
    _apply_(model, edits, source, console)
    place = artifacts.RunDirectory.create(folder or pieces.new_folder("replay", loaded.name, settings, facts))
    command = pieces.command_line("replay", facts["overrides"])
    for edit in edits:
        place.save_edit(edit, found)
    artifacts.write_text(place.path / "config.yaml", config.to_yaml(opened.without_reaching(before)))
    artifacts.write_json(place.path / "environment.json", artifacts.environment(command, "cpu"))
    pieces.save_network(place, loaded, model)
    same = None
    try:
        same = weights_hash(opened.network().model) == weights_hash(model)
    except DataError as error:
        console.warning(f"the run's own saved network cannot be compared with: {error}")
    results = {
        "format_version": artifacts.FORMAT_VERSION,
        "verb": "replay",
        "model": loaded.name,
        "weights": loaded.weights,
        "replayed": str(source),
        **opened.record(),
        "edits": len(edits),
        "equals_saved_model": same,
        "measurements": [],
    }
    artifacts.write_json(place.path / "results.json", results)
    final = place.finish()
    told = {
        True: "; weights equal to those of the run's saved network",
        False: "; weights NOT equal to those of the run's saved network",
        None: "",
    }[same]
    console.note(f"{len(edits)} edits applied to {loaded.weights}{told}")
    console.note(f"the network lies in {final / 'model'}")
    console.result({"folder": str(final), "edits": len(edits), "equals_saved_model": same})
    return final


def _apply_(model: nn.Module, edits: Sequence[Edit], source: Path, console: Console) -> None:
    """Apply all edits; what does not fit is the folder's fault."""
    from modhifi_cli.graph.surgery import apply_edit_

    for number, edit in enumerate(edits):
        console.progress(Progress("replay", edit.name, number + 1, len(edits)))
        try:
            apply_edit_(model, edit)
        except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            raise DataError(
                f"run={source}: edit {edit.name} does not fit the network ({type(error).__name__}: {error}); restore the "
                "run folder."
            ) from error
    model.eval()
