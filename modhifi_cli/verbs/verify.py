"""`modhifi verify`: reload a saved run in a fresh process and compare its logits; of decoders its words, too."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import DataError, NumericsError
from modhifi_cli.files import artifacts
from modhifi_cli.verbs.opened import open_run

_OURS = "import sys; from modhifi_cli.files.artifacts import answer_process; sys.exit(answer_process(*sys.argv[1:]))"
# Nothing of this package: what a stranger would type.
_PLAIN = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/model", trust_remote_code=False).eval()
inputs = load_file(sys.argv[1] + "/verification.safetensors")["inputs"]
with torch.inference_mode():
    logits = model(input_ids=inputs, use_cache=False).logits
    count = int(sys.argv[3])
    longer = model.generate(inputs[:1], attention_mask=torch.ones_like(inputs[:1]), max_new_tokens=count,
                            min_new_tokens=count, do_sample=False, pad_token_id=0, eos_token_id=None)
save_file({"logits": logits.contiguous(), "continuation": longer[:, inputs.shape[1]:].contiguous()}, sys.argv[2])
"""


def verify(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> None:
    opened = open_run(settings, console)
    saved = opened.folder
    files = artifacts.checked(saved, unverified=opened.unverified)
    files.check()
    strangers = files.strangers()
    if strangers:
        more = f" and {len(strangers) - 1} more" if len(strangers) > 1 else ""
        console.note(f"{strangers[0]}{more}: not written with the run, and not looked at")
    stored = artifacts.stored_answers(saved, unverified=opened.unverified)
    inputs, logits = stored["inputs"], stored["logits"]
    said = tuple(word for word, given in (("allow", opened.trust), ("unverified", opened.unverified)) if given)
    readers: dict[str, tuple[str, tuple[str, ...]]] = {"modhifi": (_OURS, said)}
    if "continuation" in stored and artifacts.opens_natively(saved):
        readers["transformers alone"] = (_PLAIN, (str(stored["continuation"].shape[1]),))
    told: dict[str, Any] = {"run": str(saved), "files": len(files.digests or ()), "not_listed": strangers}
    for reader, (script, more_words) in readers.items():
        again = _answers(saved, script, more_words)
        found = again["logits"]
        if found.shape != logits.shape:
            raise DataError(
                f"run={saved}: expected logits {tuple(logits.shape)}, got {tuple(found.shape)}; it is damaged."
            )
        difference, scale = float((found - logits).abs().max()), float(logits.abs().max())
        if not difference <= settings["tolerance"] * scale:
            raise NumericsError(
                f"run={saved}: the reloaded network differs from the saved logits by {difference:.3g} (largest logit "
                f"{scale:.3g}, tolerance {settings['tolerance']:g} of it); the saved network is damaged, run again."
            )
        if "continuation" in stored and not bool((again["continuation"] == stored["continuation"]).all()):
            raise NumericsError(
                f"run={saved}: the reloaded network continues a text with other tokens than when it was saved; "
                "it is damaged, run again."
            )
        told |= {"largest_difference": max(difference, told.get("largest_difference", 0.0)), "largest_logit": scale}
        text = "" if "continuation" not in stored else f", {stored['continuation'].shape[1]} greedy tokens are the same"
        console.note(
            f"{saved}: reloaded in a fresh process{' with ' + reader if len(readers) > 1 else ''}; logits of "
            f"{inputs.shape[0]} inputs agree (largest difference {difference:.3g}, largest logit {scale:.3g}){text}"
        )
    if files.digests is not None:
        console.note(f"{len(files.digests)} files have the checksums that were written with the run")
    told["readers"] = list(readers)
    console.result(told)


def _answers(saved: Path, script: str, more: tuple[str, ...]) -> dict[str, Any]:
    """What a fresh process makes of the stored inputs with the saved network."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "answer.safetensors"
        process = subprocess.run(
            [sys.executable, "-c", script, str(saved), str(path), *more], capture_output=True, text=True, check=False
        )
        if process.returncode != 0:
            last = (process.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise DataError(f"run={saved}: the saved network cannot be loaded in a fresh process: {last}")
        return artifacts.read_answer(path)
