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
from modhifi_cli.files.disk import FORMAT_VERSION, read_json, read_text, write_json
from modhifi_cli.records import Measurement


def read_results(run: Path) -> dict[str, Any]:
    """The content of a run's ``results.json``."""
    return read_json(run / "results.json", "a saved run")


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
    return LatencyTable.from_json(read_json(file, "a latency table"), str(file))


def report_material(folder: Path) -> dict[str, Any]:
    """Everything in a run's folder that its page is made of; what a run does not have is absent.

    Returns:
        ``results``, ``settings`` (the text of config.yaml), ``environment``, ``charts`` (JSON objects), ``sheet``.

    Raises:
        DataError: If there are no results, or a file is damaged or of a newer format.
    """
    results = read_results(folder)
    found: dict[str, Any] = {"results": results}
    if (folder / "config.yaml").is_file():
        found["settings"] = read_text(folder / "config.yaml")
    if (folder / "environment.json").is_file():
        found["environment"] = read_json(folder / "environment.json", "a saved run")
    found["charts"] = [read_json(folder / f"{Path(str(n)).name}.json", "a study") for n in results.get("charts") or ()]
    if (folder / "calibration.png").is_file():
        found["sheet"] = (folder / "calibration.png").read_bytes()
    return found


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
