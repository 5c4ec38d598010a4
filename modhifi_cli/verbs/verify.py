"""`modhifi verify`: reload a saved run in a fresh process and compare its logits."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli import artifacts
from modhifi_cli.console import Console
from modhifi_cli.errors import DataError, NumericsError


def verify(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    saved = artifacts.run_folder(settings["run"])
    inputs, logits = artifacts.load_verification(saved)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "answer.safetensors"
        script = "import sys; from modhifi_cli.artifacts import answer_process; sys.exit(answer_process(*sys.argv[1:]))"
        process = subprocess.run(
            [sys.executable, "-c", script, str(saved), str(path)], capture_output=True, text=True, check=False
        )
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DataError(f"run={saved}: the saved network cannot be loaded in a fresh process: {last}")
        again = artifacts.read_answer(path)
    if again.shape != logits.shape:
        raise DataError(f"run={saved}: expected logits {tuple(logits.shape)}, got {tuple(again.shape)}; it is damaged.")
    difference, scale = float((again - logits).abs().max()), float(logits.abs().max())
    facts_out = {"run": str(saved), "largest_difference": difference, "largest_logit": scale}
    if not difference <= settings["tolerance"] * scale:
        raise NumericsError(
            f"run={saved}: the reloaded network differs from the saved logits by {difference:.3g} (largest logit "
            f"{scale:.3g}, tolerance {settings['tolerance']:g} of it); the saved network is damaged, run again."
        )
    console.note(
        f"{saved}: reloaded in a fresh process; logits of {inputs.shape[0]} inputs agree "
        f"(largest difference {difference:.3g}, largest logit {scale:.3g})"
    )
    console.result(facts_out)
