"""`modhifi export`: the network of a finished run in the formats of other programs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces
from modhifi_cli.verbs.opened import open_run


def export(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    """Write every format, check it, and add it to the run's page."""
    if not settings["export"]:
        known = ",".join(config.groups()["export"])
        raise ConfigError(f"modhifi export: say which formats, such as export=[onnx]; there are {known}.")
    opened = open_run(settings, console, needs=("model", "results.json"))
    run = opened.folder
    pieces.refuse_exports(settings["export"], "tokens" if artifacts.reads_text(run) else "images")
    loaded = opened.network(settings["weights"])
    results = artifacts.read_results(run)
    told = {key: results[key] for key in ("sparsity", "target") if results.get(key) is not None}
    made = pieces.export(run / "export", settings["export"], loaded, loaded.model, told)
    rows = [one.row() for one in made]
    others = [one for one in results.get("exports") or () if one.get("path") not in {row["path"] for row in rows}]
    artifacts.write_json(run / "results.json", {**results, "exports": [*others, *rows]})
    files = sorted(path for one in made for path in (one.path.rglob("*") if one.path.is_dir() else [one.path]))
    artifacts.renew(run, ["results.json", *(path.relative_to(run).as_posix() for path in files if path.is_file())])
    pieces.write_pages(run)
    for one in made:
        console.note(f"{one.path}: {one.bytes:,} bytes, checked with {one.runtime}; open it with {one.opens}")
    console.result({"run": str(run), "exports": [{**row, "path": str(run / "export" / row["path"])} for row in rows]})
    return run
