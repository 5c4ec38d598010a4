"""Time of one forward pass, all networks interleaved round by round so that their ratio is honest.

A machine gets warm and has other work to do; networks timed one after the other would be charged for different minutes
of it. Here every round times each network once, in turning order, and the speedup compares what stood side by side.
"""

import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_number, is_whole, nearest
from modhifi_cli.evaluation.forward import ready_to_measure, synchronize
from modhifi_cli.records import ImageSource, Measurement, Progress

ENGINES = ("none", "compile", "jit")


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
    minimum_iterations: int = 3,
    warmup: int = 10,
    max_seconds: float = 20.0,
    compile: str = "none",  # noqa: A002 - the name that users know from torch.compile
) -> tuple[Measurement, ...]:
    """Latency of a whole batch in milliseconds, and how many times faster the edited networks are.

    The paper's protocol: batch 64 on a CPU and 640 on a GPU, warm-up, then the mean. A small machine stops early: after
    `max_seconds` (warm-up takes at most half of it) no new round begins once `minimum_iterations` are done.

    Args: see `modhifi_cli.evaluation.Measure` for the others; images are not read, `batch_size` is not used.
        cpu_batch: Images per forward pass where `device` is a CPU, ≥ 1.
        gpu_batch: Images per forward pass anywhere else, ≥ 1.
        iterations: Timed rounds at most, ≥ 1.
        minimum_iterations: Timed rounds at least, whatever the time, ≥ 1 (never more than `iterations`).
        warmup: Rounds before timing at most, ≥ 0. One is always done where this is above 0.
        max_seconds: Time for warm-up and timing of all networks together, seconds, > 0. Compiling comes before.
        compile: ``"none"``, ``"compile"`` (torch.compile) or ``"jit"`` (trace and freeze).

    Returns:
        Per network ``latency_ms`` (the mean, as the paper reports) and ``latency_median_ms``, ms per batch, with p10,
        p90 and the minimum in `protocol`. For every network but the first ``speedup``, × : median of the first divided
        by its median; `protocol` has the ratio of the means and p10 and p90 of the ratio within a round.

    Raises:
        ConfigError: If a parameter is out of range, the batch does not fit into memory, or the network cannot be
            compiled.
    """
    batch = cpu_batch if device.type == "cpu" else gpu_batch
    _check(cpu_batch, gpu_batch, iterations, minimum_iterations, warmup, max_seconds, compile)
    if not models or not example.is_floating_point():  # of networks that read text, `generation` times words
        return ()
    images = torch.randn((batch, *example.shape[1:]), generator=torch.Generator().manual_seed(0)).to(device)
    with ready_to_measure(models, device), torch.inference_mode():
        runs = {name: _engine(name, model, images, compile) for name, model in models.items()}
        rounds, warmed = _time_rounds(
            runs,
            device,
            iterations=iterations,
            minimum_iterations=minimum_iterations,
            warmup=warmup,
            max_seconds=max_seconds,
            progress=progress,
            batch=batch,
        )
    protocol = {
        "batch": batch,
        "input": list(example.shape[1:]),
        "iterations": rounds.shape[1],
        "warmup": warmed,
        "interleaved": list(models),
        "compile": compile,
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        # A busy machine shows here: with more running programs than cores, times are those of the scheduler.
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
    }
    return _summary(tuple(models), rounds, protocol)


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


def _time_rounds(
    runs, device, *, iterations, minimum_iterations, warmup, max_seconds, progress, batch
) -> tuple[Tensor, int]:
    """Milliseconds per network and round, ``[networks, rounds]`` float64, and the number of warm-up rounds done."""
    names = list(runs)
    progress(Progress("latency", "warm-up", 0, iterations))
    start = time.perf_counter()
    warmed = 0
    while warmed < warmup and (warmed == 0 or time.perf_counter() - start < max_seconds / 2):
        for name in names:
            _milliseconds(name, runs[name], device, batch)
        warmed += 1
    rounds = []
    while len(rounds) < iterations:
        if len(rounds) >= minimum_iterations and time.perf_counter() - start >= max_seconds:
            break
        progress(Progress("latency", f"batch of {batch}", len(rounds), iterations))
        # The order turns by one each round: whoever comes first may find colder caches or a higher clock.
        turn = len(rounds) % len(names)
        times = {name: _milliseconds(name, runs[name], device, batch) for name in names[turn:] + names[:turn]}
        rounds.append([times[name] for name in names])
    progress(Progress("latency", f"batch of {batch}", iterations, iterations))
    return torch.tensor(rounds, dtype=torch.float64).T, warmed


def _milliseconds(name: str, run: Callable[[], object], device: torch.device, batch: int) -> float:
    try:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        return 1000 * (time.perf_counter() - start)
    except RuntimeError as error:
        if _is_out_of_memory(error):
            raise _too_large(name, device, batch) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    # Accelerators have an exception for it; the CPU's allocator has only its name in the message.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _too_large(name: str, device: torch.device, batch: int) -> ConfigError:
    key = "cpu_batch" if device.type == "cpu" else "gpu_batch"
    return ConfigError(
        f"latency: expected {batch} images to fit into the memory of {device} for '{name}', got out of memory; "
        f"set evaluation.latency.{key} to fewer than {batch}."
    )


def _engine(name: str, model: nn.Module, images: Tensor, compile: str) -> Callable[[], object]:  # noqa: A002
    dtype = next((tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()), images.dtype)
    images = images.to(dtype)
    if compile == "none":
        return lambda: model(images)
    try:
        with warnings.catch_warnings():
            # torch marks tracing as deprecated; it is offered because the paper's latencies were taken with it.
            warnings.simplefilter("ignore", FutureWarning)
            if compile == "jit":
                engine = torch.jit.freeze(torch.jit.trace(model, images))
            else:
                engine = torch.compile(model, dynamic=False)
            engine(images)
    except Exception as error:  # compilers raise whatever their stages raise; the sentence names the way out
        if _is_out_of_memory(error):
            raise _too_large(name, images.device, len(images)) from error
        raise ConfigError(
            f"latency: expected compile={compile} to work for '{name}', got {type(error).__name__} "
            f"({str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}); "
            "set evaluation.latency.compile=none, or install what the compiler asks for."
        ) from error
    return lambda: engine(images)


def _summary(names: tuple[str, ...], rounds: Tensor, protocol: dict) -> tuple[Measurement, ...]:
    levels = torch.tensor([0.1, 0.9], dtype=torch.float64)
    measurements = []
    for name, times in zip(names, rounds, strict=True):
        low, high = torch.quantile(times, levels).tolist()
        spread = {"p10_ms": low, "p90_ms": high, "minimum_ms": float(times.min())}
        for term, value in (("latency_ms", times.mean()), ("latency_median_ms", torch.quantile(times, 0.5))):
            measurements.append(Measurement(name, term, float(value), "ms", {**protocol, **spread}))
    for name, times in zip(names[1:], rounds[1:], strict=True):
        low, high = torch.quantile(rounds[0] / times, levels).tolist()
        ratio = {
            "reference": names[0],
            "ratio_of_means": float(rounds[0].mean() / times.mean()),
            "p10": low,
            "p90": high,
        }
        speedup = float(torch.quantile(rounds[0], 0.5) / torch.quantile(times, 0.5))
        measurements.append(Measurement(name, "speedup", speedup, "×", {**protocol, **ratio}))
    return tuple(measurements)


def _check(cpu_batch, gpu_batch, iterations, minimum_iterations, warmup, max_seconds, compile) -> None:  # noqa: A002
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
    if compile not in ENGINES:
        raise ConfigError(
            f"evaluation.latency.compile: expected none, compile or jit, got {compile!r}; "
            f"{nearest(str(compile), ENGINES)}"
        )
