"""How many neurons and heads each layer of a decoder keeps: budgets over parts whose costs are sums, not products.

The residual width of a decoder never changes, so what a part saves does not depend on the others. Heads come in steps
of their own (one of every KV head, or a whole group), neurons in steps of `round_to`.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from torch import nn

from modhifi_cli.engine.plan import Summary
from modhifi_cli.engine.prices import COUNTED
from modhifi_cli.engine.walk import Budget
from modhifi_cli.engine.widths import NEAR
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.components import Layout, input_size, output_size
from modhifi_cli.graph.decoder import Decoder, component_parameters
from modhifi_cli.records import Progress
from modhifi_cli.roles import Allocation


class Widths:
    """Chooses widths for the parts of a decoder.

    Args:
        model: The dense network.
        decoder: Its layers and parts.
        length: Tokens of a sequence, for the work of attention.
        allocation: From `modhifi_cli.numerics.allocation`.
        budget: What is asked for: ``"params"`` of the decoder layers, ``"flops"`` of the decoder layers for one token in
            the middle of a calibration sequence, or ``"components"`` of the parts that may be pruned.

    Raises:
        ConfigError: If the budget's target is another.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, *, length: int, allocation: Allocation, budget: Budget
    ) -> None:
        self.warnings: list[str] = []
        self._decoder, self._allocation, self._target = decoder, allocation, budget.target
        self._budget, round_to = budget, budget.round_to
        if budget.target not in COUNTED:
            raise ConfigError(f"target must be one of {', '.join(COUNTED)}, got '{budget.target}'.")
        parts = decoder.parts
        self._sizes = np.array([part.components for part in parts])
        self._steps = [min(round_to, part.components) if part.kind == "mlp" else part.balanced for part in parts]
        layers = [model.get_submodule(name) for name in decoder.layers]
        decoded = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        params = np.array([component_parameters(model, part) for part in parts], dtype=np.float64)
        work = []
        for part, own in zip(parts, params, strict=True):
            biases = sum(
                slot.entries for slot in part.group.producers if model.get_submodule(slot.module).bias is not None
            )
            # Queries meet the keys and values of half the sequence on average: two products of the head dimension each.
            heads = part.heads / part.components if part.kind == "attention" else 0
            dim = part.consumer.index.numel() // part.heads if part.heads else 0
            work.append(own - biases + heads * dim * (length + 1))
        products = 0.0
        linear = sum(
            input_size(module) * output_size(module)
            for layer in layers
            for module in layer.modules()
            if hasattr(module, "weight") and module.weight is not None and module.weight.dim() == 2
        )
        for part in parts:
            if part.kind == "attention":
                products += part.heads * (part.consumer.index.numel() // part.heads) * (length + 1)
        whole = sum(parameter.numel() for parameter in model.parameters())
        self._cost = {
            "params": params / decoded,
            "model_params": params / whole,
            "flops": np.array(work) / (linear + products),
            "components": np.ones(len(parts)) / self._sizes.sum(),
        }
        self._allowed = {
            number: list(range(part.balanced, part.components + 1, part.balanced))
            for number, part in enumerate(parts)
            if part.kind == "attention"
        }

    def prepare(self) -> Iterator[Progress]:
        """Nothing has to be measured."""
        yield from ()

    def settle(self, curves: Sequence[Sequence[float]]) -> Iterator[Progress]:
        """What is counted needs no clock."""
        yield from ()

    def shares(self, keep: Sequence[int]) -> dict[str, float]:
        """Shares that widths remove, of everything that is counted."""
        return {name: self.removed_share(keep, name) for name in COUNTED}

    def summary(self, layout: Layout) -> Summary:
        """What the run achieved."""
        alive = [layout.alive(part.group).numel() for part in self._decoder.parts]
        achieved = {name: self.removed_share(alive, name) for name in self._cost}
        warnings = ()
        if abs(achieved[self._target] - self._budget.sparsity) > NEAR:
            warnings = (
                f"sparsity={self._budget.sparsity:g} of {self._target} was asked for and {achieved[self._target]:.3f} "
                f"reached: widths come in steps of {self._budget.round_to} neurons or whole heads, the same in every "
                "layer.",
            )
        return Summary(achieved, warnings)

    def removed_share(self, keep: Sequence[int], target: str) -> float:
        """Share removed of ``"params"`` or ``"flops"`` of the layers, of ``"model_params"`` or of ``"components"``."""
        return float((self._sizes - np.asarray(keep)) @ self._cost[target])

    def restrict_heads(self, accepts: Callable[[int, int], bool]) -> None:
        """Let heads take only counts that a configuration accepts for all layers, where there are any below the dense.

        Args:
            accepts: (query heads, KV heads) → whether the configuration holds them.
        """
        parts = self._decoder.parts
        attention = [part for part in parts if part.kind == "attention"]
        if not attention or len({(p.components, p.heads, p.kv_heads) for p in attention}) > 1:
            return
        part = attention[0]
        step = part.balanced
        counts = [n for n in range(step, part.components + 1, step) if accepts(*part.head_counts(n))]
        if counts in ([], [part.components]):
            self.warnings.append(
                "no smaller number of heads fits this family's configuration, so the pruned folder opens with "
                "modhifi_cli.load_model and not with plain transformers"
            )
            return
        self._allowed = dict.fromkeys((n for n, p in enumerate(parts) if p.kind == "attention"), counts)

    def at(self, share: float, present: Sequence[int], curves: Sequence[Sequence[float]]) -> list[int]:
        """Components that each part keeps.

        Args:
            share: Share of the target to be removed, in [0, 1).
            present: Components of each part now.
            curves: For each part its error after the removal of 0, 1, 2, … components; empty for even widths.

        Raises:
            ConfigError: If the share cannot be reached.
        """
        if self._allocation.needs_curves:
            groups = [[number] for number in range(len(present))]
        else:  # one width for all parts of a kind and size, so that the layers stay alike
            by_size: dict[tuple, list[int]] = {}
            for number, part in enumerate(self._decoder.parts):
                by_size.setdefault((part.kind, part.components, present[number]), []).append(number)
            groups = list(by_size.values())
        fixed = self._fixed_heads(share, present, groups)
        free = [group for group in groups if group[0] not in fixed]
        units = [self._steps[group[0]] for group in free]

        def widths(counts: Sequence[int]) -> list[int]:
            keep = [fixed.get(number, present[number]) for number in range(len(present))]
            for group, unit, count in zip(free, units, counts, strict=True):
                for number in group:
                    keep[number] = min(count * unit, present[number])
            return keep

        found = self._allocation(
            [-(-int(self._sizes[group[0]]) // unit) for group, unit in zip(free, units, strict=True)],
            [-(-present[group[0]] // unit) for group, unit in zip(free, units, strict=True)],
            lambda counts: self.removed_share(widths(counts), self._target),
            sparsity=share,
            step=1,
            curves=[_coarse(curves[group[0]], present[group[0]], unit) for group, unit in zip(free, units, strict=True)]
            if curves
            else None,
        )
        return widths(found)

    def _fixed_heads(
        self, share: float, present: Sequence[int], groups: Sequence[Sequence[int]]
    ) -> dict[int, int]:
        """The accepted number of heads that is nearest to what an even share would leave; the neurons do the rest.

        Heads are too coarse a step to meet a budget with.
        """
        neurons = any(self._decoder.parts[group[0]].kind == "mlp" for group in groups)
        if self._allocation.needs_curves or not self._allowed or not neurons or share <= 0:
            return {}
        reachable = self._cost[self._target] @ self._sizes
        even = min(share / reachable, 1.0)  # of every part that may be pruned
        fixed = {}
        for number, counts in self._allowed.items():
            wanted = self._sizes[number] * (1 - even)
            smaller = [count for count in counts if count <= present[number]]
            fixed[number] = min(smaller or [present[number]], key=lambda count: (abs(count - wanted), -count))
        return fixed


def _coarse(curve: Sequence[float], present: int, unit: int) -> list[float]:
    """An error curve over single components at the widths that whole units reach."""
    units = -(-present // unit)
    return [curve[present - min((units - gone) * unit, present)] for gone in range(units)] + [curve[-1]]
