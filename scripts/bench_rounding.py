"""What rounding widths costs in accuracy at equal FLOPs, and whether asked shares of time are reached in a runtime.

Every run is one `modhifi prune` with its folder under --folder; a finished one is not made again, so that the same
command goes on where it was stopped. Real weights and images are those of MODHIFI_TEST_DATA (weights/, cifar10/,
imagenet500/, imagenet_calibration256/).

    MODHIFI_TEST_DATA=FOLDER python scripts/bench_rounding.py accuracy --folder outputs/bench_rounding
    MODHIFI_TEST_DATA=FOLDER python scripts/bench_rounding.py time --folder outputs/bench_rounding --serve onnxruntime
"""

import argparse
import itertools
import json
import os
from pathlib import Path

from modhifi_cli.cli import main as modhifi

DATA = Path(os.environ.get("MODHIFI_TEST_DATA", "../shared/data"))


def words_of(network: str, images: int, tested: int) -> list[str]:
    """Model, calibration and test images of a network by name."""
    if network == "embedded":
        return [f"data.num_samples={images}"]
    if network.startswith("resnet"):
        words = [f"model={network}_cifar", f"model.weights={DATA}/weights/cifar10_{network}.safetensors"]
        places = ("data=arrays", f"{DATA}/cifar10/train_10000.npz", "arrays", f"{DATA}/cifar10/test.npz")
    else:
        weights = os.environ.get("WEIGHTS", f"{DATA}/weights/efficientnet-lite0-57934424.pth")
        words = [f"model={network}", f"model.weights={weights}", "runtime.batch_size=32"]
        places = ("data=folder", f"{DATA}/imagenet_calibration256", "folder", f"{DATA}/imagenet500")
    source, path, kind, tests = places
    return [
        *words, source, f"data.path={path}", f"data.num_samples={images}", f"evaluation_data={kind}",
        f"evaluation_data.path={tests}", f"evaluation_data.num_samples={tested}",
    ]  # fmt: skip


def result(folder: Path, words: list[str]) -> dict:
    """Results of a run, made if it is not there yet."""
    if not list(folder.glob("prune/*/*/results.json")):
        begun = [f"resume={path}" for path in sorted(folder.glob("prune/*/*.incomplete"))[-1:]]
        code = modhifi(["prune", *words, "console=plain", "runtime.threads=1", f"output_dir={folder}", *begun])
        if code != 0:
            raise SystemExit(code)
    (found,) = folder.glob("prune/*/*/results.json")
    return json.loads(found.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["accuracy", "time"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56", "efficientnet_lite0"])
    parser.add_argument("--shares", nargs="+", type=float, default=None)
    parser.add_argument("--draws", nargs="+", type=int, default=[0], help="seeds of the calibration images' draw")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--tested", type=int, default=1000)
    parser.add_argument("--preset", default="best")
    parser.add_argument("--serve", default="onnxruntime")
    parser.add_argument("--seconds", type=float, default=60.0)
    asked = parser.parse_args()
    lines = []
    for network in asked.networks:
        words = [*words_of(network, asked.images, asked.tested), f"preset={asked.preset}"]
        if asked.what == "accuracy":
            for share in asked.shares or [0.2]:
                for round_to, draw in itertools.product(("1", "auto"), asked.draws):
                    name = f"accuracy_{network}_{share}_{round_to}_{asked.preset}_{asked.images}_{draw}"
                    own = ["target=flops", f"sparsity={share}", f"round_to={round_to}", "evaluation=[top1]"]
                    found = result(asked.folder / name, [*words, *own, f"data.seed={draw}"])
                    top1 = {m["model"]: m["value"] for m in found["measurements"] if m["name"] == "top1"}
                    shown = f"{100 * found['achieved']['flops']:.1f} % | {top1['dense']:.2f} | {top1['pruned']:.2f} |"
                    lines.append(f"| {network} | {round_to} | {draw} | {shown}")
        else:
            for share in asked.shares or [0.2, 0.4, 0.6]:
                name = f"time_{network}_{share}_{asked.serve}"
                own = [
                    "target=latency", f"sparsity={share}", f"runtime.serve={asked.serve}", "evaluation=[top1]",
                    f"target.max_seconds={asked.seconds}", "target.batch_size=16",
                ]  # fmt: skip
                found = result(asked.folder / name, [*words, *own])
                time = found["latency"]
                lines.append(
                    f"| {network} | {100 * share:.0f} % | {100 * time['predicted']:.1f} % | {100 * time['measured']:.1f} % "
                    f"({100 * time['p10']:.1f}–{100 * time['p90']:.1f}) | {100 * found['achieved']['flops']:.1f} % |"
                )
    head = {
        "accuracy": ("network", "round_to", "draw", "FLOPs removed", "dense top-1, %", "pruned top-1, %"),
        "time": ("network", "asked", "predicted", "measured (80 % of rounds)", "FLOPs removed"),
    }[asked.what]
    print("\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines]))


if __name__ == "__main__":
    main()
