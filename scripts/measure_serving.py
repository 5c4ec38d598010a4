"""How near other programs come to a pruned decoder, and what they gain: logits, perplexity, file size, tokens a second.

    bash scripts/fetch.sh llama_cpp LIBRARIES
    MODHIFI_LLAMA_CPP=LIBRARIES python scripts/measure_serving.py WORK TEXT DENSE.gguf [RUN ...]

Without runs, two networks are cut by the size of their weights alone, without repair: an even one (hidden widths 1,216
of 1,536 in every layer) and an uneven one (another width in every layer, and a third of the heads gone in some). That is
no good pruning, but what other programs make of a network does not depend on how good it is.

For the dense network of a GGUF file and every cut one: GGUF files in f32, f16 and q8_0 are written and run in an unmodified
llama.cpp; the saved folder is opened by transformers in a process that cannot import this package, once as it is and once
quantised there by torchao (8-bit weights); all of them read the same windows of the text. Rows are kept in the folder WORK
as soon as they are known, so the same command goes on where it was ended. At the end all GGUF files are timed in turns and
removed, and one Markdown table goes to standard output.
"""

import contextlib
import copy
import functools
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
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

WINDOWS, LENGTH, PROMPT, SAID, ROUNDS = 8, 256, 64, 32, 3
_STRANGER = """
import sys; sys.modules["modhifi_cli"] = None
import numpy, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype="float32").eval()
if sys.argv[4] == "torchao":
    from torchao.quantization import Int8WeightOnlyConfig, quantize_
    quantize_(model, Int8WeightOnlyConfig())
ids = torch.from_numpy(numpy.load(sys.argv[2]))
with torch.inference_mode():
    numpy.save(sys.argv[3], torch.cat([model(input_ids=row[None]).logits for row in ids]).float().numpy())
"""


def perplexity(logits: numpy.ndarray, ids: numpy.ndarray) -> float:
    """Of every token but the first of each window."""
    told = torch.log_softmax(torch.from_numpy(logits[:, :-1]).double(), -1)
    return math.exp(-float(told.gather(-1, torch.from_numpy(ids[:, 1:, None])).mean()))


def speed(files: list[Path]) -> dict[str, tuple[float, float]]:
    """Tokens a second of llama.cpp with one thread, by name of the file: reading a prompt, and writing token after token.

    The files take turns, so that what else the machine does meets all of them; the best of all rounds.
    """
    prompt = list(range(100, 100 + PROMPT))
    took: dict[str, list[tuple[float, float]]] = {file.name: [] for file in files}
    for _ in range(ROUNDS):
        for file in files:
            with contextlib.closing(Llama(file, length=PROMPT + SAID)) as llama:
                llama.logits(prompt[:8])  # the file's pages are read at first use
                begun = time.perf_counter()
                llama.logits(prompt)
                read = time.perf_counter() - begun
                begun = time.perf_counter()
                llama.follow(prompt, SAID)
                took[file.name].append((read, time.perf_counter() - begun - read))
    return {
        name: (PROMPT / min(read for read, _ in all_), SAID / max(min(said for _, said in all_), 1e-9))
        for name, all_ in took.items()
    }


def measure(name: str, load, folder: Path | None, ids: numpy.ndarray, work: Path) -> list[dict[str, str]]:
    """Rows of the network that `load` gives; each is kept in `work`, and its GGUF files stay there."""
    place = work / f"{name}.npy"

    @functools.cache
    def ours() -> numpy.ndarray:
        if not place.is_file():
            with torch.inference_mode():
                found = [load().model(input_ids=torch.from_numpy(row)[None]).logits for row in ids]
            numpy.save(work / "new.npy", torch.cat(found).float().numpy())
            (work / "new.npy").replace(place)
        return numpy.load(place)

    rows: list[dict[str, str]] = []

    def row(key: str, make: Callable[[], tuple[str, numpy.ndarray, dict[str, str]]]) -> None:
        told = work / f"{name}-{key}.json"
        if not told.is_file():
            where, found, more = make()
            same, off = float((found.argmax(-1) == ours().argmax(-1)).mean()), float(numpy.abs(found - ours()).max())
            near = f"{100 * same:.2f} % (largest difference {off:.2g} of {numpy.abs(ours()).max():.3g})"
            one = {"network": name, "in": where, "perplexity": f"{perplexity(found, ids):.3f}", "argmax as ours": near} | more
            told.write_text(json.dumps(one))
            print(one, file=sys.stderr, flush=True)
        rows.append(json.loads(told.read_text()))

    def in_ours():
        parameters = sum(p.numel() for p in load().model.parameters())
        told = {"argmax as ours": "", "MB": f"{4 * parameters / 1e6:.1f}", "parameters": f"{parameters:,}"}
        return "modhifi, PyTorch f32", ours(), told

    def in_transformers(way: str, words: str):
        by = json.loads((folder / "architecture.json").read_text())["opens"]["by"]
        script = [sys.executable, "-c", _STRANGER, str(folder), str(work / "ids.npy"), str(work / "out.npy"), way]
        subprocess.run(script, check=True)
        return f"{by}, {words}", numpy.load(work / "out.npy"), {}

    def in_llama(kind: str):
        path = work / f"{name}-{kind}.gguf"
        report = Gguf(type=kind)(load(), example=torch.zeros(1, 4), path=path, facts={})
        with contextlib.closing(Llama(path, length=LENGTH)) as llama:
            found = numpy.stack([llama.logits(row_.tolist()) for row_ in ids])
        where = f"llama.cpp {kind}, {report.runtime.split('architecture ')[1].split(',')[0]}"
        return where, found, {"MB": f"{report.bytes / 1e6:.1f}", "file": path.name}

    row("ours", in_ours)
    if folder is not None:
        row("transformers", lambda: in_transformers("plain", "f32"))
    for kind in ("f32", "f16", "q8_0"):
        row(kind, lambda kind=kind: in_llama(kind))
    if folder is not None:
        row("torchao", lambda: in_transformers("torchao", "torchao int8 weights"))
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


def main(folder: str, text: str, dense: str, *runs: str) -> None:
    """Measure the dense network and the runs, and print the table."""
    required()
    work = Path(folder)
    work.mkdir(parents=True, exist_ok=True)
    load = functools.cache(lambda: hf.load(gguf=dense, name="dense"))
    if not (work / "ids.npy").is_file():
        words = load().preprocess.tokenizer(Path(text).read_text(encoding="utf-8")[: 20 * WINDOWS * LENGTH])["input_ids"]
        numpy.save(work / "ids.npy", numpy.array(words[: WINDOWS * LENGTH], dtype=numpy.int64).reshape(WINDOWS, LENGTH))
    ids = numpy.load(work / "ids.npy")
    rows = measure("dense", load, None, ids, work)
    for number, run in enumerate(runs or ("even", "uneven")):
        there = Path(run) if runs else work / run
        if not runs and not (there / "model" / "architecture.json").is_file():
            cut(load(), there, even=run == "even")
        name = f"{'even' if artifacts.opens_natively(there) else 'uneven'}-{number}"
        saved = functools.cache(functools.partial(artifacts.load_saved, there))
        rows += measure(name, saved, there / "model", ids, work)
    files = [work / row["file"] for row in rows if "file" in row]
    for name, (read, said) in speed(files).items():
        (row,) = [row for row in rows if row.get("file") == name]
        row |= {"prompt tok/s": f"{read:.0f}", "tok/s": f"{said:.1f}"}
    head = ["network", "in", "parameters", "perplexity", "argmax as ours", "MB", "prompt tok/s", "tok/s"]
    print(f"{WINDOWS} windows of {LENGTH} tokens of {Path(text).name}; one thread; tokens a second: best of {ROUNDS}\n")
    print("\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]))
    for one in rows:
        print("| " + " | ".join(one.get(key, "") for key in head) + " |")
    for file in (*files, *work.glob("*.npy"), *work.glob("*-*.json")):
        file.unlink()


if __name__ == "__main__":
    main(*sys.argv[1:])
