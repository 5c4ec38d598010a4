"""Time of one forward pass in the runtimes that will serve the network, all networks interleaved round by round.

One number leads: the median over rounds of the ratio of two networks' times, which stood side by side, with the interval
in which that median lies. Where the interval says nothing, the number is not told as a fact.
"""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number, is_whole
from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.evaluation.runtimes import runtime
from modhifi_cli.evaluation.runtimes.clocks import card_clocks
from modhifi_cli.evaluation.runtimes.process import OutOfMemory, Rounds, Timings, timed
from modhifi_cli.records import ImageSource, Measurement, Progress

FEWEST_ROUNDS = 6  # with fewer, no interval holds a median with 95 %
_SURE = 0.95
_NARROW = 0.1  # an interval around 1 that is narrower than that says "as fast as before"
_BUSY = 1.5  # programs per processor from which on the wall's clock says little


def measure(
    *,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
    cpu_batch: int = 64,
    gpu_batch: int = 640,
    iterations: int = 100,
    minimum_iterations: int = FEWEST_ROUNDS,
    warmup: int = 10,
    max_seconds: float = 20.0,
    runtimes: Sequence[str] = ("eager",),
    threads: int | None = None,
) -> tuple[Measurement, ...]:
    """Latency of a whole batch in milliseconds, and how many times faster the edited networks are.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Batches are the paper's, 64 on a CPU and 640 on a GPU. Each runtime times all networks in a process of its own
    (`runtimes.process`). A small machine stops early: after `max_seconds` (warm-up takes at most half of it) no new round
    begins once `minimum_iterations` are done.

    Args: see `modhifi_cli.evaluation.Measure` for the others; images are not read, `batch_size` is not used.
        cpu_batch: Images per forward pass where `device` is a CPU, ≥ 1.
        gpu_batch: Images per forward pass anywhere else, ≥ 1.
        iterations: Timed rounds at most, ≥ 1.
        minimum_iterations: Timed rounds at least, whatever the time, ≥ 1 (never more than `iterations`).
        warmup: Rounds before timing at most, ≥ 0. One is always done where this is above 0.
        max_seconds: Time for warm-up and timing of all networks in one runtime, seconds, > 0. Programs come before.
        runtimes: Names of files in `modhifi_cli.evaluation.runtimes`.
        threads: Of the processor; None: as many as PyTorch has here.

    Returns:
        Per runtime and network ``latency_ms``, the median, ms per batch, with mean, p10, p90 and minimum in `protocol`;
        for every network but the first ``speedup``, ×: median over rounds of the first one's time divided by its own,
        with ``low`` and ``high`` in `protocol`, between which the median lies with 95 %, and ``told``: the sentence that
        stands for the number. Names of all runtimes but the first end in ``_RUNTIME``.

    Raises:
        ConfigError: If a parameter is out of range, a runtime is missing, or the batch does not fit into memory.
        UnsupportedModelError: If a runtime cannot run a network.
    """
    batch = cpu_batch if device.type == "cpu" else gpu_batch
    _check(cpu_batch, gpu_batch, iterations, minimum_iterations, warmup, max_seconds, runtimes)
    if not models or not example.is_floating_point():  # of networks that read text, `generation` times words
        return ()
    for name in runtimes:
        runtime(name, place="evaluation.latency.runtimes", device_type=device.type)
    threads = threads or torch.get_num_threads()
    dtype = next((t.dtype for model in models.values() for t in model.parameters() if t.is_floating_point()), torch.float32)
    images = torch.randn((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    rounds = Rounds(iterations, min(minimum_iterations, iterations), warmup, max_seconds)
    found: list[Measurement] = []
    with ready_to_measure(models, device):
        for number, name in enumerate(runtimes):
            try:
                times = timed(
                    name, models, images, threads=threads, rounds=rounds, progress=progress,
                    place="evaluation.latency.runtimes",
                )  # fmt: skip
            except OutOfMemory as error:
                raise _too_large(str(error), device, batch) from error
            protocol = _protocol(name, times, images, models, threads)
            found += _summary(tuple(models), times, protocol, suffix=f"_{name}" if number else "")
    return tuple(found)


def describe_device(device: torch.device) -> str:
    """The processor's name as its maker prints it, for protocols.

    Args:
        device: A CPU or an accelerator of this machine.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else (platform.processor() or platform.machine())


def median_interval(values: Tensor) -> tuple[float, float]:
    """Between which two of the values the median of their kind lies with 95 % (sign test), or all of them span.

    Args:
        values: ``[rounds]``.
    """
    ordered, count = values.sort().values, len(values)
    outside, rank = 0.0, 0
    while rank < count // 2:
        outside += 2 * comb(count, rank) / 2**count
        if outside > 1 - _SURE:
            break
        rank += 1
    rank = max(rank - 1, 0)
    return float(ordered[rank]), float(ordered[count - 1 - rank])


def busy(protocol: Mapping[str, Any]) -> bool:
    """Whether the machine had so much other work that the wall's clock says little; by ``clock``, ``load_average``, ``cores``."""
    load = protocol["load_average"]
    return protocol["clock"] == "wall" and load is not None and load > _BUSY * (protocol["cores"] or 1)


def told_speedup(ratio: float, low: float, high: float, *, rounds: int, batch: int, busy: bool) -> str:
    """The sentence for a speedup: the number with its interval, or that the clock cannot tell.

    Args:
        ratio: Median of paired rounds.
        low, high: Interval of that median.
        rounds: Their number.
        batch: Images a forward pass.
        busy: Whether the machine had other work to do while the wall's clock ran.
    """
    between = f"between {low:.2f} and {high:.2f} times"
    if rounds == 1:
        return f"too noisy to tell: {ratio:.2f} times in one round, and {FEWEST_ROUNDS} are needed"
    if rounds < FEWEST_ROUNDS or busy or low < 1 < high and high - low > _NARROW:
        return f"too noisy to tell: {between}"
    if low < 1 < high:
        return f"as fast as before: {between}, batch {batch}"
    return f"{ratio:.2f} × ({low:.2f} to {high:.2f}), batch {batch}"


def _protocol(name: str, times: Timings, images: Tensor, models: Mapping[str, nn.Module], threads: int) -> dict:
    return {
        "runtime": name,
        "batch": len(images),
        "input": list(images.shape[1:]),
        "iterations": times.milliseconds.shape[1],
        "warmup": times.warmup,
        "interleaved": list(models),
        "clock": times.clock,
        "own_process": times.own_process,
        "device": describe_device(images.device),
        **card_clocks(images.device),
        "threads": threads,
        # A busy machine shows here: with more running programs than cores, the wall's times are those of the scheduler.
        "cores": os.cpu_count(),
        "load_average": times.load_average,
        "torch": torch.__version__,
    }


def _summary(names: tuple[str, ...], times: Timings, protocol: dict, *, suffix: str) -> list[Measurement]:
    rounds = times.milliseconds
    levels = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    found = []
    for name, own in zip(names, rounds, strict=True):
        low, middle, high = torch.quantile(own, levels).tolist()
        spread = {"p10_ms": low, "p90_ms": high, "minimum_ms": float(own.min()), "mean_ms": float(own.mean())}
        found.append(Measurement(name, f"latency_ms{suffix}", middle, "ms", {**protocol, **spread}))
    for name, own in zip(names[1:], rounds[1:], strict=True):
        ratios = rounds[0] / own
        ratio, (low, high) = float(torch.quantile(ratios, 0.5)), median_interval(ratios)
        told = told_speedup(ratio, low, high, rounds=len(ratios), batch=protocol["batch"], busy=busy(protocol))
        own_facts = {"reference": names[0], "low": low, "high": high, "told": told}
        found.append(Measurement(name, f"speedup{suffix}", ratio, "×", {**protocol, **own_facts}))
    return found


def _too_large(name: str, device: torch.device, batch: int) -> ConfigError:
    key = "cpu_batch" if device.type == "cpu" else "gpu_batch"
    return ConfigError(
        f"latency: expected {batch} images to fit into the memory of {device} for '{name}', got out of memory; "
        f"set evaluation.latency.{key} to fewer than {batch}."
    )


def _check(cpu_batch, gpu_batch, iterations, minimum_iterations, warmup, max_seconds, runtimes) -> None:
    least = {
        "cpu_batch": (cpu_batch, 1),
        "gpu_batch": (gpu_batch, 1),
        "iterations": (iterations, 1),
        "minimum_iterations": (minimum_iterations, 1),
        "warmup": (warmup, 0),
    }
    for key, (value, minimum) in least.items():
        if not is_whole(value) or value < minimum:
            raise ConfigError(
                f"evaluation.latency.{key}: expected a whole number of at least {minimum}, got {value!r}; change it."
            )
    if not is_number(max_seconds) or not max_seconds > 0:
        raise ConfigError(
            f"evaluation.latency.max_seconds: expected a number above 0, got {max_seconds!r}; change it."
        )
    if isinstance(runtimes, str) or not runtimes:
        raise ConfigError(
            f"evaluation.latency.runtimes: expected a list of runtimes such as [eager,onnxruntime], got {runtimes!r}."
        )
