"""`modhifi prune dry_run=true`: groups, budget, memory, traffic, operations and time, without loading a weight."""

from collections.abc import Mapping
from typing import Any

import torch

from modhifi_cli.console import Console, duration
from modhifi_cli.data.text import LENGTH, SEQUENCES
from modhifi_cli.engine.forecast import SPEEDS, Run, forecast
from modhifi_cli.engine.memory import free_memory
from modhifi_cli.errors import ConfigError
from modhifi_cli.pages import terms
from modhifi_cli.roles import solves_towards_dense
from modhifi_cli.settings import config, recipes
from modhifi_cli.verbs import pieces


def show(settings: Mapping[str, Any], console: Console) -> None:
    """Say what the run would do and take.

    Raises:
        ConfigError: If the network reads images: only a forward tells which of its channels belong together, and
            `modhifi info` shows these.
    """
    if not pieces.is_decoder(settings):
        raise ConfigError(
            "dry_run=true reads the shapes of language models; for networks that read images see modhifi info, which "
            "needs no weights."
        )
    price = config.build(settings["target"])
    if price.timed or price.searched:
        raise ConfigError(
            f"dry_run=true counts, and target={price.name} has to be measured; give target=params, flops or components."
        )
    from modhifi_cli.engine.decoder_widths import DecoderCosts, Widths
    from modhifi_cli.engine.walk import Budget
    from modhifi_cli.graph.decoder import find_parts
    from modhifi_cli.models import hf
    from modhifi_cli.numerics.allocation import Uniform

    asked = {key: settings["model"].get(key) for key in ("path", "revision", "dtype", "trust_remote_code")}
    model = hf.outline(**asked)
    options = recipes.decoder_options(settings)
    decoder = find_parts(
        model, components=options.components, unit=options.unit, exclude=tuple(settings["exclude"]), check=False
    )
    steps = recipes.steps(settings)
    uneven = steps["allocation"].needs_curves
    data = settings["data"] or {}
    length = min(int(data.get("length") or LENGTH), int(_config(model).max_position_embeddings))
    sequences = data.get("sequences") or SEQUENCES
    budget = Budget(float(settings["sparsity"]), price, settings["round_to"])
    shares = steps["schedule"](budget.sparsity)
    sizes = [part.components for part in decoder.parts]
    # Without a look at the data every layer is worth the same.
    example = torch.zeros(1, length, dtype=torch.int64)
    widths = Widths(model, decoder, example, allocation=Uniform(), budget=budget)
    keep = widths.at(shares[-1], sizes, [])
    console.table(
        f"{len(sizes)} parts of {len(decoder.layers)} layers" + (", widths as if even" if uneven else ""),
        [
            {"part": part.name, "unit": part.unit, "components": size, "keep": kept}
            for part, size, kept in zip(decoder.parts, sizes, keep, strict=True)
        ],
    )
    costs = DecoderCosts(model, decoder, length=length)
    removed = {name: costs.removed_share(keep, name) for name in costs.names}
    console.note(f"would remove {terms.removed(removed)}")
    run = _run(settings, steps, sequences=sequences, length=length, passes=len(shares), offload=options.offload)
    found = forecast(model, decoder, run)
    _tell(found, console, settings["runtime"]["device"])
    console.result(
        {
            "parts": len(sizes), "removed": removed, "card_bytes": sum(found.card.values()),
            "host_bytes": sum(found.host.values()), "traffic_bytes": found.traffic,
            "operations": dict(found.operations), "seconds": found.seconds,
        }
    )  # fmt: skip


def _config(model: Any) -> Any:
    """Configuration of a class of transformers, whose attributes have no types."""
    return model.config


def _run(
    settings: Mapping[str, Any], steps: Mapping[str, Any], *, sequences: int, length: int, passes: int, offload: bool
) -> Run:
    """What of the run decides what it takes."""
    uneven, repairs = steps["allocation"].needs_curves, steps["compensation"].needs_statistics
    reference = "dense" if solves_towards_dense(steps["compensation"]) else "current"
    return Run(
        sequences=sequences,
        length=length,
        batch_size=settings["runtime"]["batch_size"],
        passes=passes,
        reference=reference if repairs else "none",
        hold_out=repairs and steps["compensation"].wants_held_out or uneven,
        uneven=uneven,
        statistics=any(step.needs_statistics for step in steps.values() if hasattr(step, "needs_statistics")),
        offload=offload,
        dense_copies=int(bool(settings["measure_dense"])),
        room=free_memory("cuda") if torch.cuda.is_available() else None,
    )


def _tell(found: Any, console: Console, device: str) -> None:
    console.note(found.on_the_card())
    parts = ", ".join(f"{what} {count / 1e9:.2f}" for what, count in found.host.items() if count)
    console.note(f"memory of the host, libraries left out: {sum(found.host.values()) / 1e9:.2f} GB at most ({parts})")
    console.note(f"copied to the card and back: {found.traffic / 1e9:.1f} GB")
    console.note("; ".join(f"{count / 1e12:.1f} × 10¹² {kind}" for kind, count in found.operations.items()))
    speeds = ", ".join(f"{speed / 1e12:g} × 10¹² {kind}" for kind, speed in SPEEDS.items())
    console.note(f"about {duration(found.seconds)} where a second takes {speeds}; measurements left out")
    if device == "cpu" or torch.cuda.is_available():
        lacking = found.does_not_fit(free_memory(device))
        if lacking is not None:
            console.warning(lacking)
