"""What may be carried where, and what was taken: the memory of the place where tensors lie, a card's or the host's.

A limit is asked for once, when a run begins, and shared by all that carries activations. What a card holds at its most
and what the process holds at its most are counted for each job, not for the life of the process.
"""

import contextlib
import resource
from pathlib import Path

import torch

from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.evaluation.visiting import free_memory

# A network holds the activations it stands at, those it goes on to, and the images; as much again is left to forwards,
# statistics and solves.
_SHARES = 6
# A layer's sums are of the fitted, the held-out and all samples; a solve works with as many copies and inverses again.
SUMS, _SOLVE = 3, 5


def limit_bytes(gathering: Gathering, device: torch.device | str, *, networks: int = 1) -> float:
    """Largest activation over all images that each of some networks may keep on a device, bytes.

    Args:
        gathering: Says so in numbers, or leaves it to the memory that is free on the device.
        device: Where activations lie.
        networks: How many carry activations beside each other.
    """
    if gathering.offload is True and torch.device(device).type == "cuda":
        return 0.0
    if gathering.carry_gigabytes == "auto":
        return free_memory(device) / (_SHARES * networks)
    return float(gathering.carry_gigabytes) * 1e9 / networks


def host_bytes(gathering: Gathering, device: torch.device | str, *, networks: int = 1) -> float:
    """Largest activation that each of some networks may leave in the host's memory, bytes; 0 where it leaves none."""
    if gathering.offload is False or torch.device(device).type != "cuda":
        return 0.0
    return free_memory("cpu") / (_SHARES * networks)


def place_of_sums(features: int, device: torch.device, *, beside: int = 0) -> torch.device:
    """Where the second moments of a layer's inputs are summed and solved: on its device as long as that has room.

    Half of what is free is left to forwards; a layer that finds no room is summed and solved by the processor.

    Args:
        features: Of a row of the layer's input.
        device: Where its network runs.
        beside: Bytes of sums that will lie there as well.
    """
    if device.type != "cuda":
        return device
    need = beside + (SUMS + _SOLVE) * bytes_of_sums(features)
    return device if need <= free_memory(device) / 2 else torch.device("cpu")


def bytes_of_sums(features: int) -> int:
    """Bytes of second moments, ``[features, features]`` float64."""
    return 8 * features**2


def reset_peaks() -> None:
    """Count the most that is held from now on, on every card and by this process."""
    if torch.cuda.is_initialized():  # torch refuses to reset a card that nothing has touched; it holds nothing yet
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
    with contextlib.suppress(OSError):  # not on Linux, or not allowed: the peak is then that of the process's life
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peaks(device: torch.device | str) -> dict[str, int]:
    """The most that was held since `reset_peaks`, bytes.

    Returns:
        ``"process"``: resident memory of the process, libraries and network included; on a card ``"card"``: of tensors,
        ``"card_reserved"``: of torch's allocator, and ``"card_total"``: its size.
    """
    device = torch.device(device)
    found = {"process": _process_peak()}
    if device.type == "cuda":
        found["card"] = torch.cuda.max_memory_allocated(device)
        found["card_reserved"] = torch.cuda.max_memory_reserved(device)
        found["card_total"] = torch.cuda.mem_get_info(device)[1]
    return found


def _process_peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
