"""Cost of a pruning run by stage: processor time as multiples of one plain forward over the same images, and peak memory.

    python scripts/bench_stages.py                          # ResNet-56 at 32 px and ResNet-50 at 224 px, random weights
    python scripts/bench_stages.py --model resnet50 --images 64 --positions 49
    python scripts/bench_stages.py --model resnet50 --images 128 --preset best
    python scripts/bench_stages.py --model smollm2_135m --images 24 --length 512 --sparsity 0.3    # a language model

One process per network, since memory is measured on the process. Times are processor time of the process, all threads
together, and are compared within one run: quote the ratios. Weights and images are random, which changes what is
kept and not what it costs. Solver time (scores, selection, repair) is a line of its own.
"""

import argparse
import copy
import functools
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

CASES = (
    {"model": "resnet56_cifar", "images": 1024, "batch": 128, "positions": 0},
    {"model": "resnet56_cifar", "images": 1024, "batch": 128, "positions": 64},
    {"model": "resnet50", "images": 256, "batch": 32, "positions": 0},
    {"model": "resnet50", "images": 256, "batch": 32, "positions": 49},
)


STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")


class Clock:
    """Processor seconds by stage, nested stages counted apart, and the largest resident memory seen in each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.peak: dict[str, float] = defaultdict(float)
        self._stack: list[list] = []
        self._stop = False
        threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.process_time()
        self._stack.append([name, 0.0])
        try:
            yield
        finally:
            spent = time.process_time() - started
            self.seconds[name] += spent - self._stack.pop()[1]
            if self._stack:
                self._stack[-1][1] += spent

    def timed(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def wrapped(*arguments, **settings):
            with self.stage(name):
                return function(*arguments, **settings)

        return wrapped

    def _watch(self) -> None:
        while not self._stop:
            gigabytes = resident_gigabytes()
            name = self._stack[-1][0] if self._stack else "other"
            self.peak[name] = max(self.peak[name], gigabytes)
            time.sleep(0.02)


def resident_gigabytes() -> float:
    """Resident memory of this process in 10⁹ bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


class RandomImages:
    """Seeded noise images, made when asked for."""

    def __init__(self, count: int, size: int) -> None:
        import torch

        self.images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.protocol = {}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple]:
        for batch in self.images.split(batch_size):
            yield batch, None


def forward_seconds(forward: Callable, source, batch: int) -> float:
    """Processor seconds of one plain forward over all samples.

    It is measured before the run and after it: other programs slow the processor down, and not always alike.
    """
    import torch

    with torch.no_grad():
        forward(next(source.batches(batch))[0])
        started = time.process_time()
        for inputs, _ in source.batches(batch):
            forward(inputs)
    return time.process_time() - started


def measure(
    model_name: str, images: int, batch: int, positions: int, sparsity: float, carry: float, preset: str, pixels: int
) -> None:
    """Print the table of one network. Runs in a process of its own."""
    import torch

    from modhifi_cli.engine import curves, image_walk
    from modhifi_cli.engine import dense as dense_reference
    from modhifi_cli.engine.gathering import Gathering
    from modhifi_cli.engine.prune import prune_
    from modhifi_cli.engine.walk import Budget, Recipe
    from modhifi_cli.graph.segments import Segments
    from modhifi_cli.numerics import moments
    from modhifi_cli.numerics.batchnorm import BatchNormMoments
    from modhifi_cli.numerics.cross import CrossMoments
    from modhifi_cli.records import Edit
    from modhifi_cli.settings import config

    steps = config.compose("prune", [f"preset={preset}"])
    if model_name.endswith("_cifar"):
        from modhifi_cli.models.cifar_resnet import load

        size = 32
    else:
        from modhifi_cli.models.torchvision import load

        size = pixels
    model = load(name=model_name, weights="random", seed=0).model
    source = RandomImages(images, size)
    dense = copy.deepcopy(model)
    forward = forward_seconds(dense, source, batch)
    before = resident_gigabytes()

    time.perf_counter = time.process_time  # what edits say of their seconds, on the same clock
    clock = Clock()
    image_walk.discover = clock.timed("groups and law", image_walk.discover)
    Segments.run = clock.timed("forwards", Segments.run)
    BatchNormMoments.update = clock.timed("BatchNorm moments", BatchNormMoments.update)
    moments.ConvMoments.update = clock.timed("second moments", moments.ConvMoments.update)
    moments.RowMoments.update = clock.timed("second moments", moments.RowMoments.update)
    CrossMoments.update = clock.timed("cross moments with the dense outputs", CrossMoments.update)
    dense_reference._solve_ = clock.timed("solver towards the dense network", dense_reference._solve_)
    curves.elimination = clock.timed("error curves: elimination", curves.elimination)
    solving = 0.0
    started = time.process_time()
    with clock.stage("rest"):
        gathering = Gathering(positions_per_image=positions or None, carry_gigabytes=carry)
        walk = image_walk.ImageWalk(
            model, source, batchnorm=steps["batchnorm"], batch_size=batch, gathering=gathering
        )
        recipe = Recipe(**{key: config.build(steps[key]) for key in STEPS}, classifier=steps["classifier"])
        for event in prune_(walk, recipe, Budget(sparsity, "flops")):
            if isinstance(event, Edit):
                solving += event.facts.get("seconds", {}).get("solving", 0.0)
    total = time.process_time() - started
    forward = (forward + forward_seconds(dense, source, batch)) / 2
    clock.seconds["rest"] -= solving
    clock.seconds["solver (scores, selection, repair)"] = solving
    rows = f"{positions} positions an image" if positions else "all positions (exact)"
    print(f"\n{model_name}, preset={preset}: {images} images of {size} px, {rows}, {sparsity:g} of FLOPs, {torch.get_num_threads()} threads")
    print(f"one plain forward over them: {forward:.2f} s; memory before the run {before:.2f} GB")
    print(f"{'stage':<38}{'seconds':>9}{'forwards':>10}{'peak GB':>9}")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:<38}{seconds:>9.2f}{seconds / forward:>10.2f}{clock.peak.get(name, float('nan')):>9.2f}")
    print(f"{'whole run':<38}{total:>9.2f}{total / forward:>10.2f}{max(clock.peak.values()):>9.2f}")
    solvers = solving + clock.seconds["solver towards the dense network"] + clock.seconds["error curves: elimination"]
    without = total - solvers - clock.seconds["groups and law"]
    print(f"{'statistics and BatchNorm alone':<38}{without:>9.2f}{without / forward:>10.2f}")


def measure_decoder(sequences: int, length: int, layers: int, batch: int, sparsity: float, preset: str) -> None:
    """Print the table of a language model of SmolLM2-135M's shape, random weights. Runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from modhifi_cli.data.text import TokenWindows
    from modhifi_cli.engine import curves, flow, token_walk
    from modhifi_cli.engine.prune import prune_
    from modhifi_cli.engine.walk import Budget, Recipe
    from modhifi_cli.numerics import moments
    from modhifi_cli.records import Edit, Note
    from modhifi_cli.settings import config

    shape = {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape)).eval().requires_grad_(False)
    ids = torch.randint(0, shape["vocab_size"], (sequences, length))
    source = TokenWindows(list(ids), [0] * sequences, {})
    dense = copy.deepcopy(model)

    def plain(ids: torch.Tensor) -> None:
        dense.model(input_ids=ids, use_cache=False)

    forward = forward_seconds(plain, source, batch)
    before = resident_gigabytes()

    clock, ran = Clock(), {"tokens": 0}
    steps = config.compose("prune", ["model=smollm2_135m", f"preset={preset}"])
    real = flow.run_layer

    def counted(layer, hidden, call):
        ran["tokens"] += hidden.shape[0] * hidden.shape[1]
        return real(layer, hidden, call)

    for module in (flow, token_walk):
        module.run_layer = clock.timed("forwards through layers", counted)
    moments.RowMoments.update = clock.timed("second moments", moments.RowMoments.update)
    curves.elimination = clock.timed("error curves: elimination", curves.elimination)
    time.perf_counter = time.process_time  # what edits say of their seconds, on the same clock
    solving, notes = 0.0, []
    started = time.process_time()
    with clock.stage("rest"):
        options = config.build(steps["decoder"], components=tuple(steps["components"]))
        walk = token_walk.TokenWalk(model, source, options=options, batch_size=batch)
        recipe = Recipe(**{key: config.build(steps[key]) for key in STEPS})
        for event in prune_(walk, recipe, Budget(sparsity)):
            if isinstance(event, Edit):
                solving += event.facts.get("seconds", {}).get("solving", 0.0)
            elif isinstance(event, Note):
                notes.append(event.text)
    total = time.process_time() - started
    forward = (forward + forward_seconds(plain, source, batch)) / 2
    clock.seconds["rest"] -= solving
    clock.seconds["solver (scores, selection, repair)"] = solving
    print(f"\nSmolLM2-135M's shape, preset={preset}: {layers} layers, {sequences} x {length} tokens, {sparsity:g} of their "
          f"parameters, {torch.get_num_threads()} threads")
    print(f"one plain forward through the layers: {forward:.2f} s; memory before the run {before:.2f} GB")
    counted_forwards = ran["tokens"] / (sequences * length * shape["num_hidden_layers"])
    print(f"counted: {counted_forwards:.2f} forwards through all layers over the calibration tokens (one that stops "
          "early counts as whole)")
    print(f"{'stage':<38}{'seconds':>9}{'forwards':>10}{'peak GB':>9}")
    for name, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        print(f"{name:<38}{seconds:>9.2f}{seconds / forward:>10.2f}{clock.peak.get(name, float('nan')):>9.2f}")
    print(f"{'whole run':<38}{total:>9.2f}{total / forward:>10.2f}{max(clock.peak.values()):>9.2f}")
    for note in notes:
        print(note)


def main() -> None:
    """Measure the cases asked for, each in a fresh process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="resnet56_cifar, resnet50, …; without it the standard cases are measured")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--positions", type=int, default=0, help="rows an image and convolution; 0 for all")
    parser.add_argument("--sparsity", type=float, default=0.4, help="share of FLOPs to remove")
    parser.add_argument("--carry", type=float, default=1.0, help="largest activation carried, 10⁹ bytes")
    parser.add_argument("--preset", default="paper", help="whose steps are run: paper, best, fast, …")
    parser.add_argument("--pixels", type=int, default=224, help="side of an image, of networks for ImageNet")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence, of a language model")
    parser.add_argument("--layers", type=int, default=30, help="of a language model")
    parser.add_argument("--here", action="store_true", help="measure in this process")
    settings = parser.parse_args()
    if settings.model == "smollm2_135m":
        sizes = (settings.images, settings.length, settings.layers, min(settings.batch, 8))
        measure_decoder(*sizes, settings.sparsity, settings.preset)
        return
    if settings.here:
        sizes = (settings.images, settings.batch, settings.positions)
        measure(settings.model, *sizes, settings.sparsity, settings.carry, settings.preset, settings.pixels)
        return
    cases = CASES
    if settings.model:
        keys = ("model", "images", "batch", "positions")
        cases = ({key: getattr(settings, key) for key in keys},)
    for case in cases:
        arguments = [f"--{key}={value}" for key, value in case.items()]
        arguments += [f"--{key}={getattr(settings, key)}" for key in ("sparsity", "carry", "preset", "pixels")]
        arguments += ["--here"]
        subprocess.run([sys.executable, __file__, *arguments], check=True)


if __name__ == "__main__":
    main()
