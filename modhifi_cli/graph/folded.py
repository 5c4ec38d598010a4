"""Weights that a module computes from others before every forward, written down as plain weights.

Weight norm, spectral norm, pruning masks and any other parametrisation: what is cut must be the weight that the layer uses.
Both of torch's ways are known, hooks before the forward and `torch.nn.utils.parametrize`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as masks
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_HOOKS = {WeightNorm: "weight norm", SpectralNorm: "spectral norm", masks.BasePruningMethod: "pruning masks"}


def copied(model: nn.Module) -> nn.Module:
    """A copy of a network. Tensors that hooks have computed are no leaves, which copying refuses: they are detached first."""
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and not value.is_leaf:
                object.__setattr__(module, name, value.detach())
    return copy.deepcopy(model)


@torch.no_grad()
def fold_(model: nn.Module) -> tuple[str, ...]:
    """Replace computed weights by their present values, in place; the answers in evaluation mode stay the same.

    Returns:
        A sentence for each kind that was folded, ``"weight norm of 2 layers is folded into their weights (a, b)"``.
    """
    found: dict[str, list[str]] = {}
    for name, module in list(model.named_modules()):
        for hook in list(module._forward_pre_hooks.values()):
            kind = next((word for of, word in _HOOKS.items() if isinstance(hook, of)), None)
            if kind is None:
                continue
            found.setdefault(kind, []).append(name)
            if isinstance(hook, WeightNorm):
                nn.utils.remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                nn.utils.remove_spectral_norm(module, hook.name)
            else:
                masks.remove(module, hook._tensor_name)
        if parametrize.is_parametrized(module):
            # A copy shares its class with the original, and removing takes the weight's property off that class.
            kind_of = type(module)
            known = {key: value for key, value in vars(kind_of).items() if key not in ("__dict__", "__weakref__")}
            module.__class__ = type(kind_of.__name__, kind_of.__bases__, known)
            for tensor in list(module.parametrizations):
                rule = type(module.parametrizations[tensor][0]).__name__
                kind = {"_WeightNorm": "weight norm", "_SpectralNorm": "spectral norm"}.get(rule, rule)
                found.setdefault(kind, []).append(name)
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                value = getattr(module, tensor)
                if not isinstance(value, nn.Parameter):  # torch leaves what was computed from several tensors bare
                    delattr(module, tensor)
                    module.register_parameter(tensor, nn.Parameter(value.detach().clone()))
    return tuple(
        f"{kind} of {len(set(names))} {'layer' if len(set(names)) == 1 else 'layers'} is folded into the weights "
        f"({', '.join(list(dict.fromkeys(names))[:3])}{' …' if len(set(names)) > 3 else ''})"
        for kind, names in found.items()
    )
