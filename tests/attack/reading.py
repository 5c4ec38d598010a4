"""What the checks cost: saved networks read with and without them, in turn, in one process."""

import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from modhifi_cli.files import artifacts, manifest
from modhifi_cli.records import LoadedModel


def networks() -> Iterator[LoadedModel]:
    """Two convolutional networks and a decoder of SmolLM2-135M's shapes, all with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from modhifi_cli.models import hf, torchvision

    for name in ("resnet18", "resnet50"):
        yield torchvision.load(name=name, weights="random")
    shapes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
    decoder = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shapes)).eval()
    yield hf.described(decoder, None, "like smollm2_135m")


def costs(folder: Path, turns: int) -> dict[str, float]:
    """Seconds of `load_model` with the checks and without, and the median ratio of a turn's two readings.

    Args:
        folder: Of a saved network (``model``).
        turns: Pairs of readings; which comes first alternates.
    """
    bare = manifest.Checked(folder, None)
    checked = manifest.checked
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns + 1):
        for checking in (True, False) if turn % 2 else (False, True):
            if not checking:
                manifest.checked = lambda *_, **__: bare
            try:
                began = time.perf_counter()
                artifacts.load_model(folder)
                seconds[checking].append(time.perf_counter() - began)
            finally:
                manifest.checked = checked
    ours, without = seconds[True][1:], seconds[False][1:]  # the first turn imports
    ratios = [one / other for one, other in zip(ours, without, strict=True)]
    return {"checked": statistics.median(ours), "unchecked": statistics.median(without), "ratio": statistics.median(ratios)}
