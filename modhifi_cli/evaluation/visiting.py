"""Networks that are larger than a card: their parts visit it one after the other, for the length of their own forward.

Whatever runs the network (a measurement of ours, generation, another library) calls it as ever; the weights stay in the
host's memory and are copied to the card each time they are needed, so a measurement takes longer and gives the same.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn

_MOST = 0.6  # of what is free: activations, logits and the cache of a generation need the rest
_UNITS = 8  # a part that visits takes at most one in so many of what is free


def free_memory(device: torch.device | str = "cpu") -> float:
    """Bytes that tensors on a device can take now.

    On a card this is what its driver says is free and what torch has reserved without using it; on the host what the
    operating system estimates.
    """
    device = torch.device(device)
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + unused)
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 8e9  # systems without /proc: a modest laptop


def fits(model: nn.Module, device: torch.device) -> bool:
    """Whether a network may lie on a device as a whole: it is there already, it is the host, or there is room."""
    if device.type != "cuda" or all(tensor.device == device for tensor in tensors_held(model)):
        return True
    return size_of(model) <= _MOST * free_memory(device)


def size_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; what is shared counts once."""
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors_held(module)}.values())


@contextmanager
def visits(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it every part of a network is on a device while it runs, and where it was before and afterwards.

    Parts are the largest modules that take an eighth of what is free or less; a larger one is taken apart further, and
    what it holds itself stays on the device.
    """
    most = free_memory(device) / _UNITS
    home: dict[int, tuple[Tensor, Tensor]] = {}  # what is on the device → where it lies otherwise
    handles = []

    def bring(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.device != device:
                home[id(tensor)] = (tensor, tensor.data)
                tensor.data = tensor.data.to(device)

    def fetch(module: nn.Module, *_: object) -> None:
        bring(tensors_held(module))

    def leave(module: nn.Module, *_: object) -> None:
        for tensor in tensors_held(module):
            if id(tensor) in home:
                tensor.data = home.pop(id(tensor))[1]

    def hook(module: nn.Module) -> None:
        if size_of(module) <= most or not list(module.children()):
            handles.append(module.register_forward_pre_hook(fetch))
            handles.append(module.register_forward_hook(leave, always_call=True))
            return
        bring(chain(module.parameters(recurse=False), module.buffers(recurse=False)))
        for child in module.children():
            hook(child)

    try:
        hook(model)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for tensor, data in home.values():
            tensor.data = data


def tensors_held(module: nn.Module) -> Iterator[Tensor]:
    """A module's parameters and buffers; what several hold comes once for each."""
    return chain(module.parameters(), module.buffers())
