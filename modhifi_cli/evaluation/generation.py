"""Speed of generating text: prefill and decode tokens per second and the time to the first token, networks in turn."""

import time
from collections.abc import Callable, Mapping
from statistics import fmean, median

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation.forward import ready_to_measure, synchronize
from modhifi_cli.records import ImageSource, Measurement, Progress


def measure(
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    sequences: int = 1,
    rounds: int = 5,
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

    A round is a prefill of a random prompt that fills the cache, then greedy steps of one token with that cache.

    Args:
        prompt_tokens: Length of the prompt.
        new_tokens: Steps behind the prompt.
        sequences: Prompts side by side.
        rounds: Timed rounds at most; every round times each network once.
        warmup: Rounds before.
        max_seconds: No round begins after so long; at least one is timed.
        models, evaluation_data, calibration_data, example, device, batch_size, progress: As in
            `modhifi_cli.evaluation.Measure`; no data is read.

    Returns:
        ``first_token_ms`` (median), ``prefill_tokens_per_second`` and ``decode_tokens_per_second`` (of mean times) per
        network. Empty for networks that read images.

    Raises:
        ConfigError: If a number is below 1.
    """
    for key, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("sequences", sequences)):
        if value < 1:
            raise ConfigError(f"evaluation.generation.{key} must be at least 1, got {value}.")
    if example.is_floating_point() or not models:
        return ()
    generator = torch.Generator().manual_seed(0)
    highest = int(example.max()) + 1
    prompt = torch.randint(0, highest, (sequences, prompt_tokens), generator=generator).to(device)
    first: dict[str, list[float]] = {name: [] for name in models}
    steps: dict[str, list[float]] = {name: [] for name in models}
    started = time.perf_counter()
    with ready_to_measure(models, device), torch.inference_mode():
        for number in range(warmup + max(rounds, 1)):
            if number > warmup and time.perf_counter() - started > max_seconds:
                break
            for name, model in models.items():
                prefill, step = _round(model, prompt, new_tokens, device)
                if number >= warmup:
                    first[name].append(prefill)
                    steps[name].append(step)
            progress(Progress("generation", "", number + 1, warmup + max(rounds, 1)))
    found = []
    for name in models:
        protocol = {
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "sequences": sequences,
            "rounds": len(first[name]),
            "device": str(device),
            "threads": torch.get_num_threads(),
        }
        speeds = {
            "prefill_tokens_per_second": sequences * prompt_tokens / fmean(first[name]),
            "decode_tokens_per_second": sequences / fmean(steps[name]),
        }
        found.append(Measurement(name, "first_token_ms", 1000 * median(first[name]), "ms", protocol))
        found += [Measurement(name, term, value, "tokens/s", protocol) for term, value in speeds.items()]
    return tuple(found)


def _round(model: nn.Module, prompt: Tensor, new_tokens: int, device: torch.device) -> tuple[float, float]:
    """Seconds of the prefill with its first token, and of one step behind it."""
    synchronize(device)
    started = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    synchronize(device)
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    synchronize(device)
    return prefilled - started, (time.perf_counter() - prefilled) / new_tokens
