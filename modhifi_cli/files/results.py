"""Results of a run, what its page is made of, what it ran on, and the latency table it measured."""

import dataclasses
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from modhifi_cli.errors import DataError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.files import manifest
from modhifi_cli.files.disk import FORMAT_VERSION, as_object, as_text, read_object, write_json
from modhifi_cli.records import Measurement


def read_results(run: Path) -> dict[str, Any]:
    """The content of a run's ``results.json``."""
    return _listed(run, "results.json")


def save_latency_table(path: Path, table: LatencyTable) -> None:
    """Write a latency table as JSON."""
    write_json(path, {"format_version": FORMAT_VERSION, **table.to_json()})


def load_latency_table(path: str | os.PathLike[str]) -> LatencyTable:
    """The latency table that a run kept.

    Raises:
        DataError: If there is no such file, or it is no latency table.
    """
    file = Path(path)
    if not file.is_file():
        raise DataError(
            f"target.table={file}: no such file; give the latency_table.json of a run with target=latency, or leave "
            "target.table out to measure one."
        )
    return LatencyTable.from_json(read_object(file, "a latency table"), str(file))


def report_material(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that its page is made of; what a run does not have is absent.

    Returns:
        ``results``, ``settings`` (the text of config.yaml), ``environment``, ``charts`` (JSON objects), ``sheet``.

    Raises:
        DataError: If there are no results, or a file is damaged or of a newer format.
    """
    results = read_results(folder)
    found: dict[str, Any] = {"results": results}
    if os.path.lexists(folder / "config.yaml"):
        found["settings"] = as_text(bytes_of(folder, "config.yaml"), folder / "config.yaml")
    if os.path.lexists(folder / "environment.json"):
        found["environment"] = _listed(folder, "environment.json")
    named = results.get("charts") or ()
    if not isinstance(named, (list, tuple)):
        raise DataError(f"{folder / 'results.json'}: damaged, its charts are no list; restore the run folder.")
    found["charts"] = [_listed(folder, f"{Path(str(name)).name}.json") for name in named]
    if os.path.lexists(folder / "calibration.png"):
        found["sheet"] = bytes_of(folder, "calibration.png")
    return found


def bytes_of(folder: Path, name: str) -> bytes:
    """A file of a run; what its list of checksums names must be what was written, where there is such a list.

    Raises:
        DataError: If it is missing, changed or unreadable.
    """
    return manifest.checked(folder, unverified=True).bytes_of(name)


def text_of(folder: Path, name: str, *, unverified: bool = True) -> str:
    """As `bytes_of`, as text.

    Args:
        folder: Of the run.
        name: Of the file.
        unverified: Whether the folder may be without a list of checksums.
    """
    return manifest.checked(folder, unverified=unverified).text(name)


def _listed(folder: Path, name: str) -> dict[str, Any]:
    if not os.path.lexists(folder / name):
        raise DataError(f"{folder}: not a saved run, {name} is missing.")
    return as_object(bytes_of(folder, name), folder / name)


def measurements_to_json(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Measurements as JSON-able dictionaries."""
    return [dataclasses.asdict(measurement) for measurement in measurements]


def environment(command: str, device: str) -> dict[str, Any]:
    """What the run ran on: versions of the libraries, the processor and the device, the command."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("modhifi", "torch", "torchvision", "timm", "transformers", "torch-pruning", "safetensors", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    cuda = torch.device(device).type == "cuda" and torch.cuda.is_available()
    return {
        "command": command,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(torch.device(device)) if cuda else device,
        "precision": "TF32 in float32 forwards" if cuda and torch.backends.cudnn.allow_tf32 else "forwards as they are",
        "packages": packages,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
