"""What the functions for Python return: records with every number, a line or two for a prompt, a table for a notebook."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from modhifi_cli.console import number
from modhifi_cli.graph.components import Refusal
from modhifi_cli.pages import many, terms
from modhifi_cli.records import Edit


class Shown:
    """A record that is shown by what matters of it; the numbers are its attributes."""

    _title: ClassVar[str]

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        """Rows of the table."""
        raise NotImplementedError

    def _told(self) -> str:
        """What happened, in a sentence without its stop."""
        raise NotImplementedError

    def _said(self) -> Sequence[str]:
        """Sentences to read."""
        return getattr(self, "warnings", ())

    def __repr__(self) -> str:
        said = self._said()
        warned = "" if not said else f"; {len(said)} warning{'s' if len(said) > 1 else ''}"
        return f"{type(self).__name__}({self._told()}{warned})"

    def _repr_html_(self) -> str:
        rows = self._lines()
        heads = "".join(f"<th>{html.escape(str(head))}</th>" for head in (rows[0] if rows else ()))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(number(cell))}</td>" for cell in row.values()) + "</tr>" for row in rows
        )
        said = "".join(f"<li>{html.escape(text)}</li>" for text in self._said())
        return (
            f"<p>{html.escape(self._told())}</p><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
            + (f"<ul>{said}</ul>" if said else "")
        )


@dataclass(frozen=True, repr=False)
class Pruned(Shown):
    """What `prune` did.

    Attributes:
        removed: Group → numbers of the dense components that are gone, ``[removed]`` int64 sorted.
        kept: Group → those that are left, ``[kept]`` int64 sorted.
        refused: Coupled channels that were left alone, each with its reason.
        achieved: Share removed of ``"params"``, ``"flops"`` and ``"components"``, 0 … 1; of a language model
            ``"params"`` are those of its decoder layers and ``"model_params"`` all; with ``target="latency"``
            ``"latency"`` is the share of time that the clock found saved.
        before: Parameters and multiply-accumulates of one sample, of the network that was given.
        after: The same of the new one.
        edits: Every step, for `modhifi_cli.graph.surgery.apply_edit_` on the dense network.
        warnings: Sentences to read; one says so where the network was trained (``settings=["healing=distill"]``).
    """

    removed: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    refused: tuple[Refusal, ...]
    achieved: Mapping[str, float]
    before: Mapping[str, int]
    after: Mapping[str, int]
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...]

    def _told(self) -> str:
        return f"{terms.removed(self.achieved)} removed from {len(self.kept)} groups"

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        names = {"parameters": "parameters", "macs": "FLOPs (MACs)"}
        units = {"parameters": "parameters", "macs": "MACs"}
        return [
            {"": names[key], "before": terms.quantity(self.before[key], units[key]), "after": terms.quantity(self.after[key], units[key]),
             "change": terms.change(self.before[key], self.after[key], units[key])}
            for key in self.before
        ]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Unlearned(Shown):
    """What `unlearn` did. What the network still holds, only `audit` says.

    Attributes:
        forgotten: Classes, sorted.
        layers: Edited layers in order.
        strength: Name of the method's strength → the value that was given or found.
        trials: What was tried to find it: strength, forget and retain accuracy on calibration images, 0 … 1.
        edits: Every step, for `modhifi_cli.graph.surgery.apply_edit_`.
        warnings: Sentences to read.
    """

    forgotten: tuple[int, ...]
    layers: tuple[str, ...]
    strength: Mapping[str, float]
    trials: tuple[Mapping[str, Any], ...]
    edits: tuple[Edit, ...]
    warnings: tuple[str, ...]

    def _told(self) -> str:
        strengths = ", ".join(f"{name} {value:g}" for name, value in self.strength.items())
        many = "classes" if len(self.forgotten) > 1 else "class"
        return f"{many} {', '.join(map(str, self.forgotten))} edited out of {len(self.layers)} layers, {strengths}"

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        return [
            {key: terms.percent(value) if isinstance(value, float) and key in ("forget", "retain") else value
             for key, value in trial.items()}
            for trial in self.trials
        ]  # fmt: skip


@dataclass(frozen=True, repr=False)
class Audited(Shown):
    """What `audit` found.

    Attributes:
        verdict: In words.
        sentences: Its grounds.
        figures: Network (``dense``, ``edited``, ``head_only``, ``reference``) → figure → value, None where it could not
            be had; %, but for steps and TV bounds.
        definitions: What every figure means.
        report: Everything, as plain mappings and lists: what the command line writes into audit.json.
        rows: The table that the command line shows.
    """

    verdict: str
    sentences: tuple[str, ...]
    figures: Mapping[str, Mapping[str, float | None]]
    definitions: Mapping[str, str]
    report: Mapping[str, Any] = field(repr=False)
    rows: tuple[Mapping[str, str], ...]

    def _told(self) -> str:
        return self.verdict

    def _said(self) -> Sequence[str]:
        return ()

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        return self.rows

    def _repr_html_(self) -> str:
        grounds = "".join(f"<li>{html.escape(text)}</li>" for text in self.sentences)
        return super()._repr_html_() + f"<ul>{grounds}</ul>"


@dataclass(frozen=True, repr=False)
class Compared(Shown):
    """What `compare` found.

    Attributes:
        rows: One mapping a method and budget: ``method``, ``budget``, and every measured term.
        finding: The sentence that the numbers say; "" where there is nothing to compare.
        dense: Measured terms of the dense network.
        networks: (method, budget) → the network.
        failed: Sentences, one a combination that could not be.
        grouped: The rows as the pages of the command line take them.
    """

    rows: tuple[Mapping[str, Any], ...]
    finding: str
    dense: Mapping[str, float]
    networks: Mapping[tuple[str, float], Any]
    failed: tuple[str, ...]
    grouped: tuple[many.Row, ...]

    def _told(self) -> str:
        return self.finding or f"{len(self.rows)} rows"

    def _said(self) -> Sequence[str]:
        return self.failed

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        return many.lines(self.grouped, self.dense)


class Measured(dict[str, float], Shown):
    """What `evaluate` measured: a dictionary of terms, shown as a table in a notebook."""

    __repr__ = dict.__repr__

    def _told(self) -> str:
        return "measured"

    def _lines(self) -> Sequence[Mapping[str, Any]]:
        return [{"term": key.replace("_", " "), "value": value} for key, value in self.items()]

    def _said(self) -> Sequence[str]:
        return ()
