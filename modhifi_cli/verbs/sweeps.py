"""Sweeps: finished jobs are skipped, interrupted ones go on, failed ones are recorded; and the summary of all."""

import inspect
import json
import os
import shlex
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from modhifi_cli.console import open_console
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts, kept
from modhifi_cli.pages import many
from modhifi_cli.pages.many import csv_text
from modhifi_cli.records import Results
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces, run
from modhifi_cli.verbs.report import write_comparison

_RESUMED = ("prune", "unlearn")  # verbs whose runs go on where they stopped
# What the table of a sweep shows of summary.csv, and under which head: a terminal is narrow.
_SHOWN = {
    "removed_params": "parameters removed, %",
    "removed_flops": "FLOPs removed, %",
    "dense_top1": "dense top-1, %",
    "pruned_top1": "pruned top-1, %",
    "pruned_agreement": "agreement, %",
    "dense_forget_accuracy": "dense forget, %",
    "edited_forget_accuracy": "edited forget, %",
    "dense_retain_accuracy": "dense retain, %",
    "edited_retain_accuracy": "edited retain, %",
    "edited_audit_probe_penultimate": "edited probe, %",
    "head_only_audit_probe_penultimate": "control probe, %",
    "edited_audit_relearn_steps": "relearn steps",
}


def run_sweep_job(composed: Any, facts: Mapping[str, Any]) -> tuple[float, float]:
    """One job of a sweep: skipped if it is finished, continued if it was interrupted, recorded if it fails.

    Args:
        composed: Hydra's config object of the job.
        facts: `config.job_facts()` with the sweep's folder.

    Returns:
        What a search makes as large as it can: share removed of the target, and quality (`many.objectives`). A job that
        failed is worse in both than any other, so that the search goes on without it.
    """
    sweep = Path(facts["sweep"])
    own = [word for word in facts["overrides"] if not word.startswith(("console", "output_dir="))]
    final = sweep / config.slug(own, leading=facts["swept"])
    path = sweep / "jobs" / f"{facts['number']:04d}.json"
    artifacts.make_folder(path.parent)
    about = {"number": facts["number"], "overrides": own, "folder": final.name}
    try:
        # Settings are read inside, so that a job that asks for what cannot be is recorded like any other failure.
        settings: dict[str, Any] = {}

        def known() -> None:
            settings.update(config.settings(facts["verb"], composed))
            pieces.same_settings(final, settings)

        def make(resume: str | None) -> None:
            settings.update(config.settings(facts["verb"], composed))
            run(facts["verb"], settings | ({"resume": resume} if resume else {}), facts, folder=final)

        kept.keep_job(final, path, about, make, resumable=facts["verb"] in _RESUMED, known=known)
    finally:
        record = artifacts.read_object(path, "the record of a job")
        done = record["status"] in kept.FINISHED
        told = f"job {record['number']} {record['status']}: {record['folder']} {record['message']}"
        open_console(composed.console.style).note(told.rstrip())
    return many.objectives(Results.read(artifacts.read_results(final))) if done else many.WORST


def slurm_script(launcher: Mapping[str, Any], folder: Path) -> str:
    """What SLURM would be given for each job of a sweep.

    Args:
        launcher: As `config.launcher`.
        folder: Of the sweep.

    Raises:
        ConfigError: If the sweep's launcher is another.
    """
    if not str(launcher.get("_target_")).endswith("SlurmLauncher"):
        raise ConfigError(
            "dry_run=true of a sweep shows the script of a SLURM job; add hydra/launcher=slurm, or leave -m out."
        )
    slurm = _slurm()
    known = set(inspect.signature(slurm._make_sbatch_string).parameters)
    renamed = slurm.SlurmExecutor._equivalence_dict()
    given = {renamed.get(key, key): value for key, value in launcher.items() if value is not None}
    given |= {"job_name": "modhifi", "mem": f"{launcher['mem_gb']}GB"}
    place = folder / ".submitit" / "%j"
    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(place)])
    return slurm._make_sbatch_string(
        command=command, folder=place, **{key: value for key, value in given.items() if key in known}
    )


def _slurm() -> Any:
    """submitit's module of SLURM, imported without its setup of logging.

    That setup shuts down the log handlers of everybody in the process, and some of them, absl's for one, then close the
    stream they write to, be it the stderr of whoever called us.
    """
    before = os.environ.get("SUBMITIT_LOG_LEVEL")
    os.environ["SUBMITIT_LOG_LEVEL"] = "NOCONFIG"
    try:
        from submitit.slurm import slurm
    finally:
        if before is None:
            del os.environ["SUBMITIT_LOG_LEVEL"]
        else:
            os.environ["SUBMITIT_LOG_LEVEL"] = before
    return slurm


def begin_sweep(folder: Path) -> None:
    """Forget the job records of an earlier sweep with the same overrides; its finished runs stay.

    Raises:
        DataError: If the folder cannot be written.
    """
    artifacts.make_folder(folder / "jobs")
    for path in (folder / "jobs").iterdir():
        path.unlink()


def summarise_sweep(folder: Path, style: str) -> int:
    """Write ``summary.csv`` of a sweep and print it.

    Args:
        folder: The sweep's folder.
        style: Console style.

    Returns:
        Number of jobs that did not finish.
    """
    records = [json.loads(artifacts.read_text(path)) for path in sorted((folder / "jobs").glob("*.json"))]
    # A search asks for the same run again where it promises most; it counts once.
    records = list({record["folder"]: record for record in reversed(records)}.values())[::-1]
    keys = list(dict.fromkeys(word.partition("=")[0] for record in records for word in record["overrides"]))
    rows, measured = [], False
    for record in records:
        given = dict(word.partition("=")[::2] for word in record["overrides"])
        row: dict[str, Any] = {"job": record["number"]} | {key: given.get(key, "") for key in keys}
        row["status"] = record["status"]
        if record["status"].startswith("finished"):
            results = artifacts.read_results(folder / record["folder"])
            row |= {f"removed_{name}": share for name, share in results.get("achieved", {}).items()}
            audit = results.get("audit") or {"measurements": []}
            if "verdict" in audit:
                row["verdict"] = audit["verdict"]
            measured = measured or bool(results["measurements"])
            for one in [*results["measurements"], *audit["measurements"]]:
                row[f"{one['model']}_{one['name']}"] = one["value"]
        row |= {"folder": record["folder"], "message": record["message"]}
        rows.append(row)
    if any({"edited_forget_accuracy", "edited_audit_FA"} & row.keys() for row in rows):
        rows.append(_mean_row(rows))  # the literature's figures are means over the forgotten classes
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("folder", "message")))
    last = {key: "" for key in (*columns, "folder", "message")}
    artifacts.write_text(folder / "summary.csv", csv_text([last | row for row in rows]))
    console = open_console(style)
    changing = [key for key in keys if len({row.get(key) for row in rows if row["job"] != "mean"}) > 1] or keys[-1:]
    present = {column: head for column, head in _SHOWN.items() if column in columns}
    present = present or {column: column for column in [c for c in columns if c.startswith(("dense_", "pruned_"))][:6]}
    failed = [row for row in rows if row["status"] and not row["status"].startswith("finished")]
    shown = {"job": "job", **{key: key for key in changing}, **({"status": "status"} if failed else {}), **present}
    lines = [{head: _in_words(key, row.get(key, "")) for key, head in shown.items()} for row in rows]
    console.table(f"sweep of {len(records)} jobs", lines)
    for level, count in Counter(row["verdict"] for row in rows[: len(records)] if "verdict" in row).most_common():
        console.note(f"verdict of {count} jobs: {level}")
    for row in failed:
        console.warning(f"job {row['job']} {row['status']}: {row['message']}")
    finished = [folder / record["folder"] for record in records if record["status"] in kept.FINISHED]
    page = ""
    if len(finished) > 1 and measured:
        rows = write_comparison(folder, finished, f"modhifi report run={folder}")
        for found in many.findings(rows):
            console.note(found)
        page = f"; the page with figures is {folder / 'report.html'}"
    console.note(f"all numbers are in {folder / 'summary.csv'}{page}")
    console.result({"folder": str(folder), "jobs": rows})
    return len(failed)


def _in_words(key: str, value: Any) -> Any:
    """A cell of the table: shares removed in %, as everywhere else."""
    return 100 * value if key.startswith("removed_") and isinstance(value, float) else value


def _mean_row(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of every number over the finished jobs."""
    finished = [row for row in rows if row["status"].startswith("finished")]
    numbers = [key for key in finished[0] if key != "job" and isinstance(finished[0][key], float)]
    means = {key: fmean(row[key] for row in finished) for key in numbers if all(key in row for row in finished)}
    mean = {"job": "mean", "status": "", "folder": "", "message": f"over {len(finished)} jobs"} | means
    levels = Counter(row["verdict"] for row in finished if "verdict" in row)
    if levels:
        mean["verdict"] = ", ".join(f"{count} × {level}" for level, count in levels.most_common())
    return mean
