"""Mixtures of experts: the fused tensors of all experts taken apart into linear layers, and put together again.

transformers keeps the experts of a layer in tensors ``[experts, …, …]``. Here each is an MLP of its own whose neurons are
pruned like any other's: its reader is shown the neurons times what the router gave the expert, so that its moments are
those of what reaches the stream. Whole experts are components, too: the layer's answer is the sum of theirs, a linear
layer `mix` of ones over them, and cutting one cuts the router's row with it. Names of experts stay those of the dense
network. Layers whose experts are all equally wide can be put together again, for plain transformers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_READS = ("gate_up_proj", "up_proj")
_SAID = ("num_experts", "has_gate", "has_bias", "is_transposed", "_apply_gate")  # of transformers' fused experts


class Expert(nn.Module):
    """One expert: writer and reader of its neurons. The reader's ``rows`` are the tokens that its last call was for."""

    def __init__(self, reads: str, writer: nn.Linear, reader: nn.Linear, bias: Tensor | None) -> None:
        super().__init__()
        self.add_module(reads, writer)
        self.down_proj = reader
        # Behind the router's weight: the reader is given neurons that are weighted already.
        self.constant = None if bias is None else nn.Parameter(bias, requires_grad=False)


class Experts(nn.Module):
    """The experts of one layer, each a module under its number in the dense network.

    Args:
        fused: transformers' module. What it does between the two products stays its own.
    """

    def __init__(self, fused: Any) -> None:  # the families' classes have no type in common
        super().__init__()
        reads = _READS[0] if fused.has_gate else _READS[1]
        for number in range(fused.num_experts):
            writer, reader = (_linear(fused, name, number) for name in (reads, "down_proj"))
            bias = fused.down_proj_bias[number].detach().clone() if fused.has_bias else None
            self.add_module(str(number), Expert(reads, writer, reader, bias))
        for name in (reads, "down_proj", f"{reads}_bias", "down_proj_bias"):
            if name in fused._parameters:
                del fused._parameters[name]
        self.reads, self.rule = reads, fused
        self.mix = nn.Linear(fused.num_experts, 1, bias=False, dtype=reader.weight.dtype, device=reader.weight.device)
        with torch.no_grad():
            self.mix.weight.fill_(1)
        self.mix.weight.requires_grad_(False)

    @property
    def config(self) -> object:
        """The configuration, which transformers looks for here."""
        return self.rule.config

    @property
    def num_experts(self) -> int:
        """How many are left."""
        return len(self.numbers)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Numbers of the experts that are left, in the order of the router's rows."""
        return tuple(int(name) for name in self._modules if name.isdecimal())

    def expert(self, number: int) -> Expert:
        """By its number in the dense network."""
        return self._modules[str(number)]  # type: ignore[return-value]

    def keep_(self, places: Tensor) -> None:
        """Let only the experts at these places stay, ``[kept]`` int64 sorted."""
        stay = {self.numbers[place] for place in places.tolist()}
        for number in self.numbers:
            if number not in stay:
                del self._modules[str(number)]
        self.rule.num_experts = self.num_experts

    def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """As of transformers' experts.

        Args:
            hidden: ``[tokens, width]``.
            index: Places of the chosen experts, ``[tokens, chosen]`` int64; beyond the last: none.
            weights: What the router gives them, ``[tokens, chosen]``.

        Returns:
            ``[tokens, width]``.
        """
        if self.mix._forward_pre_hooks or self.mix._forward_hooks:
            return self._side_by_side(hidden, index, weights)
        found = torch.zeros_like(hidden)
        for place in range(self.num_experts):
            rows, answer = self._answer(place, hidden, index, weights)
            found.index_add_(0, rows, (answer * self.mix.weight[0, place]).to(found.dtype))
        return found

    def _side_by_side(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The same with every expert's answer to every token before the sum, ``[tokens, width, experts]``, for `mix`."""
        answers = hidden.new_zeros((*hidden.shape, self.num_experts))
        for place in range(self.num_experts):
            rows, answer = self._answer(place, hidden, index, weights)
            answers[rows, :, place] = answer.to(answers.dtype)
        return self.mix(answers).squeeze(-1)

    def _answer(self, place: int, hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Rows that chose an expert, and its weighted answer to each."""
        expert = self.expert(self.numbers[place])
        rows, chosen = torch.where(index == place)
        given = weights[rows, chosen, None].to(hidden.dtype)
        written = getattr(expert, self.reads)(hidden[rows])
        neurons = self.rule._apply_gate(written) if self.rule.has_gate else self.rule.act_fn(written)
        expert.down_proj.rows = rows
        answer = expert.down_proj(neurons * given)
        return rows, answer if expert.constant is None else answer + expert.constant * given

    def extra_repr(self) -> str:
        """What is printed of it."""
        return f"of {type(self.rule).__name__}"



def open_experts_(model: nn.Module) -> int:
    """Take the fused experts of a network apart, in place; what they answer stays the same but for rounding.

    Returns:
        How many layers have such experts now.
    """
    for parent, leaf, module in list(_children(model)):
        if _is_fused(module):
            parent._modules[leaf] = Experts(module).train(module.training)
    return sum(isinstance(module, Experts) for module in model.modules())


@contextmanager
def closed(model: nn.Module) -> Iterator[bool]:
    """Within it the experts are transformers' own modules again, if all of a layer are equally wide everywhere.

    Yields:
        Whether they are.
    """
    opened = [(parent, leaf, module) for parent, leaf, module in _children(model) if isinstance(module, Experts)]
    fits = all(len(_widths(module)) == 1 for _, _, module in opened)
    try:
        for parent, leaf, module in opened if fits else ():
            parent._modules[leaf] = _fused(module)
        yield fits
    finally:
        for parent, leaf, module in opened:
            parent._modules[leaf] = module
            for name in list(module.rule._parameters):
                if name.removesuffix("_bias") in (module.reads, "down_proj"):
                    del module.rule._parameters[name]


def of_experts(model: nn.Module, name: str) -> Experts | None:
    """The experts that a module is one of, or a part of one; None where it is none."""
    parts = name.strip(".").split(".")
    for count in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:count]))
        if isinstance(module, Experts):
            return module
    return None


def common_width(experts: Experts) -> int | None:
    """Neurons of each expert, None where they differ."""
    widths = _widths(experts)
    return widths.pop() if len(widths) == 1 else None


def _widths(experts: Experts) -> set[int]:
    return {experts.expert(number).down_proj.in_features for number in experts.numbers}


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for leaf, module in parent.named_children():
            yield parent, leaf, module


def _is_fused(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    first = module._parameters.get(_READS[0] if getattr(module, "has_gate", True) else _READS[1])
    known = all(hasattr(module, name) for name in _SAID) and not getattr(module, "has_post_expert_norm", False)
    return known and down is not None and first is not None and down.dim() == first.dim() == 3


def _linear(fused: Any, name: str, number: int) -> nn.Linear:
    """One expert's part of a fused tensor; the reader's bias stands behind the router's weight and is left out."""
    weight = getattr(fused, name)[number].detach()
    weight = (weight.T if fused.is_transposed else weight).clone()
    bias = fused.has_bias and name != "down_proj"
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias:
        made.bias = nn.Parameter(getattr(fused, f"{name}_bias")[number].detach().clone(), requires_grad=False)
    return made


def _fused(experts: Experts) -> nn.Module:
    """transformers' module with the tensors of all experts."""
    rule, each = experts.rule, [experts.expert(number) for number in experts.numbers]
    scales = experts.mix.weight[0].detach()

    def put(name: str, tensors: list[Tensor]) -> None:
        rule._parameters[name] = nn.Parameter(torch.stack(tensors).contiguous(), requires_grad=False)

    turned = (lambda weight: weight.T) if rule.is_transposed else (lambda weight: weight)
    put(experts.reads, [turned(getattr(one, experts.reads).weight.detach()) for one in each])
    readers = [one.down_proj.weight.detach() * scale for one, scale in zip(each, scales, strict=True)]
    put("down_proj", [turned(weight) for weight in readers])
    if rule.has_bias:
        put(f"{experts.reads}_bias", [getattr(one, experts.reads).bias.detach() for one in each])
        constants = [one.constant.detach() * scale for one, scale in zip(each, scales, strict=True)]
        put("down_proj_bias", constants)
    return rule
