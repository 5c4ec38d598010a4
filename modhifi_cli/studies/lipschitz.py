"""Lipschitz constants: how much of a layer's error reaches the answer, measured and in the worst case of the weights.

ModHiFi, arXiv:2511.19566: E‖N(X) − N'(X)‖² ≤ K Σ_c E‖y_c − y'_c‖². Measured is the ratio of both sides when the
components with the lowest scores of one layer are removed without repair. The worst case is the square of what
`graph/gains.py` says. Networks with LayerNorm or RMSNorm have constants max |γ| / r, with r the smallest standard
deviation (LayerNorm) or root mean square (RMSNorm) that enters the normalisation on the data.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.graph.answers import respond
from modhifi_cli.graph.gains import worst_case_gains
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.numerics.moments import second_moment
from modhifi_cli.records import Chart, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject
from modhifi_cli.studies.settings import median, need_samples, need_shares
from modhifi_cli.studies.subject import weights_kept, zero_components_

_FEWEST = 8
_CLAIM = "The ratio of global to local error is small: 10 to 50 (ResNet-50 on ImageNet)."
_WORST = "The constants of the worst case are far too large to say anything about trained networks."
_NORMS = "Norms that enter the normalisations of trained networks lie between 0.2 and 60."
_LEVELS = {"smallest": 0.0, "1 %": 0.01, "median": 0.5, "99 %": 0.99, "largest": 1.0}


@dataclass(frozen=True)
class Lipschitz:
    """Settings of the study.

    Attributes:
        share: Share of a layer's components that are removed to make its error.
    """

    share: float = 0.1

    def __post_init__(self) -> None:
        need_shares("study.share", self.share)

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """One cell a layer, one for the worst case, and one for the norms where the network has such normalisations."""
        need_samples("lipschitz", subject, _FEWEST)
        cells: list[Cell] = [{"of": "ratio", "layer": layer} for layer in subject.layers(None)]
        if not subject.reads_text:
            cells.append({"of": "worst case"})
        return [*cells, {"of": "norms"}] if normalisations(subject.model) else cells

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """Both errors of one layer; or the worst case of all layers; or what enters every normalisation."""
        if cell["of"] == "ratio":
            return (yield from self._ratio(subject, cell["layer"]))
        if cell["of"] == "norms":
            return (yield from _norms(subject))
        yield Progress("worst case", type(subject.model).__name__, 0, 1)
        gains = worst_case_gains(subject.model, subject.example.to(subject.device))
        return [
            {
                "of": "worst case", "layer": layer, "worst_case": gain**2 if gain < 1e150 else math.inf,
                "unbounded": ", ".join(gains.unbounded),
            }
            for layer, gain in gains.of.items()
        ]  # fmt: skip

    def _ratio(self, subject: Subject, layer: str) -> Generator[Progress, None, list[Row]]:
        consumers = yield from subject.consumers([layer], item=layer)
        consumer = consumers[layer]
        count = max(1, round(self.share * consumer.components))
        removed = subject.scores(consumer).argsort(stable=True)[:count].cpu()
        module = subject.model.get_submodule(layer)
        with weights_kept(subject.model):
            dense = module.weight.detach().flatten(1).double().clone()
            zero_components_(module, removed)
            lost = dense - module.weight.detach().flatten(1).double()
            moment = second_moment(consumer.statistics, centred=False)
            local = float(((lost @ moment.to(lost)) * lost).sum())
            edited = yield from _logits(subject, layer)
        intact = yield from _dense_logits(subject)
        answers = sum(len(batch) for batch in intact)
        reached = sum(float((one - other).double().square().sum()) for one, other in zip(edited, intact, strict=True))
        rows = consumer.statistics.rows / answers
        return [
            {
                "of": "ratio", "layer": layer, "components": consumer.components, "removed": count,
                "rows_per_answer": rows, "local_error_per_row": local, "local_error": local * rows,
                "global_error": reached / answers,
                "ratio": reached / answers / (local * rows) if local > 0 else math.nan,
                "ratio_per_row": reached / answers / local if local > 0 else math.nan,
            }
        ]  # fmt: skip

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """Ratio and worst case of every layer, and the norms."""
        worst = {row["layer"]: row["worst_case"] for row in rows if row["of"] == "worst case"}
        unbounded = next((row["unbounded"] for row in rows if row["of"] == "worst case" and row["unbounded"]), "")
        ratios = [row for row in rows if row["of"] == "ratio"]
        norms = [row for row in rows if row["of"] == "norms"]
        summary: list[Row] = [
            {"layer": row["layer"], "ratio": row["ratio"], "ratio per row": row["ratio_per_row"]}
            | ({"worst case": worst[row["layer"]]} if math.isfinite(worst.get(row["layer"], math.inf)) else {})
            for row in ratios
        ]
        if not ratios:
            summary = [{key: value for key, value in row.items() if key != "of"} for row in norms]
        notes = [
            f"{100 * self.share:g} % of one layer's components (the lowest scores) are removed without repair. The "
            "ratio is E‖change of the logits‖² over E‖change of the layer's output‖², summed over outputs and "
            "positions; per row the local error is the mean over positions instead of their sum."
        ]
        if unbounded:
            notes.append(f"No worst case follows from the weights, because of steps without a constant: {unbounded}.")
        findings = list(_findings(ratios, worst, norms, unbounded))
        return Outcome(tuple(findings), tuple(_charts(ratios, worst, norms)), tuple(summary), tuple(notes))


def normalisations(model: nn.Module) -> tuple[str, ...]:
    """Names of the LayerNorms and RMSNorms of a network."""
    return tuple(name for name, module in model.named_modules() if _is_norm(module))


def _is_norm(module: nn.Module) -> bool:
    named = type(module).__name__.endswith(("LayerNorm", "RMSNorm", "LayerNorm2d"))
    return named and isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 1


def _centred(module: nn.Module) -> bool:
    return "RMS" not in type(module).__name__


def entering(module: nn.Module, inputs: Tensor) -> Tensor:
    """Standard deviation (LayerNorm) or root mean square (RMSNorm) of every vector that is read, ``[vectors]``.

    Args:
        module: The normalisation; its weight says how long a vector is.
        inputs: What it reads: vectors along the last axis, or along the channels of maps (LayerNorm2d).
    """
    if type(module).__name__.endswith("2d"):
        inputs = inputs.movedim(1, -1)
    vectors = inputs.detach().flatten(0, -2).double()
    if _centred(module):
        vectors = vectors - vectors.mean(1, keepdim=True)
    return vectors.square().mean(1).sqrt()


def _norms(subject: Subject) -> Generator[Progress, None, list[Row]]:
    found: dict[str, list[Tensor]] = {}
    modules = {name: subject.model.get_submodule(name) for name in normalisations(subject.model)}

    def look(name: str):
        return lambda inputs: found.setdefault(name, []).append(entering(modules[name], inputs).float().cpu())

    done = 0
    for batch, _ in subject.calibration.batches(subject.batch_size):
        with torch.no_grad(), inputs_seen(subject.model, {name: look(name) for name in modules}):
            respond(subject.model, batch.to(subject.device))
        done += len(batch)
        yield Progress("images", "norms", done, len(subject.calibration))
    rows = []
    for name, parts in found.items():
        values = torch.cat(parts).double().sort().values
        weight = modules[name].weight.detach().double()
        quantiles = {key: float(values[round(place * (len(values) - 1))]) for key, place in _LEVELS.items()}
        rows.append(
            {
                "of": "norms", "layer": name, "kind": "std" if _centred(modules[name]) else "RMS", **quantiles,
                "smallest norm": quantiles["smallest"] * math.sqrt(len(weight)),
                "largest norm": quantiles["largest"] * math.sqrt(len(weight)),
                "constant": float(weight.abs().max()) / max(quantiles["smallest"], 1e-300), "vectors": len(values),
            }
        )  # fmt: skip
    return rows


def _logits(subject: Subject, item: str) -> Generator[Progress, None, list[Tensor]]:
    """Logits of every answer: an image, or a token of a text, ``[answers, classes]`` a batch."""
    found, done = [], 0
    for batch, _ in subject.calibration.batches(subject.batch_size):
        with torch.no_grad():
            found.append(respond(subject.model, batch.to(subject.device)).flatten(0, -2).cpu())
        done += len(batch)
        yield Progress("images", item, done, len(subject.calibration))
    return found


def _dense_logits(subject: Subject) -> Generator[Progress, None, list[Tensor]]:
    return (yield from subject.remembered("logits", lambda: _logits(subject, "dense")))


def _findings(
    ratios: Sequence[Row], worst: dict[str, float], norms: Sequence[Row], unbounded: str
) -> Generator[Finding, None, None]:
    if ratios:
        values = sorted(row["ratio"] for row in ratios if math.isfinite(row["ratio"]))
        per_row = sorted(row["ratio_per_row"] for row in ratios if math.isfinite(row["ratio_per_row"]))
        if values:
            told = f"Over {len(values)} layers: {values[0]:.2g} to {values[-1]:.3g}, median {median(values):.2g}"
            told += f" (local error summed over positions); {per_row[0]:.2g} to {per_row[-1]:.3g}, median "
            told += f"{median(per_row):.2g} (mean over positions)."
            yield Finding(_CLAIM, told, values[-1] <= 50)
    pairs = [
        (row["ratio"], worst[row["layer"]])
        for row in ratios
        if row["ratio"] > 0 and math.isfinite(worst.get(row["layer"], math.inf))
    ]
    if pairs:
        slack = [bound / ratio for ratio, bound in pairs]
        yield Finding(
            _WORST,
            f"The worst case is {min(slack):.2g} to {max(slack):.2g} times the measured, median {median(slack):.2g}.",
            median(slack) > 100,
        )
    elif worst and unbounded:
        yield Finding(_WORST, f"There is none: {unbounded} have no constant from the weights.", None)
    if norms:
        low, high = min(row["smallest norm"] for row in norms), max(row["largest norm"] for row in norms)
        small, large = min(row["smallest"] for row in norms), max(row["largest"] for row in norms)
        inside = sum(row["smallest norm"] >= 0.2 and row["largest norm"] <= 60 for row in norms)
        told = f"Norms {low:.3g} to {high:.4g} over {len(norms)} normalisations; all between 0.2 and 60 in {inside} of "
        told += f"them. Per √d (standard deviation or RMS): {small:.3g} to {large:.4g}; constants max |γ| / r up to "
        told += f"{max(row['constant'] for row in norms):.3g}, median {median(row['constant'] for row in norms):.2g}."
        yield Finding(_NORMS, told, inside == len(norms))


def _charts(ratios: Sequence[Row], worst: dict[str, float], norms: Sequence[Row]) -> list[Chart]:
    charts = []
    if ratios:
        places = tuple(float(number) for number in range(1, len(ratios) + 1))
        series = [Series("measured", tuple(row["ratio"] for row in ratios), places)]
        if any(row["ratio_per_row"] != row["ratio"] for row in ratios):
            series.append(Series("measured, per row", tuple(row["ratio_per_row"] for row in ratios), places))
        bounds = tuple(worst.get(row["layer"], math.nan) for row in ratios)
        if any(math.isfinite(bound) for bound in bounds):
            finite = tuple(bound if math.isfinite(bound) else math.nan for bound in bounds)
            series.append(Series("worst case", finite, places, baseline=True))
        charts.append(
            Chart(
                name="lipschitz",
                title="How much of a layer's error reaches the logits",
                x_label="layer, in the order of execution",
                y_label="squared error of the logits / of the layer",
                series=tuple(series),
                y_log=True,
            )
        )
    if norms:
        places = tuple(float(number) for number in range(1, len(norms) + 1))
        charts.append(
            Chart(
                name="norms",
                title="What enters the normalisations",
                x_label="normalisation, in the order of execution",
                y_label=f"{' or '.join(dict.fromkeys(row['kind'] for row in norms))} of a vector",
                series=tuple(Series(level, tuple(row[level] for row in norms), places) for level in _LEVELS),
                y_log=True,
            )
        )
    return charts
