"""Cost of the numerics, each as a multiple of a plain forward in the same run: moments, scores, compensation.

    python scripts/bench_numerics.py [threads] [subsets]

Prints for 3 × 3 convolutions the second moment from shared taps against unfolding (X Xᵀ of the unfolded rows) and
against one plain forward, then the seconds that scores and compensation take on wide layers, and what the subsets
of the existence study cost (with ``subsets`` these alone).
"""

import sys
import time
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from modhifi_cli.numerics.batchnorm import BatchNormMoments
from modhifi_cli.numerics.compensation import Joint, PerKernel
from modhifi_cli.numerics.contributions import SimilarityBlocks, contribution_moments
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.fidelity import layer_fidelity, subset_fidelity
from modhifi_cli.numerics.moments import ConvMoments
from modhifi_cli.numerics.rows import Window
from modhifi_cli.numerics.subsets import leading_fidelity, leading_joint_fidelity, random_orders
from modhifi_cli.records import Consumer, Statistics

# channels, pixels a side, images: the stages of a CIFAR ResNet, then those of a ResNet-50, then pruned widths.
LAYERS = [(16, 32, 64), (32, 16, 64), (64, 8, 64), (64, 56, 16), (128, 28, 16), (256, 14, 16), (512, 7, 32)]
PRUNED_LAYERS = [(11, 32, 64), (50, 56, 16), (90, 28, 16)]


def milliseconds(work, repeats: int = 5) -> float:
    """Least time of a few runs after one to warm up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


def bench_moments() -> None:
    """Moments of stride-1 3 × 3 layers."""
    print("channels  side  forward_ms  shared_ms  unfold_ms  shared/forward  shared/unfold  result_ms  norm/forward")
    for channels, side, images in LAYERS + PRUNED_LAYERS:
        maps, weight = torch.relu(torch.randn(images, channels, side, side)), torch.randn(channels, channels, 3, 3)
        shared, norm = ConvMoments(channels, Window.of(3, 1, 1)), BatchNormMoments(channels)
        # A lopsided way to write the same window keeps it off the shared path.
        unfolded = ConvMoments(channels, Window.of(3, 1, 0))
        padded = functional.pad(maps, (1, 1, 1, 1))
        forward = milliseconds(lambda: functional.conv2d(maps, weight, padding=1))
        one = milliseconds(lambda: shared.update(maps))
        while unfolded._rows._gram is None:  # with few rows it would only store them
            unfolded.update(padded)
        two = milliseconds(lambda: unfolded.update(padded), 2)
        three = milliseconds(lambda: norm.update(maps))
        result = milliseconds(shared.result, 1)
        print(
            f"{channels:8d}  {side:4d}  {forward:10.1f}  {one:9.1f}  {two:9.1f}  {one / forward:14.2f}  "
            f"{one / two:13.2f}  {result:9.0f}  {three / forward:12.2f}"
        )


def bench_other_moments() -> None:
    """Moments of pointwise, strided and subsampled layers."""
    for channels, side, images, kernel, stride in [(256, 56, 8, 1, 1), (2048, 7, 32, 1, 1), (128, 56, 8, 3, 2)]:
        maps = torch.relu(torch.randn(images, channels, side, side))
        conv = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, bias=False)
        with torch.no_grad():
            forward = milliseconds(lambda: conv(maps))
        every = ConvMoments(channels, Window.of_layer(conv))
        drawn = torch.Generator().manual_seed(0)
        some = ConvMoments(channels, Window.of_layer(conv), positions_per_image=32, generator=drawn)
        one, two = milliseconds(lambda: every.update(maps), 2), milliseconds(lambda: some.update(maps), 2)
        print(
            f"{kernel} × {kernel} stride {stride}, {channels} channels (as many outputs), {side} px: all rows "
            f"{one / forward:.2f} forwards, 32 positions an image {two / forward:.2f}"
        )


def bench_solvers() -> None:
    """Scores, compensation and backward elimination of wide layers; half of the components kept, then nine in ten."""
    for components, taps, outputs in [(512, 9, 512), (2048, 1, 512), (1024, 1, 256)]:
        features = components * taps
        rows = torch.relu(torch.randn(features + 500, 64) @ torch.randn(64, features) / 8 + torch.randn(features))
        moment = (rows.T @ rows).double() / len(rows)
        weight = torch.randn(outputs, features, dtype=torch.float64) / features**0.5
        statistics = Statistics(len(rows), rows.double().mean(0), moment)
        consumer = Consumer("layer", weight, statistics, components, components, centred=True)
        scores = milliseconds(lambda: contribution_moments(consumer), 1) / 1e3
        held_out = Statistics(len(rows) // 5, statistics.mean, moment)
        start = time.perf_counter()
        kept = elimination([consumer], keep=components // 2).kept(components // 2)
        greedy = time.perf_counter() - start
        for name, joint in [("fixed ridge", Joint(ridge=1e-2)), ("ridge chosen", Joint())]:
            start = time.perf_counter()
            joint(replace(consumer, held_out=held_out), kept)
            print(
                f"{components} components × {taps} taps, {outputs} outputs, half kept: elimination {greedy:.2f} s, "
                f"joint compensation ({name}) {time.perf_counter() - start:.2f} s"
            )
        for share in (0.5, 0.9):
            kept = torch.randperm(components)[: int(share * components)].sort().values
            start = time.perf_counter()
            compensated = PerKernel()(consumer, kept)
            seconds = time.perf_counter() - start
            before, after = layer_fidelity(consumer, kept), layer_fidelity(consumer, kept, compensated)
            print(
                f"{components} components × {taps} taps, {outputs} outputs, {share:.0%} kept: scores {scores:.2f} s, "
                f"compensation {seconds:.2f} s, fidelity {before:.3f} → {after:.3f}"
            )


def bench_subsets() -> None:
    """The existence study: fidelity of 1,000 random subsets of every size, against one solve a subset and size."""
    for components, taps, outputs, looked_at in [(512, 1, 512, 512), (512, 9, 64, 1)]:
        features = components * taps
        rows = torch.relu(torch.randn(features + 500, 64) @ torch.randn(64, features) / 8 + torch.randn(features))
        moment = (rows.T @ rows).double() / len(rows)
        weight = torch.randn(outputs, features, dtype=torch.float64) / features**0.5
        statistics = Statistics(len(rows), rows.double().mean(0), moment)
        consumer = Consumer("layer", weight, statistics, components, components, centred=True)
        orders = random_orders(components, 1000, generator=torch.Generator().manual_seed(0))
        start = time.process_time()
        if taps == 1:
            leading_joint_fidelity(consumer, orders)
        else:
            leading_fidelity(SimilarityBlocks(consumer).of(torch.arange(looked_at)), orders)
        whole = (time.process_time() - start) * outputs / looked_at
        gram = SimilarityBlocks(consumer).of(torch.arange(1))
        sizes = range(16, components, 32)
        start = time.process_time()
        for size in sizes:
            subset_fidelity(gram, orders[0, :size].sort().values)
        single = (time.process_time() - start) / len(sizes) * components * len(orders)
        single *= 1 if taps == 1 else outputs
        print(
            f"{components} components × {taps} taps, {outputs} outputs, 1,000 subsets of every size: {whole:.0f} s of "
            f"one core (from {looked_at} outputs); a solve a subset {single:.0f} s, {single / whole:.0f}×"
        )


if __name__ == "__main__":
    arguments = [word for word in sys.argv[1:] if word != "subsets"]
    torch.set_num_threads(int(arguments[0]) if arguments else torch.get_num_threads())
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if "subsets" not in sys.argv:
        bench_moments()
        bench_other_moments()
        bench_solvers()
    bench_subsets()
