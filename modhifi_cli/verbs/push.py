"""`modhifi push`: the network of a finished run on the Hugging Face hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.files import artifacts, hub


def push(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    """Upload the saved network's folder, or say what would be uploaded."""
    run = artifacts.run_folder(settings["run"], needs=("model", "results.json"))
    planned = hub.plan(run / "model", settings["repo"])
    for name, size in planned.files.items():
        console.note(f"{name}: {size:,} bytes")
    whole = f"{len(planned.files)} files, {sum(planned.files.values()):,} bytes"
    if settings["dry_run"]:
        console.note(f"would upload {whole} from {planned.folder} to {planned.repo}")
    else:
        hub.upload(planned, private=settings["private"])
        console.note(f"{whole} are at {planned.repo}; open them with modhifi_cli.load_model({planned.repo!r})")
    told = {"repo": planned.repo, "files": dict(planned.files), "uploaded": not settings["dry_run"]}
    console.result({"run": str(run)} | told)
    return run
