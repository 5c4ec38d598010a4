"""Worst-case gains from the weights: how much a change of one module's output can change the network's answer at most.

The network's data flow is read from the autograd graph of one tiny forward. Every step has a Lipschitz
constant (spectral norm of a convolution on maps of the size it meets, max |γ|/σ of a BatchNorm, 1 of a ReLU, …); a path
multiplies them, paths that meet are added. A step without a constant from the weights (a product of two activations, a
softmax of products) makes the gain infinite, and is named.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.graph.answers import tensors_of
from modhifi_cli.graph.modes import without_gradients

_ITERATIONS = 300
_SETTLED = 1e-7  # relative change of a spectral norm from one step of the power iteration to the next

# Steps of the autograd graph that cannot lengthen a difference.
_SHORT = (
    "Relu", "Hardtanh", "Threshold", "View", "Reshape", "Unsafe", "Transpose", "TBackward", "Permute", "Slice",
    "Select", "ConstantPad", "Clone", "Copy", "ToCopy", "Alias", "Squeeze", "Unsqueeze", "Dropout", "Split",
    "Unbind", "Narrow", "Flatten", "Mean", "AvgPool", "AdaptiveAvgPool", "Sigmoid", "Tanh", "Clamp", "LeakyRelu",
    "Neg", "Detach", "Contiguous",
)  # fmt: skip
_CONSTANTS = {"Gelu": 1.13, "Silu": 1.1, "Hardswish": 1.5, "Elu": 1.0, "Mish": 1.09}  # largest slopes, rounded up
_SUMS = ("AddBackward", "SubBackward", "CatBackward", "StackBackward")


@dataclass(frozen=True)
class Gains:
    """Worst-case gains.

    Attributes:
        of: Module name → largest ‖change of the logits‖₂ / ‖change of the module's output‖₂ of one sample.
        unbounded: Kinds of steps that have no constant from the weights, in the words of the autograd graph.
    """

    of: dict[str, float]
    unbounded: tuple[str, ...]


def worst_case_gains(model: nn.Module, example: Tensor) -> Gains:
    """Gains of every convolution and linear layer that runs once.

    Args:
        model: Network in evaluation mode. Left as found.
        example: A batch it takes.

    Returns:
        The gains. Spectral norms are found by power iteration, which comes from below; they are settled to about 1e-4.
    """
    constants, origins, ends, kept = {}, {}, {}, []

    def before(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                origins[name] = inputs[0].grad_fn
                kept.append(inputs[0])

        return hook

    def after(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: object) -> None:
            if not isinstance(output, Tensor) or output.grad_fn is None:
                return
            kept.append(output)
            ends[name] = output.grad_fn
            constants[name] = module_constant(module, inputs[0])

        return hook

    handles = []
    try:
        for name, module in model.named_modules():
            if _known(module):
                handles.append(module.register_forward_pre_hook(before(name)))
                handles.append(module.register_forward_hook(after(name)))
        with without_gradients(model), torch.enable_grad():
            output = model(example.detach().clone().requires_grad_())
    finally:
        for handle in handles:
            handle.remove()
    modules = {node: (origins.get(name), constants[name]) for name, node in ends.items()}
    roots = [tensor.grad_fn for tensor in tensors_of(output) if tensor.grad_fn is not None]
    gains, unbounded = _propagate(roots, modules)
    return Gains(
        {name: gains[node] for name, node in ends.items() if node in gains and _weighty(model, name)}, unbounded
    )


def module_constant(module: nn.Module, inputs: Tensor) -> float:
    """Lipschitz constant of a convolution, linear layer, BatchNorm (evaluation) or max-pooling from its weights.

    Args:
        module: The module.
        inputs: A batch of what it reads; only its shape and type count.
    """
    if isinstance(module, nn.Linear):
        return float(torch.linalg.matrix_norm(module.weight.detach().double(), 2))
    if isinstance(module, nn.Conv2d):
        return _convolution_norm(module, inputs)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        scale = (module.running_var.double() + module.eps).rsqrt()
        return float((scale * (1 if module.weight is None else module.weight.detach().double().abs())).max())
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    # One pixel may be the largest of several overlapping windows.
    return math.sqrt(math.prod(-(-size // step) for size, step in zip(kernel, stride, strict=True)))


def _known(module: nn.Module) -> bool:
    batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    return isinstance(module, nn.Linear | nn.Conv2d | nn.MaxPool2d) or batchnorm


def _weighty(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear | nn.Conv2d)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _convolution_norm(module: nn.Conv2d, inputs: Tensor) -> float:
    """Spectral norm of a convolution as a linear map of whole maps, by power iteration in float64."""
    weight = module.weight.detach().double()
    vector = torch.randn((1, *inputs.shape[1:]), dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(
        weight.device
    )

    def there(maps: Tensor) -> Tensor:
        if module.padding_mode != "zeros":
            maps = functional.pad(maps, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            return functional.conv2d(maps, weight, None, module.stride, 0, module.dilation, module.groups)
        return functional.conv2d(maps, weight, None, module.stride, module.padding, module.dilation, module.groups)

    norm = 0.0
    for _ in range(_ITERATIONS):
        vector = vector / vector.norm()
        with torch.enable_grad():
            probe = vector.detach().requires_grad_()
            image = there(probe)
            (vector,) = torch.autograd.grad(0.5 * image.square().sum(), probe)
        before, norm = norm, float(image.detach().norm())
        if norm == 0 or abs(norm - before) <= _SETTLED * norm:
            break
    return norm


def _propagate(roots: list, modules: dict) -> tuple[dict, tuple[str, ...]]:
    """Gain of every node's output, from the logits back: a step hands its gain times its constant to what it reads."""
    order: list = []
    seen: set = set()
    stack = [(root, False) for root in roots]
    while stack:
        node, left = stack.pop()
        if left:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(parent, False) for parent, _ in _reads(node, modules)[0]]
    gains = dict.fromkeys(seen, 0.0)
    for root in roots:
        gains[root] = 1.0
    unbounded: dict[str, None] = {}
    for node in reversed(order):
        read, unknown = _reads(node, modules)
        if unknown:
            unbounded[unknown] = None
        for parent, constant in read:
            gains[parent] += gains[node] * constant
    return gains, tuple(unbounded)


def _reads(node: object, modules: dict) -> tuple[list[tuple[object, float]], str]:
    """What a node reads, with the constant of the step; and the step's kind where it has none."""
    if node in modules:
        origin, constant = modules[node]
        return ([] if origin is None else [(origin, constant)]), ""
    kind = type(node).__name__
    parents = [
        parent for parent, _ in node.next_functions if parent is not None and "AccumulateGrad" not in str(parent)
    ]
    if kind.startswith(_SUMS) or kind.startswith(_SHORT):
        return [(parent, 1.0) for parent in parents], ""
    constant = next((value for name, value in _CONSTANTS.items() if kind.startswith(name)), None)
    if kind.startswith(("MulBackward", "DivBackward")) and len(parents) == 1:
        saved = getattr(node, "_saved_other", None)
        if isinstance(saved, Tensor) or isinstance(saved, (int, float)):
            largest = float(torch.as_tensor(saved).detach().abs().max())
            constant = largest if kind.startswith("Mul") else 1 / float(torch.as_tensor(saved).abs().min())
    if constant is not None:
        return [(parent, constant) for parent in parents], ""
    return [(parent, math.inf) for parent in parents], kind
