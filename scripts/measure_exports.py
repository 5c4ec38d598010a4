"""Whether every named network for images opens elsewhere once it is pruned, and how near the logits come.

    python scripts/measure_exports.py ROWS.jsonl [NAME ...]

Each network of `configs/model/` that comes with its sizes is drawn at random, loses 30 % of its FLOPs (preset=fast, eight
images of noise), and is written as ONNX, as a torch.export program and as a plain folder. ONNX Runtime, OpenVINO and a
loaded program read batches of 1, 3 and 64; the largest difference stands beside the largest logit. Images are 64 pixels
wide (CIFAR's 32, the digits' 8): the layers are those of the full size, and a batch of 64 ends on a small machine.

A row is added to ROWS.jsonl as soon as it is known, and networks that are there already are left out; the whole table
is printed as Markdown at the end.
"""

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import modhifi_cli  # noqa: E402
from modhifi_cli.errors import ModHiFiError  # noqa: E402
from modhifi_cli.files.exports import onnx, torch_export  # noqa: E402
from modhifi_cli.files.exports.onnx import Onnx  # noqa: E402
from modhifi_cli.settings import config  # noqa: E402

BATCHES, SIDE = (1, 3, 64), 64
_SIZED = {"vit_b_16": {"image_size": SIDE}, "dinov2_vits14": {"img_size": 56}}  # networks built for one size of image
_OWN = ("_cifar", "embedded", "vit_digits")  # small already
_NEED_A_NAME = ("hf", "hf_vision", "module", "run", "timm", "torchvision")


def named() -> list[str]:
    """Configurations of networks for images, by name."""
    found = []
    for file in sorted((ROOT / "configs" / "model").glob("*.yaml")):
        target = yaml.safe_load(file.read_text())["_target_"]
        if file.stem not in _NEED_A_NAME and ".models.hf." not in target:
            found.append(file.stem)
    return found


def loaded(name: str):
    """A network drawn at random, for small images."""
    node = yaml.safe_load((ROOT / "configs" / "model" / f"{name}.yaml").read_text())
    node["weights"] = "random"
    if not any(word in name for word in _OWN):
        options = _SIZED.get(name, {"img_size": SIDE} if name.startswith("deit") else None)
        side = next(iter(options.values())) if options else SIDE
        node |= {"preprocess": {"size": side, "resize": side}} | ({"options": options} if options else {})
    return config.build(node)


def measure(name: str) -> dict[str, object]:
    """One row: parameters, and the largest difference as a share of the largest logit by runtime."""
    begun = time.perf_counter()
    dense = loaded(name)
    head = [module for module in dense.model.modules() if isinstance(module, torch.nn.Linear)][-1]
    if not head.weight.any():  # torchvision's ViTs begin with a head of zeros, and all their logits are 0
        torch.nn.init.normal_(head.weight, std=0.02)
    size = (len(dense.preprocess.mean), *dense.preprocess.size)
    drawn = torch.Generator().manual_seed(0)
    noise = torch.randn(max(BATCHES), *size, generator=drawn)
    small, _ = modhifi_cli.prune(dense.model, noise[:8], sparsity=0.3, preset="fast", check_data=False)
    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense.model, small))
    row: dict[str, object] = {"network": name, "pixels": size[1], "parameters": before, "pruned": after}
    pruned = dataclasses.replace(dense, model=small.eval())
    with tempfile.TemporaryDirectory() as place, torch.inference_mode():
        folder = Path(place)
        file = Onnx(runtimes=("onnxruntime", "openvino"))(pruned, example=noise[:1], path=folder, facts={}).path
        program = torch_export.TorchExport()(pruned, example=noise[:1], path=folder, facts={}).path
        readers = {
            "ONNX Runtime": lambda images: onnx._in_onnxruntime(file, images),
            "OpenVINO": lambda images: onnx._in_openvino(file, images),
            "torch.export": lambda images: torch_export.run(program, images),
        }
        for batch in BATCHES:
            wanted = small(noise[:batch])
            for reader, run in readers.items():
                off = float((run(noise[:batch]) - wanted).abs().max() / wanted.abs().max())
                row[f"{reader}, {batch}"] = off
    return row | {"seconds": round(time.perf_counter() - begun, 1)}


def table(rows: list[dict[str, object]]) -> str:
    """Markdown; the worst of the batches for each runtime."""
    lines = ["| network | pixels | parameters | pruned | ONNX Runtime | OpenVINO | torch.export |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['network']} | {row['error']} | | | | | |")
            continue
        worst = (max(float(row[f"{reader}, {batch}"]) for batch in BATCHES)
                 for reader in ("ONNX Runtime", "OpenVINO", "torch.export"))  # fmt: skip
        lines.append(
            f"| {row['network']} | {row['pixels']} | {row['parameters']:,} | {row['pruned']:,} | "
            + " | ".join(f"{one:.1e}" for one in worst) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def main(file: str, *names: str) -> None:
    """Measure what is missing, and print all rows."""
    place = Path(file)
    rows = [json.loads(line) for line in place.read_text().splitlines()] if place.is_file() else []
    for name in names or named():
        if any(row["network"] == name for row in rows):
            continue
        try:
            row = measure(name)
        except ModHiFiError as error:
            row = {"network": name, "error": " ".join(str(error).split())}
        rows.append(row)
        with place.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row) + "\n")
        print(json.dumps(row), file=sys.stderr, flush=True)
    print(table(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
