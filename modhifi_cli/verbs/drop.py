"""Compression within a bound on the drop: trials in the run's folder, each kept once finished, and the best of them."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts
from modhifi_cli.records import Edit, Progress
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces
from modhifi_cli.verbs.work import Cut, Work

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
    work: Work,
    model: nn.Module,
    *,
    edit_: Callable[[Work, nn.Module, Sequence[Edit]], Cut],
    plan: Callable[[Work, nn.Module], Any],
) -> Cut:
    """Search, then leave the accepted trial's network in `model` and its edits in the run's folder.

    Args:
        work: The run.
        model: The dense network.
        edit_: (a trial's work, a copy of the network, edits done) prunes the copy.
        plan: (such a work, a copy) → the plan of such a run, before anything is cut.

    Returns:
        That of the accepted trial, with a row for every trial.

    Raises:
        ConfigError: If even the smallest cut breaks the bound; the run's folder is gone then.
    """
    from modhifi_cli.data.parts import Part
    from modhifi_cli.engine.max_drop import DropSearch, Trial, measured_drop
    from modhifi_cli.numerics.allocation import UnreachableShare

    asked, place = config.build(work.settings["target"]), work.place
    answers = _next_tokens if pieces.is_decoder(work.settings) else _logits
    fitted = dataclasses.replace(work, calibration=Part(work.calibration, share=asked.held_out, held_out=False))
    judges = dataclasses.replace(work, calibration=Part(work.calibration, share=asked.held_out, held_out=True))
    dense = answers(judges, model)
    resolution = 100 / len(dense)
    artifacts.make_folder(place.path / FOLDER)
    found = _Found.read(place.path / FOLDER / "trials.json")
    if not found.planned:
        _foresee_(found, fitted, model, dense, plan)
    while True:
        search = DropSearch(asked.value, asked.trials, resolution, found.largest, min(0.02, found.largest))
        finished = [Trial(trial["sparsity"], trial["drop"]) for trial in found.trials]
        share = search.next_share(found.start, finished)
        if share is None:
            break
        work.console.note(f"trial {len(finished) + 1} of at most {asked.trials}: {share:.1%} of {asked.of}")
        one = dataclasses.replace(
            fitted, settings=_of_share(work, share), place=place.inside(f"{FOLDER}/{len(finished):02d}")
        )
        ours = copy.deepcopy(model)
        try:
            cut = edit_(one, ours, _done(one))
        except UnreachableShare as error:
            if error.reachable >= share or found.largest <= _below(error.reachable):
                raise
            found.largest = _below(error.reachable)
            found.write()
            continue
        drop = measured_drop(dense, answers(judges, ours))
        found.trials.append(_trial(share, cut, dense, drop, accepted=drop <= asked.value))
        found.write()
        place.log(f"trial of {share:.4f}: {drop:.2f} points lost")
        del ours
    best = search.best([Trial(trial["sparsity"], trial["drop"]) for trial in found.trials])
    if best is None:
        place.discard()
        raise _unkept(work, asked, found, len(dense))
    edits, taken = _accept_(work, model, best), found.trials[best]
    rows = _rows(found.trials, best, asked.of, len(dense))
    return Cut(_summary(taken), edits, taken["predicted_error"], rows)


def _of_share(work: Work, share: float) -> dict[str, Any]:
    """The settings of a trial."""
    return {**work.settings, "sparsity": share}


def _foresee_(found: _Found, fitted: Work, model: nn.Module, dense: Tensor, plan: Callable[[Work, nn.Module], Any]) -> None:
    """Begin the search where the plan says that the bound is met."""
    from modhifi_cli.engine.max_drop import predicted_share
    from modhifi_cli.numerics.allocation import UnreachableShare

    if pieces.is_decoder(fitted.settings):  # nothing predicts what a share costs in next tokens
        found.start = _FIRST_OF_TEXT
    else:
        value = config.build(fitted.settings["target"]).value
        try:
            guess = dataclasses.replace(fitted, settings=_of_share(fitted, _GUESS))
            impact_at = plan(guess, copy.deepcopy(model)).impact_at
        except UnreachableShare as error:
            found.largest, impact_at = _below(error.reachable), None
        if impact_at is not None:
            found.start = predicted_share(dense, _up_to(impact_at), value, largest=found.largest)
    found.write()


def _done(one: Work) -> Sequence[Edit]:
    """Edits of a trial that was interrupted."""
    done, made_on = one.place.load_edits()
    if done and made_on != one.dense_hash:
        raise DataError(f"{one.place.path}: its edits were made on other weights; start a new run.")
    return done


def _trial(share: float, cut: Cut, dense: Tensor, drop: float, *, accepted: bool) -> dict[str, Any]:
    """A finished trial as it is kept."""
    from modhifi_cli.engine.max_drop import predicted_drop

    summary = cut.summary
    impact = getattr(summary, "predicted_impact", None)
    return {
        "sparsity": share,
        "achieved": dict(summary.achieved),
        "latency": summary.latency,
        "warnings": list(summary.warnings),
        "predicted_error": cut.predicted,
        "predicted_drop": None if impact is None else predicted_drop(dense, impact),
        "drop": drop,
        "accepted": accepted,
    }


def _unkept(work: Work, asked: Any, found: _Found, judges: int) -> ConfigError:
    """The bound cannot be kept, in one sentence."""
    what = "tokens" if pieces.is_decoder(work.settings) else "images"
    last = min(found.trials, key=lambda trial: trial["sparsity"])
    return ConfigError(
        f"target.value={asked.value:g} cannot be kept: even {last['sparsity']:.1%} fewer {asked.of} cost "
        f"{last['drop']:.2f} points of agreement on the {judges} held-out {what} (one {what[:-1]} is "
        f"{100 / judges:.2f}); raise target.value, give more calibration {what}, or choose another preset."
    )


def _accept_(work: Work, model: nn.Module, best: int) -> list[Edit]:
    """Apply a trial's edits to the network and put them into the run's folder."""
    from modhifi_cli.graph.surgery import apply_edit_

    edits = list(work.place.inside(f"{FOLDER}/{best:02d}").load_edits()[0])
    for edit in edits:
        apply_edit_(model, edit)
    for edit in edits[len(work.place.load_edits()[0]) :]:
        work.place.save_edit(edit, work.dense_hash)
    return edits


def _summary(trial: Mapping[str, Any]) -> Any:
    from modhifi_cli.engine.plan import Summary

    return Summary(trial["achieved"], tuple(trial["warnings"]), trial["latency"])


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


def _logits(judges: Work, model: nn.Module) -> Tensor:
    """Logits of a network on the held-out images, ``[images, classes]`` float64 on the CPU."""
    from modhifi_cli.evaluation.forward import logits_of_batches, ready_to_measure

    with ready_to_measure({"network": model}, judges.device):
        batches = logits_of_batches(
            {"network": model},
            judges.calibration,
            place="data",
            stage="held-out agreement",
            device=judges.device,
            batch_size=judges.settings["runtime"]["batch_size"],
            progress=judges.console.progress,
        )
        return torch.cat([logits["network"] for logits, _ in batches])


def _next_tokens(judges: Work, model: nn.Module) -> Tensor:
    """The token that a language model expects behind every held-out token, ``[tokens]`` int64 on the CPU."""
    from modhifi_cli.evaluation.forward import ready_to_measure

    expected, done = [], 0
    with ready_to_measure({"network": model}, judges.device), torch.inference_mode():
        for tokens, _ in judges.calibration.batches(1):  # one sequence: logits over a vocabulary are large
            expected.append(model(tokens.to(judges.device)).logits.argmax(-1).flatten().cpu())
            done += len(tokens)
            judges.console.progress(Progress("held-out agreement", "tokens", done, len(judges.calibration)))
    return torch.cat(expected)
