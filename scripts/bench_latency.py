"""What removed FLOPs are worth in time where people run networks: speedups by network, share, runtime and batch.

Networks have random weights, since only widths matter to the clock; every group loses the same share. Dense and pruned
networks are timed in turn in a process of the runtime's own, one thread, by the processor's clock. Every cell is kept as
a file and not measured again, so that the same command goes on where it was stopped.

    python scripts/bench_latency.py --folder outputs/bench_latency
    python scripts/bench_latency.py --folder outputs/bench_latency --networks resnet50 --round-to auto 1
    python scripts/bench_latency.py --folder outputs/bench_latency --table
    python scripts/bench_latency.py --profile mobilenet_v2 eager 1      # where the time goes, by operator
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from modhifi_cli.engine.plan import discover
from modhifi_cli.engine.rounding import channel_steps
from modhifi_cli.evaluation.latency import measure
from modhifi_cli.evaluation.latency_probe import narrowed
from modhifi_cli.evaluation.runtimes import runtime as named_runtime
from modhifi_cli.evaluation.runtimes.eager import BLOCK
from modhifi_cli.graph.counting import CostModel
from modhifi_cli.numerics.allocation import Uniform

NETWORKS = (
    "resnet18", "resnet50", "mobilenet_v2", "tf_efficientnet_lite0", "densenet121", "convnext_tiny", "vit_b_16",
)  # fmt: skip
HEAVY = ("resnet50", "densenet121", "vit_b_16")  # batches of 16 instead of 64
SHARES = (0.3, 0.5)
PROFILED = 10  # forwards of a profile, after as many to warm up


def network(name: str, pixels: int) -> nn.Module:
    """A network of torchvision, or of timm where torchvision has none of that name."""
    import timm
    import torchvision

    torch.manual_seed(0)
    if name in torchvision.models.list_models():
        sized = {"image_size": pixels} if name.startswith("vit") else {}
        return torchvision.models.get_model(name, weights=None, **sized).eval()
    size = {"img_size": pixels} if name.startswith("vit") else {}
    return timm.create_model(name, pretrained=False, **size).eval()


def pruned(dense: nn.Module, pixels: int, round_to: int | str) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """Copies without a share of the FLOPs, the same of every group, and what really went of them."""
    images = torch.randn((2, 3, pixels, pixels), generator=torch.Generator().manual_seed(0))
    _, groups, _ = discover(dense, images)
    costs = CostModel(dense, images[:1], groups)
    sizes, steps = [group.components for group in groups], channel_steps(groups, round_to, block=BLOCK)
    models, achieved = {}, {}
    for share in SHARES:
        keep = Uniform()(sizes, sizes, lambda k: costs.removed_share(k, "flops"), sparsity=share, steps=steps)
        which = f"{100 * share:.0f} %"
        models[which], achieved[which] = narrowed(dense, groups, keep).eval(), costs.removed_share(keep, "flops")
    return models, achieved


def cell(asked: argparse.Namespace, name: str, models: dict, achieved: dict, runtime: str, batch: int, round_to) -> dict:
    """Speedups of one network in one runtime at one batch."""
    example: Tensor = torch.zeros(1, 3, asked.pixels, asked.pixels)
    found = measure(
        models=models, evaluation_data=None, calibration_data=None, example=example, device=torch.device("cpu"),
        batch_size=1, progress=lambda _: None, cpu_batch=batch, iterations=asked.rounds, minimum_iterations=7, warmup=2,
        max_seconds=asked.seconds, runtimes=[runtime], threads=1,
    )  # fmt: skip
    rows = [one for one in found if one.name == "speedup"]
    return {
        "network": name, "runtime": runtime, "batch": batch, "round_to": round_to, "pixels": asked.pixels,
        "dense_ms": next(one.value for one in found if one.name == "latency_ms"),
        "rounds": rows[0].protocol["iterations"], "device": rows[0].protocol["device"],
        "speedups": {
            one.model: {"ratio": one.value, "low": one.protocol["low"], "high": one.protocol["high"],
                        "told": one.protocol["told"], "removed": achieved[one.model]}
            for one in rows
        },
    }  # fmt: skip


def table(folder: Path) -> str:
    """All cells as Markdown: a row for every network, batch and share, a column for every runtime."""
    cells = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not cells:
        return "nothing measured yet"
    runtimes = sorted({one["runtime"] for one in cells})
    keys = sorted({(str(one["round_to"]), one["network"], one["batch"], s) for one in cells for s in one["speedups"]})
    lines = [
        "| round_to | network | batch | FLOPs removed | FLOPs ratio | " + " | ".join(runtimes) + " |",
        "|---" * (5 + len(runtimes)) + "|",
    ]
    shares, slower, count = [], 0, 0
    for round_to, name, batch, which in keys:
        row, removed = [], 0.0
        for runtime in runtimes:
            here = [c for c in cells if (str(c["round_to"]), c["network"], c["batch"], c["runtime"]) ==
                    (round_to, name, batch, runtime)]  # fmt: skip
            if not here:
                row.append("")
                continue
            one = here[0]["speedups"][which]
            removed = one["removed"]
            row.append(f"{one['ratio']:.2f} ({one['low']:.2f}–{one['high']:.2f})")
            if round_to == "auto":
                shares.append(one["ratio"] * (1 - removed))
                slower += one["high"] < 1
                count += 1
        lines.append(
            f"| {round_to} | {name} | {batch} | {100 * removed:.1f} % | {1 / (1 - removed):.2f} | " + " | ".join(row) + " |"
        )
    if shares:
        lines += [
            "",
            f"round_to=auto: {count} cells; median of delivered speedup over FLOPs ratio {median(shares):.2f}; "
            f"{slower} cells slower than dense.",
        ]
    return "\n".join(lines)


def operators(model: nn.Module, runtime: str, images: Tensor, scratch: Path) -> dict[str, float]:
    """Milliseconds of one forward by kind of operator, as the runtime's own profiler tells them.

    Profilers go by the wall's clock: of every kind the quickest forward counts, which other programs held up least.
    """
    forwards: list[dict[str, float]] = []
    if runtime == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.enable_profiling = 1, True
        options.profile_file_prefix = str(scratch / "onnxruntime")
        session = onnxruntime.InferenceSession(named_runtime(runtime).pack(model, images), options)
        for _ in range(2 * PROFILED):
            session.run(None, {session.get_inputs()[0].name: images.numpy()})
        for event in sorted(json.loads(Path(session.end_profiling()).read_text()), key=lambda one: one["ts"]):
            if event["name"] == "model_run":
                forwards.append(defaultdict(float))
            elif event["cat"] == "Node" and event["name"].endswith("kernel_time"):
                forwards[-1][event["args"]["op_name"]] += event["dur"] / 1000
    else:
        run = named_runtime(runtime).program(model, images, 1)
        for _ in range(PROFILED):
            run()
        for _ in range(PROFILED):
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                run()
            forwards.append({event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()})
    return {name: min(one.get(name, 0.0) for one in forwards[-PROFILED:]) for name in forwards[-1]}


def profile(asked: argparse.Namespace) -> str:
    """Time by operator of one network, dense and pruned, as Markdown: those that take at least 2 % anywhere."""
    name, runtime, batch = asked.profile[0], asked.profile[1], int(asked.profile[2])
    dense = network(name, asked.pixels)
    narrow, _ = pruned(dense, asked.pixels, "auto")
    images = torch.randn((batch, 3, asked.pixels, asked.pixels), generator=torch.Generator().manual_seed(0))
    asked.folder.mkdir(parents=True, exist_ok=True)
    models: Mapping[str, nn.Module] = {"dense": dense, **narrow}
    found = {which: operators(model, runtime, images, asked.folder) for which, model in models.items()}
    whole = {which: sum(times.values()) for which, times in found.items()}
    shown = {op for which, times in found.items() for op, own in times.items() if own >= 0.02 * whole[which]}
    lines = [f"| {name}, {runtime}, batch {batch}: ms of a forward | " + " | ".join(models) + " |", "|---" * 4 + "|"]
    for op in sorted(shown, key=lambda op: -found["dense"].get(op, 0.0)):
        lines.append(f"| {op} | " + " | ".join(f"{found[which].get(op, 0.0):.2f}" for which in models) + " |")
    return "\n".join([*lines, "| all | " + " | ".join(f"{whole[which]:.2f}" for which in models) + " |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("outputs/bench_latency"))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino", "eager", "compile"])
    parser.add_argument("--batches", nargs="+", type=int, help="1 and 64, or 16 of heavy networks, if not given")
    parser.add_argument("--round-to", nargs="+", default=["auto"])
    parser.add_argument("--pixels", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a cell; 7 rounds at least, whatever they take")
    parser.add_argument("--table", action="store_true", help="print the table of what is there and measure nothing")
    parser.add_argument("--profile", nargs=3, metavar=("NETWORK", "RUNTIME", "BATCH"), help="time by operator instead")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.profile:
        print(profile(asked))
        return
    asked.folder.mkdir(parents=True, exist_ok=True)
    for name in () if asked.table else asked.networks:
        dense = network(name, asked.pixels)
        for round_to in (word if word == "auto" else int(word) for word in asked.round_to):
            models, achieved = {"dense": dense}, {}
            for runtime in asked.runtimes:
                for batch in asked.batches or (1, 16 if name in HEAVY else 64):
                    file = asked.folder / f"{name}_{asked.pixels}_{round_to}_{runtime}_{batch}.json"
                    if file.exists():
                        continue
                    if len(models) == 1:
                        narrow, achieved = pruned(dense, asked.pixels, round_to)
                        models |= narrow
                    found = cell(asked, name, models, achieved, runtime, batch, round_to)
                    file.write_text(json.dumps(found, indent=1))
                    print(file.name, {key: one["told"] for key, one in found["speedups"].items()}, flush=True)
    print(table(asked.folder))


if __name__ == "__main__":
    main()
