"""Existence: do a few components carry most of a layer's output, and does a simple score find them?

ModHiFi, arXiv:2511.19566: for each layer and size, the best subset fidelity over random subsets beside that of the
top-k by score, and of backward elimination. Everything follows from one second moment (`numerics/subsets.py`).
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from modhifi_cli.errors import ConfigError, DataError, is_whole
from modhifi_cli.numerics.contributions import SimilarityBlocks, contribution_moments
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.fidelity import singleton_fidelity
from modhifi_cli.numerics.subsets import leading_fidelity, leading_joint_fidelity, random_orders
from modhifi_cli.records import Chart, Consumer, Finding, Progress, Series
from modhifi_cli.studies import Cell, Outcome, Row, Subject

LEVELS = (0.8, 0.9)
_ORDERS_AT_ONCE = 64
_FEWEST_IMAGES = 32
_CLAIM = "Fewer than 20 % of the components reach a fidelity of 0.8 in at least half of the layers."
_NAIVE = "The naive top-k by singleton fidelity comes close to the best subset."
_UNTRAINED = (
    "It is training that concentrates fidelity: an untrained network needs clearly more components (here: a quarter)."
)


@dataclass(frozen=True)
class Existence:
    """Settings of the study.

    Attributes:
        subsets: Random subsets of each size.
        outputs: Outputs of a layer with several features a component that are looked at, drawn with the seed; None
            for all. (With one feature a component all outputs share one factor.)
        untrained: Whether fresh weights are looked at, too.
    """

    subsets: int = 1000
    outputs: int | None = 64
    untrained: bool = True

    def __post_init__(self) -> None:
        if not _whole(self.subsets, 1) or not (self.outputs is None or _whole(self.outputs, 1)):
            raise ConfigError(
                f"study.subsets and study.outputs must be whole numbers from 1, got {self.subsets} and {self.outputs}."
            )

    def cells(self, subject: Subject) -> Sequence[Cell]:
        """One cell a layer and kind of weights."""
        if len(subject.calibration) < _FEWEST_IMAGES:
            raise DataError(
                f"existence: fidelity needs at least {_FEWEST_IMAGES} images, got {len(subject.calibration)}; "
                "raise data.num_samples."
            )
        weights = ("trained", "untrained") if self.untrained else ("trained",)
        return [
            {"weights": kind, "layer": layer, "seed": subject.seeds[0]}
            for kind in weights
            for layer in subject.layers()
        ]

    def compute(self, subject: Subject, cell: Cell) -> Generator[Progress, None, list[Row]]:
        """Fidelity of every size, one row each."""
        layer, seed = cell["layer"], cell["seed"]
        model = None
        if cell["weights"] == "untrained":
            like = next(subject.model.parameters())
            model = subject.untrained().to(device=like.device, dtype=like.dtype).eval()
        found = yield from subject.consumers([layer], model=model, item=layer)
        consumer = found[layer]
        _enough_rows(consumer)
        scored = subject.scores(consumer).argsort(descending=True, stable=True)
        path = elimination([consumer], keep=1)
        greedy = torch.cat([path.kept(1).to(path.order.device), path.order.flip(0)])
        chosen = torch.stack([scored.cpu(), greedy.cpu()])
        generator = torch.Generator().manual_seed(seed)
        orders = torch.cat([chosen, random_orders(consumer.components, self.subsets, generator=generator)])
        curves = yield from _curves(consumer, orders, self._outputs(consumer, generator), layer)
        rebuilt, energy = leading_joint_fidelity(consumer, chosen)
        joint = (rebuilt.sum(0) / energy.sum()).tolist()
        return [
            {
                "layer": layer,
                "weights": cell["weights"],
                "components": consumer.components,
                "kept": kept,
                "share": kept / consumer.components,
                "random_best": float(curves.shared[2:, kept - 1].max()),
                "random_mean": float(curves.shared[2:, kept - 1].mean()),
                "top_k": float(curves.shared[0, kept - 1]),
                "greedy": float(curves.shared[1, kept - 1]),
                "own_random_best": float(curves.own_best[kept - 1]),
                "own_top_k": float(curves.own_top[kept - 1]),
                "joint_top_k": joint[0][kept - 1],
                "joint_greedy": joint[1][kept - 1],
                "outputs": curves.outputs,
                "rows": consumer.statistics.rows,
            }
            for kept in range(1, consumer.components + 1)
        ]

    def conclude(self, rows: Sequence[Row]) -> Outcome:
        """How many components reach 0.8 and 0.9, in how many layers."""
        layers = list(dict.fromkeys(row["layer"] for row in rows))
        kinds = list(dict.fromkeys(row["weights"] for row in rows))
        summary = []
        for kind in kinds:
            for layer in layers:
                own = [row for row in rows if row["layer"] == layer and row["weights"] == kind]
                if own:
                    summary.append(_needed(own))
        return Outcome(
            findings=tuple(_findings(summary, self.subsets)),
            charts=(_curve_chart(rows, layers, self.subsets), _needed_chart(summary)),
            summary=tuple(summary),
            notes=(
                "A set serves the whole layer where nothing else is said: its fidelity is the share of the summed "
                "energy of all outputs, each component rescaled for each output (M3). 'Own' lets every output have a "
                "set of its own. 'Joint' frees the kept weights instead (M8).",
                f"The {self.subsets:,} random subsets of each size are the beginnings of as many random orders.",
            ),
        )

    def _outputs(self, consumer: Consumer, generator: torch.Generator) -> Tensor:
        every = len(consumer.weight)
        if self.outputs is None or every <= self.outputs:
            return torch.arange(every)
        return torch.randperm(every, generator=generator)[: self.outputs].sort().values


@dataclass(frozen=True)
class _Curves:
    shared: Tensor  # [orders, components]: one set for all outputs
    own_best: Tensor  # [components]: each output takes the best of the random sets for itself
    own_top: Tensor  # [components]: each output takes its own top-k
    outputs: int


def _curves(consumer: Consumer, orders: Tensor, outputs: Tensor, item: str) -> Generator[Progress, None, _Curves]:
    """Energy rebuilt by all leading parts of the orders (the first two are not random), over all outputs."""
    size = consumer.components
    shared, best, top = torch.zeros(len(orders), size).double(), torch.zeros(size).double(), torch.zeros(size).double()
    scores = singleton_fidelity(contribution_moments(consumer))
    own_orders = scores.argsort(dim=1, descending=True, stable=True)
    weight = consumer.weight
    # With one feature a component and no zero weight, one factor serves every output.
    at_once = weight.shape[1] == size and bool((weight != 0).all())
    energy = 0.0
    if at_once:
        outputs = torch.arange(len(weight))
        most = torch.zeros(len(weight), size, dtype=torch.float64, device=weight.device)
        for start in range(0, len(orders), _ORDERS_AT_ONCE):
            rebuilt, energies = leading_joint_fidelity(consumer, orders[start : start + _ORDERS_AT_ONCE])
            shared[start : start + _ORDERS_AT_ONCE] = rebuilt.sum(0).cpu()
            random = rebuilt[:, max(2 - start, 0) :]
            if random.shape[1]:
                most = torch.maximum(most, random.amax(1))
            yield Progress("subsets", item, min(start + _ORDERS_AT_ONCE, len(orders)), len(orders))
        best, energy = most.sum(0).cpu(), float(energies.sum())
    blocks = SimilarityBlocks(consumer)
    step = 1 if not at_once else max(1, blocks.outputs_per_chunk)
    for start in range(0, len(outputs), step):
        part = outputs[start : start + step]
        gram = blocks.of(part)
        energies = gram.sum((1, 2)).clamp_min(0)
        top += (leading_fidelity(gram, own_orders[part][:, None])[:, 0] * energies[:, None]).sum(0).cpu()
        if not at_once:
            rebuilt = leading_fidelity(gram, orders) * energies[:, None, None]
            shared += rebuilt.sum(0).cpu()
            best += rebuilt[:, 2:].amax(1).sum(0).cpu()
            energy += float(energies.sum())
            yield Progress("subsets", item, start + len(part), len(outputs))
    return _Curves(shared / energy, best / energy, top / energy, len(outputs))


def _enough_rows(consumer: Consumer) -> None:
    features, rows = consumer.weight.shape[1], consumer.statistics.rows
    if rows <= features:
        raise DataError(
            f"{consumer.name}: fidelity needs more rows than its {features} features, got {rows}; any subset would "
            f"seem to rebuild the output. Raise data.num_samples about {-(-2 * features // max(rows, 1))}-fold, "
            "or leave the layer out of layers=[…]."
        )


_KINDS = {
    "own_random_best": "own sets, best random",
    "random_best": "one set, best random",
    "top_k": "one set, top-k by score",
    "greedy": "one set, greedy",
    "joint_greedy": "one set, greedy, joint repair",
}


def _needed(rows: Sequence[Row]) -> Row:
    """Share of components that reach each level, for each way of choosing."""
    found: Row = {key: rows[0][key] for key in ("layer", "weights", "components")}
    for level in LEVELS:
        for key in _KINDS:
            kept = next(row["kept"] for row in rows if row[key] >= level or row["kept"] == row["components"])
            found[f"{key}_{level:g}"] = kept / rows[0]["components"]
    return found


def _findings(summary: Sequence[Row], subsets: int) -> list[Finding]:
    trained = [row for row in summary if row["weights"] == "trained"]
    if not trained:
        return []
    few = {key: sum(row[f"{key}_0.8"] < 0.2 for row in trained) for key in _KINDS}
    half = len(trained) / 2
    told = "; ".join(f"{_KINDS[key]}: {count} of {len(trained)} layers" for key, count in few.items())
    median = {key: _median(row[f"{key}_0.8"] for row in trained) for key in _KINDS}
    found = [
        Finding(
            _CLAIM,
            f"Fewer than 20 % reach 0.8 with {told}. Median share needed: "
            + "; ".join(f"{_KINDS[key]} {share:.0%}" for key, share in median.items())
            + ".",
            max(few.values()) >= half,
        ),
        Finding(
            _NAIVE,
            f"Median share needed for 0.8: top-k by score {median['top_k']:.0%}, best of {subsets:,} random subsets "
            f"{median['random_best']:.0%}, greedy {median['greedy']:.0%}.",
            median["top_k"] <= median["random_best"] + 0.05,
        ),
    ]
    fresh = [row for row in summary if row["weights"] == "untrained"]
    if fresh:
        theirs = _median(row["greedy_0.8"] for row in fresh)
        found.append(
            Finding(
                _UNTRAINED,
                f"Median share needed for 0.8 (greedy): trained {median['greedy']:.0%}, untrained {theirs:.0%}.",
                median["greedy"] < 0.8 * theirs,
            )
        )
    return found


def _curve_chart(rows: Sequence[Row], layers: Sequence[str], subsets: int) -> Chart:
    series = []
    wanted = (
        ("trained", "greedy", "greedy", False),
        ("trained", "top_k", "top-k by score", False),
        ("trained", "random_best", f"best of {subsets:,} random", False),
        ("untrained", "random_best", "the same, untrained", True),
    )
    for layer in layers:
        for weights, key, name, baseline in wanted:
            own = [row for row in rows if row["layer"] == layer and row["weights"] == weights]
            if own:
                share = tuple(100 * row["share"] for row in own)
                series.append(Series(name, tuple(row[key] for row in own), share, panel=layer, baseline=baseline))
    return Chart(
        name="existence",
        title="Fidelity of subsets of a layer's components",
        x_label="components kept, % of the layer's",
        y_label="subset fidelity, share of output energy",
        series=tuple(series),
        levels={"0.8": 0.8},
    )


def _needed_chart(summary: Sequence[Row]) -> Chart:
    trained = [row for row in summary if row["weights"] == "trained"]
    series = [Series(name, tuple(100 * row[f"{key}_0.8"] for row in trained)) for key, name in _KINDS.items()]
    return Chart(
        name="needed",
        title="Components needed to rebuild 80 % of a layer's output energy",
        x_label="components needed, % of the layer's",
        y_label="",
        kind="bars",
        categories=tuple(row["layer"] for row in trained),
        series=tuple(series),
        levels={"20 %": 20},
    )


def _median(values) -> float:
    return float(torch.tensor(sorted(values), dtype=torch.float64).quantile(0.5))


def _whole(value: object, least: int) -> bool:
    return is_whole(value) and value >= least
