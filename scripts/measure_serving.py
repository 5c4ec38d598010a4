"""How near other programs come to a pruned decoder, and what they gain: logits, perplexity, file size, tokens a second.

    bash scripts/fetch.sh llama_cpp LIBRARIES
    MODHIFI_LLAMA_CPP=LIBRARIES python scripts/measure_serving.py TEXT DENSE.gguf [RUN ...]

Without runs, two networks are cut by the size of their weights alone, without repair: an even one (hidden widths 1,216
of 1,536 in every layer) and an uneven one (another width in every layer, and a third of the heads gone in some). That is
no good pruning, but what other programs make of a network does not depend on how good it is.

For the dense network of a GGUF file and every cut one: GGUF files in f32, f16 and q8_0 are written and run in an unmodified
llama.cpp; the saved folder is opened by transformers in a process that cannot import this package; all of them read the
same windows of the text. One Markdown table goes to standard output.
"""

import contextlib
import copy
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from modhifi_cli.files import artifacts  # noqa: E402
from modhifi_cli.files.exports.gguf import Gguf  # noqa: E402
from modhifi_cli.graph.components import Layout  # noqa: E402
from modhifi_cli.graph.decoder import find_parts, slice_part_  # noqa: E402
from modhifi_cli.models import hf  # noqa: E402
from tests.foreign.llama_cpp import Llama, required  # noqa: E402

WINDOWS, LENGTH, PROMPT, SAID = 8, 256, 64, 32
_STRANGER = """
import sys; sys.modules["modhifi_cli"] = None
import numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.inference_mode():
    numpy.save(sys.argv[3], torch.cat([model(input_ids=row[None]).logits for row in ids]).float().numpy())
"""


def perplexity(logits: numpy.ndarray, ids: numpy.ndarray) -> float:
    """Of every token but the first of each window."""
    told = torch.log_softmax(torch.from_numpy(logits[:, :-1]).double(), -1)
    return math.exp(-float(told.gather(-1, torch.from_numpy(ids[:, 1:, None])).mean()))


def speed(file: Path) -> tuple[float, float]:
    """Tokens a second of llama.cpp with one thread, reading a prompt and writing one token after another; best of 2."""
    read, written = [], []
    with contextlib.closing(Llama(file, length=PROMPT + SAID)) as llama:
        prompt = list(range(100, 100 + PROMPT))
        for _ in range(2):
            begun = time.perf_counter()
            llama.logits(prompt)
            read.append(time.perf_counter() - begun)
            begun = time.perf_counter()
            llama.follow(prompt, SAID)
            written.append(time.perf_counter() - begun - read[-1])
    return PROMPT / min(read), SAID / max(min(written), 1e-9)


def measure(name: str, loaded, folder: Path | None, ids: numpy.ndarray, work: Path) -> list[dict[str, str]]:
    """Rows of one network."""
    with torch.inference_mode():
        ours = torch.cat([loaded.model(input_ids=torch.from_numpy(row)[None]).logits for row in ids]).float().numpy()
    parameters = sum(p.numel() for p in loaded.model.parameters())
    rows = [{"network": name, "in": "modhifi, PyTorch f32", "perplexity": f"{perplexity(ours, ids):.3f}",
             "argmax as ours": "", "MB": "", "prompt tok/s": "", "tok/s": "", "parameters": f"{parameters:,}"}]  # fmt: skip

    def row(where: str, found: numpy.ndarray, **more: str) -> None:
        same = float((found.argmax(-1) == ours.argmax(-1)).mean())
        off = float(numpy.abs(found - ours).max())
        rows.append({"network": name, "in": where, "perplexity": f"{perplexity(found, ids):.3f}",
                     "argmax as ours": f"{100 * same:.2f} % (largest difference {off:.2g} of {numpy.abs(ours).max():.3g})",
                     "MB": "", "prompt tok/s": "", "tok/s": "", "parameters": ""} | more)  # fmt: skip

    if folder is not None:
        numpy.save(work / "ids.npy", ids)
        subprocess.run(
            [sys.executable, "-c", _STRANGER, str(folder), str(work / "ids.npy"), str(work / "out.npy")], check=True
        )
        by = json.loads((folder / "architecture.json").read_text())["opens"]["by"]
        row(by, numpy.load(work / "out.npy"))
    for kind in ("f32", "f16", "q8_0"):
        path = work / f"{name}-{kind}.gguf"
        report = Gguf(type=kind)(loaded, example=torch.zeros(1, 4), path=path, facts={})
        with contextlib.closing(Llama(path, length=LENGTH)) as llama:
            found = numpy.stack([llama.logits(row_.tolist()) for row_ in ids])
        prompt, said = speed(path)
        print(name, kind, "done", file=sys.stderr)
        row(f"llama.cpp {kind}, {report.runtime.split('architecture ')[1].split(',')[0]}", found,
            MB=f"{report.bytes / 1e6:.1f}", **{"prompt tok/s": f"{prompt:.0f}", "tok/s": f"{said:.1f}"})  # fmt: skip
        path.unlink()
    return rows


def cut(loaded, folder: Path, *, even: bool) -> Path:
    """A network cut by the size of its weights, saved."""
    model = copy.deepcopy(loaded.model)
    for part in find_parts(model).parts:
        weight = model.get_submodule(part.consumer.module).weight
        size = weight.square().sum(0).reshape(part.components, -1).sum(1)
        keep = part.components
        if part.kind == "mlp":
            keep = 1216 if even else 1504 - 32 * (7 * part.layer % 19)
        elif not even and part.layer % 5 == 2:
            keep = part.components * 2 // 3
        if keep < part.components:
            slice_part_(model, Layout(model, [part.group]), part, keep_largest(size, keep, part.balanced))
    artifacts.save_model(folder / "model", loaded, model)
    return folder


def keep_largest(size: torch.Tensor, keep: int, runs: int) -> torch.Tensor:
    """The same number of the largest in each of so many equal runs, sorted."""
    each = size.reshape(runs, -1).topk(keep // runs, dim=1).indices
    return (each + torch.arange(runs)[:, None] * (len(size) // runs)).flatten().sort().values


def main(text: str, dense: str, *runs: str) -> None:
    """Measure the dense network and the runs, and print the table."""
    required()
    loaded = hf.load(gguf=dense, name="dense")
    words = loaded.preprocess.tokenizer(Path(text).read_text(encoding="utf-8")[: 20 * WINDOWS * LENGTH])["input_ids"]
    ids = numpy.array(words[: WINDOWS * LENGTH], dtype=numpy.int64).reshape(WINDOWS, LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure("dense", loaded, None, ids, Path(folder))
        cuts = {kind: Path(folder) / kind for kind in ("even", "uneven")}
        for number, run in enumerate(runs or [cut(loaded, there, even=kind == "even") for kind, there in cuts.items()]):
            saved = artifacts.load_saved(run)
            kind = "even" if artifacts.opens_natively(Path(run)) else "uneven"
            rows += measure(f"{kind}-{number}", saved, Path(run) / "model", ids, Path(folder))
    head = list(rows[0])
    print(f"{WINDOWS} windows of {LENGTH} tokens of {Path(text).name}; one thread; tokens a second: best of 2\n")
    print("\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]))
    for one in rows:
        print("| " + " | ".join(one[key] for key in head) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
