"""Which clock a program is timed by, and what a machine's state says of the times."""

import os
import time
from collections.abc import Callable

import torch

from modhifi_cli.evaluation.forward import synchronize


def clock_name(device: torch.device, threads: int) -> str:
    """``"card"`` on a card of CUDA, ``"processor"`` where one thread does all the work, ``"wall"`` elsewhere.

    The processor's clock stands still while other programs have it: on a shared machine that is the time of the
    network, and the wall's is the scheduler's. A card's own clock leaves out how long a call waits for the processor to
    come back to it.
    """
    if device.type == "cuda":
        return "card"
    return "processor" if device.type == "cpu" and threads == 1 else "wall"


def clock(name: str) -> Callable[[], float]:
    """Seconds of that clock; the processor's counts every thread of this process."""
    return time.process_time if name == "processor" else time.perf_counter


def milliseconds(run: Callable[[], object], device: torch.device, threads: int) -> float:
    """How long a call takes until everything that it queued on a device is done, by the clock of `clock_name`.

    Args:
        run: The call.
        device: Where it works.
        threads: Of the processor that it may use: with one, the processor's clock counts.
    """
    synchronize(device)
    if device.type == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)  # another card's than the present one's, where jobs have their own
        begin.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end)
    now = clock(clock_name(device, threads))
    start = now()
    run()
    synchronize(device)
    return 1000 * (now() - start)


def card_clocks(device: torch.device) -> dict[str, int]:
    """A card's present clock rates as its driver tells them, MHz; nothing where it does not."""
    if device.type != "cuda":
        return {}
    try:
        return {"clock_mhz": torch.cuda.clock_rate(device)}
    except Exception:  # no library of the driver here, or it does not tell, in words of its own
        return {}


def load_average() -> float | None:
    """Programs that want a processor, mean over the last minute; None where the system does not say."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
