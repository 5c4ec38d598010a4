"""Time as a target: where the table of a run comes from and is kept, and what the clock says in the end."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modhifi_cli.console import Console
from modhifi_cli.files import artifacts
from modhifi_cli.records import Preprocess, TextInput, last_of
from modhifi_cli.settings import config

FILE = "latency_table.json"
_FAR = 0.03  # a prediction that is farther off than that is a warning


class Times:
    """The latency table of one run, as far as its target needs one.

    Args:
        settings: Of the run.
        facts: `config.job_facts()`: the jobs of a sweep and the cells of a comparison share a table, so that they take
            the same widths.
        place: The run's folder.
    """

    def __init__(self, settings: Mapping[str, Any], facts: Mapping[str, Any], place: artifacts.RunDirectory) -> None:
        self._asked = config.build(settings["target"])
        self._own = place.path / FILE
        self._shared: Path | None = None
        if facts.get("sweep"):
            same = {key: settings[key] for key in ("model", "exclude", "target", "runtime")}
            digest = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()[:8]
            self._shared = Path(facts["sweep"]) / f"latency_table_{digest}.json"

    def price(self) -> Any:
        """What shares of the run count; time with the run's own table first (a continued run must not measure again)."""
        price = self._asked.price if self._asked.searched else self._asked
        if not price.timed:
            return price
        given = [path for path in (self._own, price.table, self._shared) if path is not None]
        found = [path for path in given if path == price.table or Path(path).is_file()]
        table = artifacts.load_latency_table(found[0]) if found else None
        if table is not None and not self._own.is_file():
            self.keep(table)
        return dataclasses.replace(price, measured=table)

    def keep(self, table: Any) -> None:
        """Put the table into the run's folder, and where the other runs of a sweep look for it."""
        artifacts.save_latency_table(self._own, table)
        if self._shared is not None:
            artifacts.save_latency_table(self._shared, table)

    def clocked(
        self,
        summary: Any,
        dense: nn.Module | None,
        model: nn.Module,
        preprocess: Preprocess | TextInput,
        device: torch.device,
        console: Console,
    ) -> Any:
        """The summary with the share of time that the new network really saves, and a warning if that surprises."""
        from modhifi_cli.engine.prices import measured_here
        from modhifi_cli.evaluation import latency_probe

        if summary.latency is None:
            return summary
        table = artifacts.load_latency_table(self._own)
        if dense is None:  # a language model whose dense network was not kept
            return summary
        price = self.price()
        if not measured_here(table, device):
            told = f"{table.protocol.get('device')}, {table.protocol.get('threads')} threads"
            warning = f"the latency table is that of another machine ({told}), so the share of time was not checked."
            console.warning(warning)
            return dataclasses.replace(summary, warnings=(*summary.warnings, warning))
        batch = int(table.protocol["batch"])
        events = latency_probe.saved_share(
            dense.eval(),
            model.eval(),
            _example(table.protocol["input"], model, preprocess, device),
            batch=batch,
            rounds=2 * price.rounds,
            max_seconds=float(price.max_seconds),
            stopwatch=latency_probe.stopwatch_in(price.serve, device),
        )
        found = last_of(events, latency_probe.Saved, console.progress)
        warnings = summary.warnings
        predicted = summary.latency["predicted"]
        if abs(found.share - predicted) > _FAR:
            warning = (
                f"the widths were expected to save {predicted:.1%} of the time and save {found.share:.1%} (80 % of the "
                f"rounds between {found.low:.1%} and {found.high:.1%})."
            )
            console.warning(warning)
            warnings = (*warnings, warning)
        measured = {"measured": found.share, "p10": found.low, "p90": found.high, "rounds": found.rounds}
        kept = {key: table.protocol[key] for key in ("batch", "runtime", "device", "threads", "clock") if key in table.protocol}
        return dataclasses.replace(
            summary,
            achieved={**summary.achieved, "latency": found.share},
            latency={**summary.latency, **measured, "dense_ms": table.dense_ms, **kept},
            warnings=warnings,
        )


def _example(
    shape: list[int], model: nn.Module, preprocess: Preprocess | TextInput, device: torch.device
) -> torch.Tensor:
    """One input of the shape that the table was measured with: noise, or ids of tokens."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(preprocess, TextInput):
        return torch.randint(0, preprocess.vocabulary, (1, *shape), generator=generator).to(device)
    return torch.randn((1, *shape), generator=generator).to(next(model.parameters()))
