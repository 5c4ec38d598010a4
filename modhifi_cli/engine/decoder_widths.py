"""How many neurons and heads each layer of a decoder keeps: budgets over parts whose costs are sums, not products.

The residual width of a decoder never changes, so what a part saves does not depend on the others. Heads come in steps
of their own (one of every KV head, or a whole group), neurons in steps of `round_to`.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import nn

from modhifi_cli.graph.components import input_size, output_size
from modhifi_cli.graph.decoder import Decoder, component_parameters


class Widths:
    """Chooses widths for the parts of a decoder.

    Args:
        model: The dense network.
        decoder: Its layers and parts.
        length: Tokens of a sequence, for the work of attention.
        round_to: MLP widths are multiples of it.
        allocation: From `modhifi_cli.numerics.allocation`.
        target: What a share counts.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, *, length: int, round_to: int, allocation: Callable, target: str
    ) -> None:
        self.warnings: list[str] = []
        self._decoder, self._allocation, self._target = decoder, allocation, target
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
