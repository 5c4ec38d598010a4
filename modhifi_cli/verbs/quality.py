"""The look at a run's calibration images before they are used: what is told, what is kept, what follows from it."""

import dataclasses
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from modhifi_cli.console import Console
from modhifi_cli.files import artifacts
from modhifi_cli.records import ImageSource, Preprocess, TextInput, last_of

FILE = "quality.json"


def look(
    model: nn.Module,
    source: ImageSource,
    settings: Mapping[str, Any],
    device: torch.device,
    console: Console,
    place: artifacts.RunDirectory,
) -> Any:
    """Assess a set with the dense network's eyes, and keep what is found in the run's folder."""
    from modhifi_cli.engine.quality import Quality, assess

    events = assess(model, source, batch_size=settings["runtime"]["batch_size"], device=device)
    found = last_of(events, Quality, console.progress)
    artifacts.write_json(place.path / FILE, found.to_json())
    return found


def before_the_run(
    model: nn.Module,
    source: ImageSource,
    settings: Mapping[str, Any],
    preprocess: Preprocess | TextInput,
    device: torch.device,
    console: Console,
    place: artifacts.RunDirectory,
) -> tuple[Mapping[str, Any], Any]:
    """Look at a run's calibration images, and keep the stored BatchNorm statistics where they are too poor.

    Args:
        model: The dense network on `device`, before its first edit.
        source: The images.
        settings: Of the run.
        preprocess: Of the network; text is not looked at.
        device: Where the forwards run.
        console: Who is told.
        place: The run's folder.

    Returns:
        The settings to go on with, and the `Quality`, or None where nothing was looked at.
    """
    if not settings["check_data"] or isinstance(preprocess, TextInput):
        return settings, None
    found = look(model, source, settings, device, console, place)
    if settings.get("batchnorm") == "reestimate" and not found.may_reestimate:
        # Every statistic that these images would give is that of other images: what is stored, less what the edits
        # took from it, is nearer to the truth.
        kept = (
            "the stored BatchNorm statistics are kept and only corrected for what is removed; with check_data=false "
            "they are re-estimated all the same"
        )
        found = dataclasses.replace(found, warnings=(*found.warnings, kept))
        settings = {**settings, "batchnorm": "stored"}
    show(console, found)
    for text in found.warnings:
        place.log(f"warning: {text}")
    return settings, found


def show(console: Console, quality: Any) -> None:
    """Tell what was found, in a line and its warnings."""
    console.note(told(quality))
    for text in quality.warnings:
        console.warning(text)


def entries(sample: Mapping[str, Any], source: ImageSource, quality: Any) -> dict[str, Any]:
    """What a run's page shows of its calibration sample, with where it came from and what was found of it."""
    own: dict[str, Any] = {}
    if "chosen" in source.protocol:
        own["data"] = source.protocol["chosen"]
    if quality is not None:
        own |= {"images": quality.samples, "copies_percent": round(100 * quality.twins, 2)}
        if quality.distance is not None:
            own["distance_of_batchnorm_statistics_from_the_stored"] = round(quality.distance, 4)
        if quality.layers:
            ranks = [layer.effective_rank / layer.channels for layer in quality.layers]
            own["effective_rank_percent_of_channels"] = round(100 * sum(ranks) / len(ranks), 1)
            own["lowest_coverage_percent_of_channels"] = round(100 * min(one.coverage for one in quality.layers), 1)
        for trial in quality.repairs:
            errors = f"{trial.fitted:.2%} where fitted, {trial.held_out:.2%} held out"
            own[f"error_of_a_trial_repair_at_{trial.layer}"] = errors
    if not own:
        return dict(sample)
    return {**sample, "calibration_quality": {**sample.get("calibration_quality", {}), **own}}


def told(quality: Any) -> str:
    """The quality of a set in one line; what it rests on is in the run's quality.json."""
    verdict = "poor, as the warnings say" if quality.warnings else "good"
    return f"calibration set: {verdict} ({quality.samples} images; {FILE} has the details)"


def as_pixels(images: Tensor, preprocess: Preprocess) -> np.ndarray:
    """Normalised images ``[batch, channels, height, width]`` as pixels ``[batch, height, width, channels]`` uint8."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (preprocess.mean, preprocess.std))
    pixels = (images.float().cpu() * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().numpy()


def png(image: np.ndarray) -> bytes:
    """``[height, width, channels]`` uint8 as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()
