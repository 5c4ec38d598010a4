"""Cutting tensors: slicing modules, applying saved edits, and describing widths so that a saved network can be rebuilt.

No masks are left behind: after `apply_edit_` every module holds smaller parameters and buffers and says so in its own
attributes (`in_channels`, `num_features`, …).
"""

import copy
import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.errors import DataError, UnsupportedModelError
from modhifi_cli.graph.components import inputs_first, is_transposed
from modhifi_cli.graph.experts import Experts
from modhifi_cli.graph.heads import adopt_, free_heads_, head_count, slice_heads_
from modhifi_cli.graph.modules import ChannelPadShortcut
from modhifi_cli.graph.parts import Part, cut_parts, is_part, part_of
from modhifi_cli.graph.products import adopt_products_
from modhifi_cli.records import Edit, ModuleEdit

_ATTRIBUTES: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.modules.conv._ConvNd, ("in_channels", "out_channels", "groups")),
    (nn.Linear, ("in_features", "out_features")),
    (nn.modules.batchnorm._NormBase, ("num_features",)),
    (nn.GroupNorm, ("num_channels", "num_groups")),
    (ChannelPadShortcut, ("in_channels", "out_channels")),
)
_TRANSPOSED_ATTRIBUTES = ("nx", "nf")
_OUTPUTS = ("out_channels", "out_features", "num_features", "num_channels", "nf")
_INPUTS = ("in_channels", "in_features", "nx")
SIZE = "size"  # what it calls the length of a bare tensor or a number that was cut
HEADS = "heads"  # what the description of widths calls the number of heads, whatever the module does


def slice_module_(module: nn.Module | Part, *, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Keep only the given channels or features of one module, in place.

    Args:
        module: Convolution, linear layer, BatchNorm, InstanceNorm, GroupNorm, option-A shortcut, attention (its heads are its
            outputs), experts likewise, or a bare tensor or number that follows channels.
        outputs: Kept output positions, ``[kept]`` int64 sorted, or None for all. For a grouped convolution or a
            GroupNorm they must be whole groups; the inputs of a removed convolution group go with it. A grouped
            convolution may keep as many outputs of every group instead, and all its inputs.
        inputs: Kept input positions, ``[kept]`` int64 sorted, or None for all. Not for grouped convolutions.

    Raises:
        UnsupportedModelError: If the module is of another kind, or the outputs split a convolution group.
    """
    if is_part(module) or isinstance(module, Experts):
        if outputs is not None:
            module.keep_(outputs)
    elif isinstance(module, ChannelPadShortcut):
        device = module.source.device
        module.slice_(outputs=_on(outputs, device), inputs=_on(inputs, device))
    elif isinstance(module, nn.modules.batchnorm._NormBase):  # of a batch, or of instances
        if outputs is not None:
            _select_(module, ("weight", "bias", "running_mean", "running_var"), 0, outputs)
            module.num_features = outputs.numel()
    elif isinstance(module, nn.GroupNorm):
        if outputs is not None:
            width = module.num_channels // module.num_groups
            groups = _whole_groups(outputs, width, f"a GroupNorm of {module.num_groups}")
            _select_(module, ("weight", "bias"), 0, outputs)
            module.num_groups, module.num_channels = groups, outputs.numel()
    elif isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        _slice_grouped_(module, outputs)
    elif isinstance(module, nn.modules.conv._ConvNd | nn.Linear) or is_transposed(module):
        along_inputs, along_outputs = (0, 1) if inputs_first(module) else (1, 0)
        if outputs is not None:
            _select_(module, ("weight",), along_outputs, outputs)
            _select_(module, ("bias",), 0, outputs)
            setattr(module, next(name for name in _OUTPUTS if hasattr(module, name)), outputs.numel())
        if inputs is not None:
            _select_(module, ("weight",), along_inputs, inputs)
            setattr(module, next(name for name in _INPUTS if hasattr(module, name)), inputs.numel())
    elif head_count(module) is not None:
        if outputs is not None:
            slice_heads_(module, outputs)
    else:
        raise UnsupportedModelError(f"a {type(module).__name__} cannot be sliced; exclude the group that holds it.")


def _slice_grouped_(module: nn.modules.conv._ConvNd, outputs: Tensor | None) -> None:
    if outputs is None:
        return
    width = module.out_channels // module.groups
    in_width = module.in_channels // module.groups
    each = torch.bincount(outputs // width, minlength=module.groups)
    if bool((each == each[0]).all()) and int(each[0]):  # as many of every group stay; the inputs stay as they are
        _select_(module, ("weight", "bias"), 0, outputs)
        module.out_channels = outputs.numel()
        return
    groups = _whole_groups(outputs, width, f"a convolution with {module.groups}")
    _select_(module, ("weight", "bias"), 0, outputs)
    module.groups = groups
    module.out_channels = outputs.numel()
    module.in_channels = groups * in_width


def _whole_groups(outputs: Tensor, width: int, what: str) -> int:
    """How many groups of channels the kept outputs are.

    Raises:
        UnsupportedModelError: If they split one.
    """
    groups = outputs.view(-1, width) // width if outputs.numel() % width == 0 else None
    if groups is None or not bool((groups == groups[:, :1]).all()):
        raise UnsupportedModelError(
            f"the kept outputs of {what} groups split a group of {width} channels; remove whole groups."
        )
    return groups.shape[0]


def _on(index: Tensor | None, device: torch.device) -> Tensor | None:
    return None if index is None else index.to(device)


def _select_(module: nn.Module, names: Iterable[str], dim: int, index: Tensor) -> None:
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is not None:
            _replace_(module, name, tensor.detach().index_select(dim, index.to(tensor.device)))


def _replace_(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor where a parameter or buffer stands, of whatever shape, keeping its kind, device and dtype."""
    old = getattr(module, name)
    tensor = tensor.to(device=old.device, dtype=old.dtype).contiguous()
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = tensor


def set_attribute_(module: nn.Module, name: str, value: int) -> None:
    """Set a structural attribute of a module, in place; ``config.NAME`` on a copy of the configuration of its own."""
    owner, _, leaf = name.rpartition(".")
    if not owner:
        setattr(module, leaf, value)
        return
    own = copy.copy(getattr(module, owner))  # layers share their configuration; another layer may keep other counts
    setattr(own, leaf, value)
    setattr(module, owner, own)


def apply_module_edit_(model: nn.Module, edit: ModuleEdit) -> None:
    """Slice one module and replace the tensors that the edit carries, in place.

    Raises:
        DataError: If the network has no such module, or the saved tensors do not fit it.
    """
    try:
        module = part_of(model, edit.module)
    except AttributeError as error:
        raise DataError(
            f"the saved edit changes a module '{edit.module}', which this network does not have; "
            "use the network that the edits were made on."
        ) from error
    for index, size in ((edit.kept_outputs, _size(module, 0)), (edit.kept_inputs, _size(module, 1))):
        if index is not None and index.numel() and int(index.max()) >= size:
            raise DataError(
                f"{edit.module}: the saved edit keeps channel {int(index.max())}, but there are {size} of them; "
                "use the network that the edits were made on."
            )
    if edit.kept_outputs is not None or edit.kept_inputs is not None:
        slice_module_(module, outputs=edit.kept_outputs, inputs=edit.kept_inputs)
    for name, value in edit.attributes.items():
        set_attribute_(module, name, value)
    for name, tensor in edit.tensors.items():
        old = getattr(module, name, None)
        if old is None and name == "bias" and isinstance(module, nn.Linear):  # a repair may add the missing bias
            module.bias = nn.Parameter(tensor.to(module.weight))
            continue
        if old is None or old.shape != tensor.shape:
            raise DataError(
                f"{edit.module}.{name}: the saved edit holds shape {tuple(tensor.shape)}, the network "
                f"{'nothing' if old is None else tuple(old.shape)}; use the network that the edits were made on."
            )
        _replace_(module, name, tensor.clone())  # the edit's own tensor must not change with the network


def _size(module: nn.Module | Part, dim: int) -> int:
    if is_part(module):
        return module.size
    if isinstance(module, Experts):
        return module.num_experts
    names = _OUTPUTS if dim == 0 else _INPUTS
    return next((getattr(module, name) for name in names if hasattr(module, name)), head_count(module) or 0)


def apply_edit_(model: nn.Module, edit: Edit) -> None:
    """Apply one saved edit to the network it was made on, in place; no data is needed.

    Raises:
        DataError: If a module or a shape does not fit.
    """
    adopt_(model)
    if any(module_edit.attributes for module_edit in edit.modules):  # heads of a decoder
        free_heads_(model)
    adopt_products_(model, (module_edit.module for module_edit in edit.modules))
    for module_edit in edit.modules:
        apply_module_edit_(model, module_edit)


def describe_widths(model: nn.Module) -> dict[str, dict[str, int]]:
    """Channel and feature counts of every module that can be narrowed: module name → attribute → count (JSON-able)."""
    widths: dict[str, dict[str, int]] = {}
    for name, module in model.named_modules():
        for kind, attributes in _ATTRIBUTES:
            if isinstance(module, kind):
                widths[name] = {attribute: getattr(module, attribute) for attribute in attributes}
        if is_transposed(module):
            widths[name] = {attribute: getattr(module, attribute) for attribute in _TRANSPOSED_ATTRIBUTES}
        if name not in widths and (heads := head_count(module)) is not None:
            widths[name] = {HEADS: heads}
    return widths | {name: {SIZE: part.size} for name, part in cut_parts(model)}


def restore_widths_(model: nn.Module, widths: Mapping[str, Mapping[str, int]]) -> None:
    """Narrow a freshly built dense network to saved widths, in place; contents of narrowed tensors are undefined.

    Args:
        model: The dense network.
        widths: What `describe_widths` said of the narrow one.

    Raises:
        DataError: If a module is missing or would have to grow.
    """
    if dict(widths) != describe_widths(model):
        adopt_(model)
        adopt_products_(model, widths)
    for name, module in model.named_modules():
        if isinstance(module, Experts):  # those that are left are named
            left = [place for place, one in enumerate(module.numbers) if f"{name}.{one}.down_proj" in widths]
            if not left:
                raise DataError(f"{name}: the saved widths name none of its experts; the architecture file is damaged.")
            module.keep_(torch.tensor(left, dtype=torch.int64))
    for name, attributes in widths.items():
        try:
            module = part_of(model, name)
            now = {attribute: _width(module, attribute) for attribute in attributes}
        except AttributeError as error:
            raise DataError(f"the saved network has a module '{name}' that its architecture does not build.") from error
        if now == dict(attributes):
            continue
        grows = [attribute for attribute, count in attributes.items() if count > now[attribute] or count < 1]
        if grows:
            raise DataError(
                f"{name}: the saved network asks for {grows[0]} = {attributes[grows[0]]}, "
                f"the architecture has {now[grows[0]]}; the architecture file is damaged."
            )
        outputs, inputs = _counts(attributes)
        grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
        kept = torch.arange(outputs)
        if grouped and attributes["groups"] == module.groups:
            width = module.out_channels // module.groups
            kept = (torch.arange(module.groups)[:, None] * width + kept[: outputs // module.groups]).flatten()
        slice_module_(module, outputs=kept, inputs=None if grouped else _range(inputs))


def _width(module: nn.Module | Part, attribute: str) -> int:
    if is_part(module):
        return module.size
    if attribute != HEADS:
        return getattr(module, attribute)
    return head_count(module) or 0


def _counts(attributes: Mapping[str, int]) -> tuple[int, int | None]:
    outputs = next(attributes[n] for n in (*_OUTPUTS, HEADS, SIZE) if n in attributes)
    inputs = next((attributes[n] for n in _INPUTS if n in attributes), None)
    return outputs, inputs


def _range(count: int | None) -> Tensor | None:
    return None if count is None else torch.arange(count)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of the whole state: equal hashes mean equal networks."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()
