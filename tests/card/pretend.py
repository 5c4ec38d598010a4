"""A pretended CUDA card: its tensors report ``cuda:0`` and compute on the processor; mixing places fails as on a card.

A mark on the *storage* says where a tensor is, so that views, parameters, autograd, deep copies, safetensors and hooks
need no care. A function mode knows what a call asked for, a dispatch mode checks and marks every operation, and a few
methods of `torch.Tensor` and functions of `torch.cuda` are replaced while the card is in. It counts, by line of the
program, the copies between the two places, the times the processor has to wait for the card, and the bytes that live
on the card; it is full when a card of its size would be full of tensors.

What it cannot see: numbers (TF32, the order of sums, atomics), the card's own random stream, kernels that a dtype
lacks (but integer products, and operators without any CUDA kernel where torch was built with CUDA), streams,
workspaces inside a kernel, fragmentation, speed, a second card, NCCL. Inside one call of a Python function of torch
(``F.*``, ``backward`` with its hooks) new tensors count as where the call's arguments are.
"""

import contextlib
import os
import sys
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

REAL = bool(os.environ.get("MODHIFI_REAL_CARD"))  # the tests run on the machine's own card instead
COUNTED = pytest.mark.skipif(REAL, reason="counts what only the pretended card sees")
CARD, CPU = torch.device("cuda", 0), torch.device("cpu")

_PROGRAM = "modhifi_cli"  # whose lines are counted
_TORCH = os.path.dirname(torch.__file__)
_PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)

# Operators as CUDA treats them. These may read one place and write the other:
_CROSSING = {"_to_copy", "set_", "resize_", "_local_scalar_dense", "_has_compatible_shallow_copy_type"}
# These take a number that lies on the processor although they are not pointwise:
_TAKE_NUMBERS = {
    "masked_fill", "masked_fill_", "index_put", "index_put_", "_index_put_impl_", "fill_", "fill", "where",
    "index_fill", "index_fill_", "clamp", "clamp_", "clamp_min", "clamp_max", "full_like", "_foreach_mul_",
    "_foreach_div_", "_foreach_add_",
}  # fmt: skip
_INDEXING = {"index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_", "_unsafe_index_put"}
# No integer kernels:
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmv", "mv", "dot", "convolution", "linear", "matmul", "addbmm"}
# The processor waits, since the result is a Python number or its size depends on values:
_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero"}


class Seen:
    """What the card saw.

    Attributes:
        copies: Copies between the places, by ``"file:line way"``.
        bytes: What those copies moved.
        waits: Times the processor waited for a value of the card, by ``"file:line operator"``.
        now, peak: Bytes of tensors on the card.
        peak_at: Line that made the last peak.
        pinned: Bytes of host memory ever pinned.
        synchronised: Calls of ``synchronize``.
        resets: Calls of ``reset_peak_memory_stats``.
        total: Size of the card, bytes.
        begun: Whether anything has touched the card; before that its counts cannot be reset.
    """

    def __init__(self, total: float) -> None:
        self.copies: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.now = self.peak = self.pinned = self.synchronised = self.resets = 0
        self.peak_at = ""
        self.total = int(total)
        self.begun = False

    def moved(self, way: str = "") -> int:
        """Bytes copied, ``"to card"``, ``"from card"`` or both."""
        return sum(count for where, count in self.bytes.items() if way in where)

    def report(self) -> str:
        """What happened where, as text."""
        lines = [f"peak {self.peak / 1e6:.2f} MB on the card at {self.peak_at}; {self.synchronised} synchronize()"]
        for title, counts in (("copies", self.copies), ("waits", self.waits)):
            lines.append(f"{title}: {sum(counts.values())}")
            for where, number in counts.most_common(40):
                lines.append(f"  {number:7d} × {where:70} {self.bytes.get(where, 0) / 1e6:.3f} MB")
        return "\n".join(lines) + "\n"


_seen = Seen(80e9)


@contextlib.contextmanager
def card(memory: float = 80e9) -> Iterator[Seen]:
    """Put a card of `memory` bytes in for as long as the block lasts; what it sees is counted from nothing.

    With the environment variable MODHIFI_REAL_CARD the machine's own card takes its place: of what is seen, only the
    peak of the memory is counted.
    """
    if REAL:
        yield _Own(torch.cuda.mem_get_info()[1])
        return
    global _seen
    _seen = Seen(memory)
    absent = object()
    before = []
    for owner, name, value in list(_replacements()):
        before.append((owner, name, owner.__dict__.get(name, absent)))
        setattr(owner, name, value)
    try:
        with _Card(), _Calls():
            yield _seen
    finally:
        for owner, name, value in reversed(before):
            delattr(owner, name) if value is absent else setattr(owner, name, value)


class _Own(Seen):
    """The machine's own card, of which only the peak of the memory is seen."""

    @property
    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()

    @peak.setter
    def peak(self, _: int) -> None:
        torch.cuda.reset_peak_memory_stats()


def on_card(tensor: object) -> bool:
    """Whether it is a tensor of the card."""
    storage = _storage(tensor) if isinstance(tensor, torch.Tensor) else None
    return storage is not None and "_card" in storage.__dict__


# --- where tensors are ----------------------------------------------------------------------------------------------


class _Mark:
    """Kept by a storage on the card, for as long as the storage lives."""

    def __init__(self, size: int) -> None:
        self.size, self.of = 0, _seen
        _seen.begun = True
        if _seen.now + size > _seen.total:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB (pretended card of "
                f"{_seen.total / 1e6:.1f} MB, {_seen.now / 1e6:.1f} MB in use)"
            )
        self.size = size
        _seen.now += size
        if _seen.now > _seen.peak:
            _seen.peak, _seen.peak_at = _seen.now, _line()

    def __del__(self) -> None:
        self.of.now -= self.size


def _storage(tensor: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        try:
            return tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # no memory behind it (functorch, sparse)
            return None


def _place(tensor: Tensor, card: bool) -> Tensor:
    storage = _storage(tensor)
    if storage is None or _real_device(tensor).type != "cpu":
        return tensor
    if card and "_card" not in storage.__dict__:
        storage._card = _Mark(storage.nbytes())
    elif not card:
        storage.__dict__.pop("_card", None)
    return tensor


def _is_cuda(device: Any) -> bool:
    if device is None or isinstance(device, bool):
        return False
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RuntimeError("CUDA error: invalid device ordinal")
    return device.type == "cuda"


def _line() -> str:
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if _PROGRAM in name:
            return f"{name[name.rindex(_PROGRAM) :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _count(way: str, tensor: Tensor) -> None:
    where = f"{_line()} {way}"
    _seen.copies[where] += 1
    _seen.bytes[where] += tensor.numel() * tensor.element_size()


def _mixed(name: str, what: str = "") -> RuntimeError:
    return RuntimeError(
        "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
        f"(pretended card, {name}{what})"
    )


# --- what calls ask for and operations do -----------------------------------------------------------------------------


class _Calls(TorchFunctionMode):
    """Remembers of the outermost call of torch which place it named, and whether an argument is on the card."""

    explicit: bool | None = None  # True the card, False another device, None not said
    ambient = False

    def __torch_function__(self, func, kinds, args=(), kwargs=None):
        kwargs = kwargs or {}
        card = any(map(on_card, tree_leaves((args, kwargs))))
        device = kwargs.get("device")
        explicit = None if device is None else _is_cuda(device)
        generator = kwargs.get("generator")
        if generator is not None:
            target = card if explicit is None else explicit
            if (generator.device.type == "cuda") != target:
                raise RuntimeError(
                    f"Expected a '{'cuda' if target else 'cpu'}' device type for generator but found "
                    f"'{generator.device.type}'"
                )
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            return _made_of_data(func, args, dict(kwargs), explicit)
        if func is torch.Tensor.new_tensor:
            explicit = on_card(args[0]) if explicit is None else explicit
            given = {**kwargs, "dtype": kwargs.get("dtype", args[0].dtype)}
            return _made_of_data(torch.tensor, args[1:], given, explicit)
        if card and func is torch.nn.functional.scaled_dot_product_attention:
            _check_addresses(args[:3])
        before = _Calls.explicit, _Calls.ambient
        _Calls.explicit, _Calls.ambient = explicit, card if explicit is None else explicit
        try:
            return func(*args, **kwargs)
        finally:
            _Calls.explicit, _Calls.ambient = before


def _made_of_data(func: Callable, args: tuple, kwargs: dict[str, Any], explicit: bool | None) -> Tensor:
    data = args[0] if args else kwargs.get("data")
    card = explicit if explicit is not None else on_card(data)
    if isinstance(data, torch.Tensor) and on_card(data) == card:
        kwargs.pop("device", None)
        return func(*args, **kwargs)
    kwargs["device"] = kwargs.get("device") if explicit is False else "cpu"
    made = func(*args, **kwargs)
    if card:
        if made.dim() or isinstance(data, torch.Tensor):
            _count("to card", made)
        made = _place(made.clone() if isinstance(data, torch.Tensor) or func is not torch.tensor else made, True)
    return made


def _check_addresses(parts: tuple[Tensor, ...]) -> None:
    """Fused attention reads 16 bytes at once where the width of a head allows, wherever a slice begins."""
    for part in parts:
        places = (part.shape[-1], part.storage_offset(), *part.stride()[:-1])
        wide, *begins = (number * part.element_size() % 16 == 0 for number in places)
        if wide and not all(begins):
            raise RuntimeError(f"CUDA error: misaligned address (pretended card, {tuple(part.shape)} of a wider tensor)")


def _asked_by_torch() -> bool:
    """Whether the call that is remembered is this operation's own, not that around a hook or mode of the program."""
    frame = sys._getframe(2)
    while frame:
        name = frame.f_code.co_filename
        if frame.f_code is _Calls.__torch_function__.__code__:
            return True
        if not name.startswith(_TORCH) and name != __file__:
            return False
        frame = frame.f_back
    return False


class _Card(TorchDispatchMode):
    """Checks every operation as CUDA would and marks what it makes."""

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(map(_goes_its_own_way, tensors)):
            return func(*args, **kwargs)
        asked = _is_cuda(kwargs.get("device"))
        if asked:
            kwargs["device"] = CPU
        card = [on_card(tensor) for tensor in tensors]
        if any(card):
            _check(func, args, tensors, card)
        known = {storage._cdata for storage in map(_storage, tensors) if storage is not None}
        out = func(*args, **kwargs)
        if asked:
            where = True
        elif _Calls.explicit is not None and _asked_by_torch():
            where = _Calls.explicit
        else:
            where = any(card) if tensors else _Calls.ambient and _asked_by_torch()
        for tensor in tree_leaves(out):
            if where and isinstance(tensor, torch.Tensor):
                storage = _storage(tensor)
                if storage is not None and storage._cdata not in known:
                    _place(tensor, True)
        return out


def _goes_its_own_way(tensor: Tensor) -> bool:
    """Whether a subclass unpacks the operation and calls again with the plain tensors inside."""
    kind = type(tensor)
    return (
        kind not in _PLAIN
        and hasattr(kind, "__torch_dispatch__")
        and kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl
    )


def _check(func: Any, args: tuple, tensors: list[Tensor], card: list[bool]) -> None:
    name = func._schema.name.split("::")[1]
    if name in _WAITING or (name in _INDEXING and _index_waits(name, args)):
        _seen.waits[f"{_line()} {name}"] += 1
    if name == "copy_":
        if card[0] != card[1]:
            _count("to card" if card[0] else "from card", args[1])
        return
    if name in _CROSSING:
        return
    if name in _INDEXING:
        tensors = _indexed(name, args)
        card = [on_card(tensor) for tensor in tensors]
    for tensor, there in zip(tensors, card, strict=True):
        if there or _real_device(tensor).type != "cpu":
            continue
        if any(card) and (tensor.dim() or not (torch.Tag.pointwise in func.tags or name in _TAKE_NUMBERS)):
            raise _mixed(name, f", a CPU tensor of shape {tuple(tensor.shape)}")
    _check_kernels(func, name, args, tensors)


def _index_waits(name: str, args: tuple) -> bool:
    if name.startswith("index_put") and args[2].numel() == 1:  # a mask and a number: masked_fill, no waiting
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1] or ())


def _indexed(name: str, args: tuple) -> list[Tensor]:
    """What must be on one place: the indices may be on the processor, but not the other way round."""
    indices = [index for index in args[1] if isinstance(index, torch.Tensor)]
    if not on_card(args[0]) and any(map(on_card, indices)):
        raise RuntimeError(
            "indices should be either on cpu or on the same device as the indexed tensor (cpu) "
            f"(pretended card, {name})"
        )
    for index in indices:
        if on_card(args[0]) and not on_card(index):
            _count("to card (index)", index)
    return [tensor for tensor in (args[0], *args[2:3]) if isinstance(tensor, torch.Tensor)]


def _check_kernels(func: Any, name: str, args: tuple, tensors: list[Tensor]) -> None:
    if name in _PRODUCTS and not (tensors[0].is_floating_point() or tensors[0].is_complex()):
        raise RuntimeError(f"\"{name}_cuda\" not implemented for '{str(tensors[0].dtype)[6:]}' (pretended card)")
    if name == "linalg_lstsq" and any(isinstance(given, str) and given != "gels" for given in args):
        raise RuntimeError("torch.linalg.lstsq: `driver` other than 'gels' is not supported on CUDA (pretended card)")
    # Attention and convolutions take the processor's own kernels here, which stand for those of the card.
    if not torch.version.cuda or "_for_cpu" in name or name.startswith("mkldnn"):
        return
    overload = "" if func._overloadname == "default" else f".{func._overloadname}"
    keys = ("CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")
    if not any(torch._C._dispatch_has_kernel_for_dispatch_key(func._schema.name + overload, key) for key in keys):
        raise NotImplementedError(f"Could not run '{func}' with arguments from the 'CUDA' backend (pretended card)")


# --- what is replaced while the card is in ----------------------------------------------------------------------------

_base = torch._C.TensorBase
_real_device = _base.device.__get__
_real_generator = torch.Generator
_real_array = torch.Tensor.__array__
_real_copy_of_storage = torch.UntypedStorage.__deepcopy__


class _Travel(torch.autograd.Function):
    """A copy to the other place, whose gradient travels back."""

    @staticmethod
    def forward(ctx, tensor, card):
        ctx.card = on_card(tensor)
        return _place(tensor.clone(), card)

    @staticmethod
    def backward(ctx, gradient):
        return _place(gradient.clone(), ctx.card), None


def _device(self):
    with torch._C.DisableTorchFunction():
        device = _real_device(self)
    return CARD if device.type == "cpu" and on_card(self) else device


def _to(self, *args, **kwargs):
    copy = kwargs.pop("copy", False)
    like = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.get("other")
    if like is not None:
        device, dtype, form = like.device, like.dtype, None
    else:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
    here = on_card(self)
    extra = {} if form is None else {"memory_format": form}
    if device is not None and not _is_cuda(device) and device.type != "cpu":
        return _base.to(self, device, dtype or self.dtype, copy=copy, **extra)
    there = here if device is None else _is_cuda(device)
    with torch._C.DisableTorchFunction():
        if _real_device(self).type != "cpu" and device is not None:  # from meta
            return _place(_base.to(self, CPU, dtype or self.dtype, copy=copy, **extra), there)
        moved = _base.to(self, dtype or self.dtype, copy=copy and there == here, **extra)
        if there == here:
            return moved
        _count("to card" if there else "from card", moved)
        if torch.is_grad_enabled() and moved.requires_grad:
            return _Travel.apply(moved, there)
        return _place(moved.clone(), there)


def _numpy(self, *args, **kwargs):
    if on_card(self):
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory "
            "first."
        )
    return _base.numpy(self, *args, **kwargs)


def _array(self, *args, **kwargs):
    return _numpy(self) if on_card(self) else _real_array(self, *args, **kwargs)


def _pinned(self, *args):
    if on_card(self):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    made = self.clone()
    storage = _storage(made)
    storage._is_pinned = True
    _seen.pinned += storage.nbytes()
    return made


def _is_pinned(self, *args):
    storage = _storage(self)
    return storage is not None and "_is_pinned" in storage.__dict__


def _copied_storage(self, memo):
    made = _real_copy_of_storage(self, memo)
    if "_card" in self.__dict__ and "_card" not in made.__dict__:
        made._card = _Mark(made.nbytes())
    return made


class _Generator(_real_generator):
    def __new__(cls, device="cpu"):
        made = _real_generator.__new__(cls, "cpu")
        made.pretended = CARD if _is_cuda(device) else CPU
        return made

    device = property(lambda self: self.pretended)


class _Event:
    def __init__(self, *args, **kwargs):
        self.time: float | None = None

    def record(self, *args):
        self.time = time.perf_counter()

    def synchronize(self):
        _seen.synchronised += 1

    def elapsed_time(self, other):
        if self.time is None or other.time is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return 1000 * (other.time - self.time)


def _synchronize(*args):
    _seen.synchronised += 1


def _reset_peak(*args):
    if not _seen.begun:
        raise RuntimeError("Invalid device argument (pretended card)")
    _seen.resets += 1
    _seen.peak, _seen.peak_at = _seen.now, ""


def _only_from_the_processor(call: Callable) -> Callable:
    def run(*args, **kwargs):  # exporters bring modes of their own; whatever they get must be on the processor
        for tensor in tree_leaves([list(a.parameters()) if isinstance(a, torch.nn.Module) else a for a in args]):
            if on_card(tensor):
                raise _mixed(call.__name__, ": the pretended card exports from the processor only")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return call(*args, **kwargs)

    return run


def _replacements() -> Iterator[tuple[Any, str, Any]]:
    properties = types.SimpleNamespace(
        name="Pretended card", total_memory=_seen.total, major=9, minor=0, multi_processor_count=132
    )
    of_tensors = {
        "device": property(_device),
        "is_cuda": property(on_card),
        "is_cpu": property(lambda self: self.device.type == "cpu"),
        "to": _to,
        "cpu": lambda self, **_: self.to(CPU),
        "cuda": lambda self, device=None, **_: self.to(CARD if device is None else torch.device(device)),
        "numpy": _numpy,
        "__array__": _array,
        "get_device": lambda self: 0 if on_card(self) else -1,
        "pin_memory": _pinned,
        "is_pinned": _is_pinned,
    }
    of_cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_initialized": lambda: _seen.begun,
        "set_device": lambda device: _is_cuda(f"cuda:{device}" if isinstance(device, int) else device),
        "synchronize": _synchronize,
        "get_device_name": lambda *_: "Pretended card",
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (9, 0),
        "mem_get_info": lambda *_: (_seen.total - _seen.now, _seen.total),
        "memory_allocated": lambda *_: _seen.now,
        "max_memory_allocated": lambda *_: _seen.peak,
        "memory_reserved": lambda *_, **__: _seen.now,
        "max_memory_reserved": lambda *_, **__: _seen.peak,
        "reset_peak_memory_stats": _reset_peak,
        "Event": _Event,
        "current_stream": lambda *_: None,
        "clock_rate": lambda *_: 1980,
        "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.get_rng_state(),
    }
    silent = ("init", "_lazy_init", "empty_cache", "manual_seed", "manual_seed_all", "set_rng_state", "ipc_collect")
    # A function each for the silent ones: dynamo wants them apart.
    of_cuda |= {name: (lambda *_, **__: None) for name in silent}
    for owner, values in ((torch.Tensor, of_tensors), (torch.cuda, of_cuda)):
        yield from ((owner, name, value) for name, value in values.items())
    yield torch, "Generator", _Generator
    yield torch.accelerator, "synchronize", _synchronize
    yield torch.accelerator, "current_stream", lambda *_: types.SimpleNamespace(is_capturing=lambda: False)
    yield torch.UntypedStorage, "__deepcopy__", _copied_storage
    yield torch.export, "export", _only_from_the_processor(torch.export.export)
    yield torch.onnx, "export", _only_from_the_processor(torch.onnx.export)
