"""Do fewer FLOPs take less time here? Dense and narrowed networks of random weights, interleaved in one process.

    python scripts/bench_latency.py                                     # five networks, eager, batches of 1 and 64
    python scripts/bench_latency.py --networks mobilenet_v2 --compile   # compiled as well (needs a C++ compiler)
    python scripts/bench_latency.py --size 224 --seconds 120

Every group keeps the same share of its components, so that the widths are those of a uniform allocation, with and
without rounding to multiples of 8. Times are medians over rounds that each time every network once; only their ratios
within a run mean anything on a machine that does other work, too.
"""

import argparse
import os
import shutil

import torch

from modhifi_cli.engine.plan import discover
from modhifi_cli.evaluation import latency
from modhifi_cli.evaluation.latency_probe import narrowed
from modhifi_cli.graph.counting import CostModel
from modhifi_cli.models import timm, torchvision
from modhifi_cli.numerics.allocation import Uniform

NETWORKS = ("resnet50", "vgg16_bn", "mobilenet_v2", "tf_efficientnet_lite0", "densenet121")
SHARES = (0.3, 0.5)
STEPS = (1, 8)


def rows(name: str, *, size: int, seconds: float, batches: list[int], engines: list[str]) -> list[list[str]]:
    """One row for each batch and engine: milliseconds of the dense network, and how much time each cut saves."""
    library = timm if name.startswith("tf_") else torchvision
    model = library.load(name=name, weights="random").model
    example = torch.randn(2, 3, size, size)
    _, groups, _ = discover(model, example)
    costs = CostModel(model, example[:1], groups)
    sizes = [group.components for group in groups]
    models = {"dense": model}
    reached = []
    for share in SHARES:
        for step in STEPS:
            keep = Uniform()(sizes, sizes, lambda k: costs.removed_share(k, "flops"), sparsity=share, step=step)
            models[f"{share} by {step}"] = narrowed(model, groups, keep).eval()
            reached.append(f"{100 * costs.removed_share(keep, 'flops'):.0f} %")
    table = []
    for engine in engines:
        for batch in batches:
            found = latency.measure(
                models=models, evaluation_data=None, calibration_data=None, example=example[:1],
                device=torch.device("cpu"), batch_size=1, progress=lambda step: None, cpu_batch=batch, iterations=50,
                max_seconds=seconds, compile=engine,
            )  # fmt: skip
            dense = next(m.value for m in found if m.name == "latency_median_ms" and m.model == "dense")
            saved = [f"{100 * (1 - 1 / m.value):.0f} %" for m in found if m.name == "speedup"]
            protocol = found[0].protocol
            told = {"none": "eager", "compile": "compiled"}[engine]
            table.append([name, told, str(batch), f"{dense:.1f}", *saved, str(protocol["iterations"])])
            print("| " + " | ".join(table[-1]) + " |", flush=True)
    print(f"(FLOPs removed of {name}: {', '.join(reached)}; load {os.getloadavg()[0]:.1f})", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each network, batch and engine")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    engines = ["none"]
    if arguments.compile and shutil.which("g++") is None and shutil.which("clang++") is None:
        print("no C++ compiler (g++ or clang++) is installed, and torch.compile needs one: eager only")
    elif arguments.compile:
        engines.append("compile")
    names = [f"{share} by {step}" for share in SHARES for step in STEPS]
    print(f"| network at {arguments.size} px | engine | batch | dense, ms | {' | '.join(names)} | rounds |")
    print("|---|---|---|---|" + "---|" * (len(names) + 1), flush=True)
    for name in arguments.networks:
        rows(name, size=arguments.size, seconds=arguments.seconds, batches=arguments.batches, engines=engines)


if __name__ == "__main__":
    main()
