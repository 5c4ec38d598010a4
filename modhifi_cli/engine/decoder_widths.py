"""How many neurons and heads each layer of a decoder keeps: budgets over parts whose costs are sums, not products.

The residual width of a decoder never changes, so what a part saves does not depend on the others. Heads come in steps
of their own (one of every KV head, or a whole group), neurons in steps of `round_to`.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from modhifi_cli.engine.plan import Summary
from modhifi_cli.engine.prices import COUNTED, Subject
from modhifi_cli.engine.rounding import neuron_step, refuse_narrow, told
from modhifi_cli.engine.walk import Budget
from modhifi_cli.engine.widths import NEAR
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import Layout, bias_of, matrices
from modhifi_cli.graph.decoder import Decoder, Part, component_parameters, slice_part_
from modhifi_cli.records import Progress
from modhifi_cli.roles import Allocation

_FUSED = 8  # numbers of 2 bytes


class DecoderCosts:
    """What can be counted of a decoder's parts: sums, since the residual width never changes.

    Args:
        model: The dense network.
        decoder: Its layers and parts.
        length: Tokens of a sequence, for the work of attention.
    """

    def __init__(self, model: nn.Module, decoder: Decoder, *, length: int) -> None:
        parts = decoder.parts
        self._sizes = np.array([part.components for part in parts])
        layers = [model.get_submodule(name) for name in decoder.layers]
        decoded = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        params = np.array([component_parameters(model, part) for part in parts], dtype=np.float64)
        work = []
        for part, own in zip(parts, params, strict=True):
            biases = sum(
                slot.entries
                for slot in part.group.producers
                if bias_of(model.get_submodule(slot.module)) is not None
            )
            # Queries meet the keys and values of half the sequence on average: two products of the head dimension each.
            heads = part.heads / part.components if part.kind == "attention" else 0
            dim = part.consumer.index.numel() // part.heads if part.heads else 0
            # A token goes to as many experts when there are fewer of them.
            whole_experts = part.kind == "experts"
            work.append(0.0 if whole_experts else part.share * (own - biases) + heads * dim * (length + 1))
        products = 0.0
        shares = {part.group.producers[0].module.rpartition(".")[0]: part.share for part in parts if part.share < 1}
        linear = sum(
            weight.numel() * shares.get(f"{name}.{path}".rpartition(".")[0], 1.0)
            for name, layer in zip(decoder.layers, layers, strict=True)
            for path, module, weight in matrices(layer)
            if hasattr(module, "bias")
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
        self.names = tuple(self._cost)

    def removed_share(self, keep: Sequence[int], target: str) -> float:
        """Share removed of ``"params"`` or ``"flops"`` of the layers, of ``"model_params"`` or of ``"components"``."""
        return float((self._sizes - np.asarray(keep)) @ self._cost[target])


class Widths:
    """Chooses widths for the parts of a decoder.

    Args:
        model: The dense network.
        decoder: Its layers and parts.
        example: One sequence, ``[1, length]`` int64, on the device where the layers run.
        allocation: From `modhifi_cli.numerics.allocation`.
        budget: What is asked for: parameters of the decoder layers, FLOPs of the decoder layers for one token in the
            middle of a sequence, components of the parts that may be pruned, or time of a sequence's forward pass.

    Raises:
        ConfigError: If the target is unknown, or no layer is as wide as the multiple that widths are rounded to.
    """

    def __init__(
        self, model: nn.Module, decoder: Decoder, example: Tensor, *, allocation: Allocation, budget: Budget
    ) -> None:
        parts = decoder.parts
        self._decoder, self._allocation, self._budget = decoder, allocation, budget
        self._sizes = np.array([part.components for part in parts])
        neurons = [part for part in parts if part.kind == "mlp"]
        sizes, names = [part.components for part in neurons], [part.name for part in neurons]
        narrow = refuse_narrow(sizes, names, budget.round_to, "neurons") if budget.sparsity > 0 else ()
        self.warnings: list[str] = list(narrow)
        self._steps = [
            _step(part, budget.round_to) if part.kind == "mlp" else part.balanced for part in parts
        ]
        self._least = [-(-part.least // part.balanced) * part.balanced for part in parts]
        self._price, self._costs = budget.price, DecoderCosts(model, decoder, length=example.shape[1])
        # Time counts on the device where the layers run; the network itself stays where it is.
        moved = self._price.timed and example.device.type != "cpu"
        timed = copy.deepcopy(model).to(example.device) if moved else model
        groups = [part.group for part in parts]
        self._pricing = self._price.on(
            Subject(timed, example, groups, self._costs, self._steps, functools.partial(narrowed_decoder, timed, decoder))
        )
        self._allowed = {
            number: list(range(part.balanced, part.components + 1, part.balanced))
            for number, part in enumerate(parts)
            if part.kind == "attention"
        }

    def prepare(self) -> Iterator[Progress | LatencyTable]:
        """Measure what has to be measured before anything is cut."""
        yield from self._pricing.prepare()

    def settle(self, curves: Sequence[Sequence[float]]) -> Iterator[Progress | LatencyTable]:
        """Time networks of the chosen widths, where time is the price, and move the aim until the clock agrees."""
        name, sizes = f"{self._allocation!r} round_to={self._budget.round_to}", self._sizes.tolist()
        yield from self._pricing.settle(
            self._budget.sparsity, lambda share: self._allocated(share, sizes, curves), name=name
        )

    def shares(self, keep: Sequence[int]) -> dict[str, float]:
        """Shares that widths remove, of everything that is counted and of the target."""
        counted = {name: self._costs.removed_share(keep, name) for name in COUNTED}
        return counted | {self._price.name: self._pricing.removed_share(keep)}

    def summary(self, layout: Layout) -> Summary:
        """What the run achieved."""
        alive = [layout.alive(part.group).numel() for part in self._decoder.parts]
        achieved = {name: self._costs.removed_share(alive, name) for name in self._costs.names}
        if self._pricing.table is not None:
            saved, expected = self._pricing.removed_share(alive), self._pricing.expected_share(alive)
            return Summary(achieved, latency={"table": saved, "predicted": expected})
        asked, name = self._budget.sparsity, self._price.name
        warnings: tuple[str, ...] = ()
        neurons = [step for part, step in zip(self._decoder.parts, self._steps, strict=True) if part.kind == "mlp"]
        if abs(achieved[name] - asked) > NEAR:
            steps = f"{told(neurons, 'neurons')} or whole heads" if neurons else "whole heads"
            alike = "" if self._allocation.needs_curves else ", the same in every layer"
            warnings = (
                f"sparsity={asked:g} of {name} was asked for and {achieved[name]:.3f} reached: widths come in steps of "
                f"{steps}{alike}.",
            )
        return Summary(achieved, warnings)

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
        return self._allocated(self._pricing.aim(share), present, curves)

    def _allocated(self, share: float, present: Sequence[int], curves: Sequence[Sequence[float]]) -> list[int]:
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
                    keep[number] = min(max(count * unit, self._least[number]), present[number])
            return keep

        found = self._allocation(
            [-(-int(self._sizes[group[0]]) // unit) for group, unit in zip(free, units, strict=True)],
            [-(-present[group[0]] // unit) for group, unit in zip(free, units, strict=True)],
            lambda counts: self._pricing.removed_share(widths(counts)),
            sparsity=share,
            steps=[1] * len(free),
            curves=[_coarse(curves[group[0]], present[group[0]], unit) for group, unit in zip(free, units, strict=True)]
            if curves
            else None,
            stepwise=self._pricing.stepwise,
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
        reachable = self._pricing.removed_share([0] * len(self._sizes))
        even = min(share / reachable, 1.0)  # of every part that may be pruned
        fixed = {}
        for number, counts in self._allowed.items():
            wanted = self._sizes[number] * (1 - even)
            smaller = [count for count in counts if count <= present[number]]
            fixed[number] = min(smaller or [present[number]], key=lambda count: (abs(count - wanted), -count))
        return fixed


def narrowed_decoder(model: nn.Module, decoder: Decoder, keep: Sequence[int]) -> nn.Module:
    """A copy in which every part has lost its last components: for timing, not for answers."""
    model = copy.deepcopy(model)
    layout = Layout(model, [part.group for part in decoder.parts])
    for part, kept in zip(decoder.parts, keep, strict=True):
        runs = torch.arange(part.components).view(part.balanced, -1)  # the same number of each run stays
        slice_part_(model, layout, part, runs[:, : kept // part.balanced].flatten())
    return model


def _step(part: Part, round_to: int | str) -> int:
    """Steps of neurons: of experts, whose products are one fused product elsewhere, multiples of 16 bytes at least."""
    step = neuron_step(part.components, round_to)
    return -(-step // _FUSED) * _FUSED if part.share < 1 and part.components > _FUSED else step


def _coarse(curve: Sequence[float], present: int, unit: int) -> list[float]:
    """An error curve over single components at the widths that whole units reach."""
    units = -(-present // unit)
    return [curve[present - min((units - gone) * unit, present)] for gone in range(units)] + [curve[-1]]
