"""`modhifi synthesize`: calibration data from the network alone, as a set that any run can use."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from modhifi_cli.console import Console
from modhifi_cli.data.sheet import contact_sheet
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts, cache
from modhifi_cli.records import ImageSource, LoadedModel, TextInput
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces, quality


def synthesize(
    settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None
) -> Path | None:
    if settings["cache"] != "use":
        _tend(settings["cache"], console)
        return None
    from modhifi_cli.graph.surgery import weights_hash

    pieces.require_data(settings)
    command = pieces.command_line("synthesize", facts["overrides"])
    device = pieces.device_of(settings)
    steps = pieces.Steps(console, {"make": "making images", "quality": "checking them"})
    loaded = config.build(settings["model"])
    if isinstance(loaded.preprocess, TextInput):
        raise ConfigError(
            "modhifi synthesize writes images; text that a language model makes for itself comes with data=generated."
        )
    try:
        with steps("make"):
            source = pieces.image_source(settings, "data", loaded, labelled=False, console=console)
        assert source is not None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("Type the same command again: finished parts are kept in the cache.") from None
    place = pieces.begin_run("synthesize", loaded.name, settings, facts, folder, device)
    place.log(command)
    pixels = _pixels(source, loaded)
    model = pieces.placed(loaded.model, settings, device)
    with steps("quality"):
        found = quality.look(model, source, settings, device, console, place)
    artifacts.write_bytes(place.path / "calibration.png", contact_sheet(source, loaded.preprocess))
    _write(place.path, settings["form"], pixels)
    manifest = {
        "format_version": artifacts.FORMAT_VERSION,
        "model": loaded.name,
        "weights": loaded.weights,
        "weights_sha256": weights_hash(loaded.model),
        "settings": settings["data"],
        "images": dict(source.protocol),
        "form": settings["form"],
        "quality": found.to_json(),
        "seconds": steps.seconds,
        "command": command,
    }
    artifacts.write_json(place.path / "manifest.json", manifest)
    final = place.finish(edits=False)
    quality.show(console, found)
    kind = "arrays" if settings["form"] == "array" else "folder"
    where = final / ("images" if kind == "folder" else "images.npz")
    console.note(f"{len(source)} images in {final}; use them with data={kind} data.path={where}")
    console.result({"folder": str(final), "images": len(source), "quality": found.to_json(), "seconds": steps.seconds})
    return final


def _tend(what: str, console: Console) -> None:
    """Show or empty the user's cache."""
    place = cache.directory()
    sets = cache.held()
    rows = [
        {
            "network": one.network,
            "made by": one.method,
            "samples": one.samples,
            "MB": one.bytes / 1e6,
            "folder": one.folder.name,
        }
        for one in sets
    ]
    total = sum(one.bytes for one in sets)
    if what == "clean":
        freed = cache.clean()
        console.note(f"{len(sets)} sets, {freed / 1e6:.1f} MB, removed from {place}")
        console.result({"cache": str(place), "sets": len(sets), "freed_bytes": freed})
        return
    if rows:
        console.table(f"{place}, {total / 1e6:.1f} MB", rows)
    console.note(f"{len(sets)} sets, {total / 1e6:.1f} MB in {place}; modhifi synthesize cache=clean removes them")
    console.result({"cache": str(place), "bytes": total, "sets": rows})


def _pixels(source: ImageSource, loaded: LoadedModel) -> np.ndarray:
    """All images as they were before normalisation, ``[images, height, width, channels]`` uint8."""
    return np.concatenate([quality.as_pixels(images, loaded.preprocess) for images, _ in source.batches(64)])


def _write(folder: Path, form: str, pixels: np.ndarray) -> None:
    if form == "array":
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=pixels)
        artifacts.write_bytes(folder / "images.npz", buffer.getvalue())
        return
    artifacts.make_folder(folder / "images")
    for number, image in enumerate(pixels):
        artifacts.write_bytes(folder / "images" / f"{number:06d}.png", quality.png(image))
