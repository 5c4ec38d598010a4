"""Which clock a program is timed by, and what a machine's state says of the times."""

import os
import time
from collections.abc import Callable

import torch


def clock_name(device: torch.device, threads: int) -> str:
    """``"processor"`` where one thread does all the work, ``"wall"`` elsewhere.

    The processor's clock stands still while other programs have it: on a shared machine that is the time of the
    network, and the wall's is the scheduler's.
    """
    return "processor" if device.type == "cpu" and threads == 1 else "wall"


def clock(name: str) -> Callable[[], float]:
    """Seconds of that clock; the processor's counts every thread of this process."""
    return time.process_time if name == "processor" else time.perf_counter


def load_average() -> float | None:
    """Programs that want a processor, mean over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
