"""Speed of generating text: prefill and decode tokens per second and the time to the first token, networks in turn."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, is_whole
from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.evaluation.latency import busy, median_interval, told_speedup
from modhifi_cli.evaluation.runtimes.clocks import clock_name, load_average, milliseconds
from modhifi_cli.records import ImageSource, Measurement, Progress


def measure(
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    sequences: int | Sequence[int] = (1, 8),
    rounds: int = 7,
    warmup: int = 1,
    max_seconds: float = 60.0,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
) -> tuple[Measurement, ...]:
    """Speed of the networks, interleaved so that they see the same state of the machine.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    A round is a prefill of a random prompt that fills the cache, then greedy steps of one token with that cache.

    Args:
        prompt_tokens: Length of the prompt.
        new_tokens: Steps behind the prompt.
        sequences: Prompts side by side, or several such numbers.
        rounds: Timed rounds at most; every round times each network once.
        warmup: Rounds before.
        max_seconds: For each number of prompts no round begins after so long; at least one is timed.
        models, evaluation_data, calibration_data, example, device, batch_size, progress: As in
            `modhifi_cli.evaluation.Measure`; no data is read.

    Returns:
        ``first_token_ms``, ``prefill_tokens_per_second`` and ``decode_tokens_per_second`` per network, of median times, and
        ``prefill_speedup`` and ``decode_speedup`` of every network but the first, as `latency.measure` tells a speedup.
        Names end in ``_N`` for every number N of prompts but the first. Empty for networks that read images.

    Raises:
        ConfigError: If a number is below 1.
    """
    counts = [sequences] if isinstance(sequences, int) else list(sequences)
    for key, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), *(("sequences", n) for n in counts)):
        if not is_whole(value) or value < 1:
            raise ConfigError(f"evaluation.generation.{key} must be at least 1, got {value}.")
    if example.is_floating_point() or not models:
        return ()
    found: list[Measurement] = []
    with ready_to_measure(models, device), torch.inference_mode():
        for place, count in enumerate(counts):
            generator = torch.Generator().manual_seed(0)
            prompt = torch.randint(0, int(example.max()) + 1, (count, prompt_tokens), generator=generator).to(device)
            load = load_average()
            times = _times(models, prompt, new_tokens, device, (warmup, rounds, max_seconds), progress)
            protocol = {
                "prompt_tokens": prompt_tokens,
                "new_tokens": new_tokens,
                "sequences": count,
                "iterations": times.shape[2],
                "clock": clock_name(device, torch.get_num_threads()),
                "device": str(device),
                "threads": torch.get_num_threads(),
                "cores": os.cpu_count(),
                "load_average": load,
            }
            found += _summary(tuple(models), times, protocol, suffix=f"_{count}" if place else "")
    return tuple(found)


def _times(
    models: Mapping[str, nn.Module],
    prompt: Tensor,
    new_tokens: int,
    device: torch.device,
    limits: tuple[int, int, float],
    progress: Callable[[Progress], None],
) -> Tensor:
    """Seconds of the prefill and of a step, ``[2, networks, rounds]`` float64; limits: warm-up, rounds, seconds."""
    warmup, rounds, max_seconds = limits
    found: list[list[tuple[float, float]]] = []
    started = time.perf_counter()
    for number in range(warmup + max(rounds, 1)):
        if number > warmup and time.perf_counter() - started > max_seconds:
            break
        turn = number % len(models)
        order = [*list(models)[turn:], *list(models)[:turn]]
        spent = {name: _round(models[name], prompt, new_tokens, device) for name in order}
        if number >= warmup:
            found.append([spent[name] for name in models])
        progress(Progress("generation", f"{len(prompt)} prompts", number + 1, warmup + max(rounds, 1)))
    return torch.tensor(found, dtype=torch.float64).permute(2, 1, 0)


def _summary(names: tuple[str, ...], times: Tensor, protocol: dict, *, suffix: str) -> list[Measurement]:
    found = []
    prompts, length = protocol["sequences"], protocol["prompt_tokens"]
    for number, name in enumerate(names):
        prefill, step = (median(times[kind, number].tolist()) for kind in (0, 1))
        found.append(Measurement(name, f"first_token_ms{suffix}", 1000 * prefill, "ms", protocol))
        for term, value in (("prefill", prompts * length / prefill), ("decode", prompts / step)):
            found.append(Measurement(name, f"{term}_tokens_per_second{suffix}", value, "tokens/s", protocol))
        for kind, term in enumerate(("prefill", "decode") if number else ()):
            ratios = times[kind, 0] / times[kind, number]
            low, high = median_interval(ratios)
            ratio = float(ratios.median())
            told = told_speedup(ratio, low, high, rounds=len(ratios), batch=prompts, busy=busy(protocol))
            own = {"reference": names[0], "low": low, "high": high, "told": told}
            found.append(Measurement(name, f"{term}_speedup{suffix}", ratio, "×", {**protocol, **own}))
    return found


def _round(model: nn.Module, prompt: Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the prefill with its first token, and of one step behind it."""
    read: dict[str, Any] = {"input_ids": prompt, "logits_to_keep": 1}

    def step() -> None:
        nonlocal read
        output = model(**read, use_cache=True)
        read = {"input_ids": output.logits[:, -1:].argmax(-1), "past_key_values": output.past_key_values}

    def steps() -> None:
        for _ in range(new_tokens):
            step()

    threads = torch.get_num_threads()
    prefill, behind = (milliseconds(run, device, threads) / 1000 for run in (step, steps))
    return prefill, behind / new_tokens
