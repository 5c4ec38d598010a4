"""Compression within a bound on the drop: trials in the run's folder, each kept once finished, and the best of them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts
from modhifi_cli.records import Edit, ImageSource, Progress
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces

FOLDER = "trials"
_FIRST_OF_TEXT = 0.1  # share of the first trial with a language model
_GUESS = 0.3  # share at which the plan is asked what other shares would cost


@dataclasses.dataclass
class _Found:
    """What is known of a search; kept in the run's folder after every trial.

    Attributes:
        start: Predicted share for the first trial, or None.
        largest: Largest share that can be reached, as far as known.
        trials: One mapping per finished trial.
    """

    file: Path
    start: float | None = None
    largest: float = 0.95
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    planned: bool = False

    @classmethod
    def read(cls, file: Path) -> "_Found":
        if not file.is_file():
            return cls(file)
        kept = artifacts.read_object(file, "the trials of a run")
        try:
            return cls(file, kept["start"], float(kept["largest"]), list(kept["trials"]), True)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{file}: damaged ({error}); remove the run folder and start again.") from error

    def write(self) -> None:
        self.planned = True
        artifacts.write_json(self.file, {"start": self.start, "largest": self.largest, "trials": self.trials})


def search_(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: ImageSource,
    device: torch.device,
    place: artifacts.RunDirectory,
    dense_hash: str,
    console: Console,
    *,
    edit_: Callable[..., tuple[Any, list[Edit], dict[str, float]]],
    plan: Callable[[nn.Module, Mapping[str, Any], ImageSource], Any],
) -> tuple[Any, list[Edit], dict[str, float], list[dict[str, Any]]]:
    """Search, then leave the accepted trial's network in `model` and its edits in the run's folder.

    Args:
        edit_: (model, settings, calibration, edits done, place) prunes a copy; summary, edits, predicted errors.
        plan: (model, settings, calibration) → the plan of such a run, before anything is cut.

    Returns:
        Summary, edits and predicted errors of the accepted trial, and a row for every trial.

    Raises:
        ConfigError: If even the smallest cut breaks the bound; the run's folder is gone then.
    """
    from modhifi_cli.data.parts import Part
    from modhifi_cli.engine.max_drop import DropSearch, Trial, measured_drop, predicted_drop, predicted_share
    from modhifi_cli.engine.plan import Summary
    from modhifi_cli.graph.surgery import apply_edit_
    from modhifi_cli.numerics.allocation import UnreachableShare

    asked = config.build(settings["target"])
    of_text = pieces.is_decoder(settings)
    answers = _next_tokens if of_text else _logits
    fitted = Part(calibration, share=asked.held_out, held_out=False)
    judges = Part(calibration, share=asked.held_out, held_out=True)
    dense = answers(model, judges, settings, device, console)
    resolution, what = 100 / len(dense), "tokens" if of_text else "images"
    artifacts.make_folder(place.path / FOLDER)
    found = _Found.read(place.path / FOLDER / "trials.json")

    def of_share(share: float) -> dict[str, Any]:
        return {**settings, "sparsity": share}

    if not found.planned and of_text:  # nothing predicts what a share costs in next tokens
        found.start = _FIRST_OF_TEXT
        found.write()
    elif not found.planned:
        try:
            impact_at = plan(copy.deepcopy(model), of_share(_GUESS), fitted).impact_at
        except UnreachableShare as error:
            found.largest, impact_at = _below(error.reachable), None
        if impact_at is not None:
            found.start = predicted_share(dense, _up_to(impact_at), asked.value, largest=found.largest)
        found.write()
    while True:
        search = DropSearch(asked.value, asked.trials, resolution, found.largest, min(0.02, found.largest))
        finished = [Trial(trial["sparsity"], trial["drop"]) for trial in found.trials]
        share = search.next_share(found.start, finished)
        if share is None:
            break
        console.note(f"trial {len(finished) + 1} of at most {asked.trials}: {share:.1%} of {asked.of}")
        inner = place.inside(f"{FOLDER}/{len(finished):02d}")
        done, made_on = inner.load_edits()
        if done and made_on != dense_hash:
            raise DataError(f"{inner.path}: its edits were made on other weights; start a new run.")
        ours = copy.deepcopy(model)
        try:
            summary, edits, errors = edit_(ours, of_share(share), fitted, done, inner)
        except UnreachableShare as error:
            if error.reachable >= share or found.largest <= _below(error.reachable):
                raise
            found.largest = _below(error.reachable)
            found.write()
            continue
        drop = measured_drop(dense, answers(ours, judges, settings, device, console))
        impact = getattr(summary, "predicted_impact", None)
        found.trials.append(
            {
                "sparsity": share,
                "achieved": dict(summary.achieved),
                "latency": summary.latency,
                "warnings": list(summary.warnings),
                "predicted_error": errors,
                "predicted_drop": None if impact is None else predicted_drop(dense, impact),
                "drop": drop,
                "accepted": drop <= asked.value,
            }
        )
        found.write()
        place.log(f"trial of {share:.4f}: {drop:.2f} points lost")
        del ours
    best = search.best([Trial(trial["sparsity"], trial["drop"]) for trial in found.trials])
    if best is None:
        last = min(found.trials, key=lambda trial: trial["sparsity"])
        place.discard()
        raise ConfigError(
            f"target.value={asked.value:g} cannot be kept: even {last['sparsity']:.1%} fewer {asked.of} cost "
            f"{last['drop']:.2f} points of agreement on the {len(dense)} held-out {what} (one {what[:-1]} is "
            f"{resolution:.2f}); raise target.value, give more calibration {what}, or choose another preset."
        )
    edits = list(place.inside(f"{FOLDER}/{best:02d}").load_edits()[0])
    for edit in edits:
        apply_edit_(model, edit)
    for edit in edits[len(place.load_edits()[0]) :]:
        place.save_edit(edit, dense_hash)
    accepted = found.trials[best]
    summary = Summary(accepted["achieved"], tuple(accepted["warnings"]), accepted["latency"])
    return summary, edits, accepted["predicted_error"], _rows(found.trials, best, asked.of, len(dense))


def _below(reachable: float) -> float:
    return max(reachable - 0.002, 0.0)


def _up_to(impact_at: Callable[[float], float]) -> Callable[[float], float]:
    """As `impact_at`, infinite where the share cannot be reached."""
    from modhifi_cli.numerics.allocation import UnreachableShare

    def impact(share: float) -> float:
        try:
            return impact_at(share)
        except UnreachableShare:
            return 1e6

    return impact


def _rows(trials: Sequence[Mapping[str, Any]], best: int, of: str, judges: int) -> list[dict[str, Any]]:
    """The trials for the report, in the order in which they were made."""
    rows = []
    for number, trial in enumerate(trials):
        predicted = trial["predicted_drop"]
        share = trial["drop"] / 100
        rows.append(
            {
                f"asked, {of}": f"{trial['sparsity']:.1%}",
                "predicted drop, points": "" if predicted is None else f"{predicted:.2f}",
                "measured drop, points": f"{trial['drop']:.2f}",
                "standard error": f"{100 * (share * (1 - share) / judges) ** 0.5:.2f}",
                "verdict": "taken" if number == best else "kept the bound" if trial["accepted"] else "broke the bound",
            }
        )
    return rows


def _logits(
    model: nn.Module, images: ImageSource, settings: Mapping[str, Any], device: torch.device, console: Console
) -> Tensor:
    """Logits of a network on the held-out images, ``[images, classes]`` float64 on the CPU."""
    from modhifi_cli.evaluation.forward import logits_of_batches, ready_to_measure

    with ready_to_measure({"network": model}, device):
        batches = logits_of_batches(
            {"network": model},
            images,
            place="data",
            stage="held-out agreement",
            device=device,
            batch_size=settings["runtime"]["batch_size"],
            progress=console.progress,
        )
        return torch.cat([logits["network"] for logits, _ in batches])


def _next_tokens(
    model: nn.Module, sequences: ImageSource, settings: Mapping[str, Any], device: torch.device, console: Console
) -> Tensor:
    """The token that a language model expects behind every held-out token, ``[tokens]`` int64 on the CPU."""
    from modhifi_cli.evaluation.forward import ready_to_measure

    expected, done = [], 0
    with ready_to_measure({"network": model}, device), torch.inference_mode():
        for tokens, _ in sequences.batches(1):  # one sequence: logits over a vocabulary are large
            expected.append(model(tokens.to(device)).logits.argmax(-1).flatten().cpu())
            done += len(tokens)
            console.progress(Progress("held-out agreement", "tokens", done, len(sequences)))
    return torch.cat(expected)
