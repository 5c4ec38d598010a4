"""Programs timed in a process of its own: what a server would run, with the threads asked for and nothing beside it.

`timed` starts the process, sends it the programs and reads what it says line by line. Every round times each program
once, in turning order: a machine gets warm and has other work to do, and programs timed one after the other would be
charged for different minutes of it.
"""

import io
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError, is_out_of_memory
from modhifi_cli.evaluation.runtimes import NotPortable, runtime
from modhifi_cli.evaluation.runtimes.clocks import clock_name, load_average, milliseconds
from modhifi_cli.records import Progress


@dataclass(frozen=True)
class Rounds:
    """How long and how often programs are timed.

    Attributes:
        most: Timed rounds at most.
        fewest: Timed rounds at least, whatever the time.
        warmup: Rounds before, at most; they take at most half of `max_seconds`, and one is always done if above 0.
        max_seconds: For warm-up and timing of all programs together; making the programs comes before.
    """

    most: int
    fewest: int
    warmup: int
    max_seconds: float


@dataclass(frozen=True)
class Timings:
    """What was found.

    Attributes:
        milliseconds: ``[programs, rounds]`` float64.
        warmup: Rounds before.
        clock: As `clock_name`.
        own_process: Whether it was one; a network that cannot be sent is timed in this one.
        load_average: Of the machine before the first round, or None.
    """

    milliseconds: Tensor
    warmup: int
    clock: str
    own_process: bool
    load_average: float | None


class OutOfMemory(Exception):
    """A program or its batch does not fit; its name."""


def timed(
    name: str,
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    *,
    threads: int,
    rounds: Rounds,
    progress: Callable[[Progress], None],
    place: str = "runtime.serve",
) -> Timings:
    """Time networks in a runtime, in a process of its own.

    Args:
        name: Of the runtime.
        models: In evaluation mode, by name.
        inputs: The batch, on the device that counts.
        threads: Of the processor.
        rounds: How long.
        progress: Told of every round.
        place: The setting that names the runtime, for messages.

    Raises:
        ConfigError: If the runtime is unknown, not installed, or not for that device.
        UnsupportedModelError: If it cannot run a network.
        OutOfMemory: If the batch does not fit.
    """
    serving = runtime(name, place=place, device_type=inputs.device.type)
    job: dict[str, Any] = {"runtime": name, "threads": threads, "rounds": asdict(rounds), "device": str(inputs.device)}
    try:
        progress(Progress("latency", f"programs for {name}", 0, rounds.most))
        job["programs"] = {key: serving.pack(model, inputs) for key, model in models.items()}
        return _elsewhere(job, inputs, rounds, progress)
    except NotPortable:
        device = inputs.device
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            runs = {key: serving.program(model, inputs, threads) for key, model in models.items()}
            return _timed_rounds(runs, device, threads, rounds, progress, own_process=False)
        finally:
            torch.set_num_threads(before)


def _elsewhere(job: dict[str, Any], inputs: Tensor, rounds: Rounds, progress: Callable[[Progress], None]) -> Timings:
    job["inputs"] = inputs.cpu()
    file = io.BytesIO()
    torch.save(job, file)
    environment = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        try:
            worker.stdin.write(file.getvalue())
            worker.stdin.close()
            for line in worker.stdout:
                told = json.loads(line)
                if "done" in told:
                    progress(Progress("latency", told["item"], told["done"], rounds.most))
                elif "milliseconds" in told:
                    return Timings(**told | {"milliseconds": torch.tensor(told["milliseconds"], dtype=torch.float64)})
                else:
                    raise _raised(told)
        except BrokenPipeError:
            pass
        finally:
            if worker.poll() is None and sys.exc_info()[0] is not None:
                worker.kill()
    if worker.returncode in (-9, 137):
        raise OutOfMemory("the networks")
    raise UnsupportedModelError(
        f"the process that timed the network in {job['runtime']} ended at once (status {worker.returncode}); choose "
        "another runtime."
    )


def _raised(told: Mapping[str, str]) -> Exception:
    kinds = {"memory": OutOfMemory, "portable": NotPortable}
    return kinds.get(told["error"], UnsupportedModelError)(told["text"])


def _timed_rounds(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    threads: int,
    rounds: Rounds,
    progress: Callable[[Progress], None],
    *,
    own_process: bool,
) -> Timings:
    names = list(runs)
    load = load_average()

    def once(name: str) -> float:
        try:
            return milliseconds(runs[name], device, threads)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemory(name) from error
            raise

    started, warmed = time.perf_counter(), 0
    while warmed < rounds.warmup and (warmed == 0 or time.perf_counter() - started < rounds.max_seconds / 2):
        for name in names:
            once(name)
        warmed += 1
    found: list[list[float]] = []
    while len(found) < rounds.most:
        if len(found) >= rounds.fewest and time.perf_counter() - started >= rounds.max_seconds:
            break
        progress(Progress("latency", "rounds", len(found), rounds.most))
        # The order turns by one each round: whoever comes first may find colder caches or a higher clock.
        turn = len(found) % len(names)
        times = {name: once(name) for name in names[turn:] + names[:turn]}
        found.append([times[name] for name in names])
    progress(Progress("latency", "rounds", rounds.most, rounds.most))
    return Timings(torch.tensor(found, dtype=torch.float64).T, warmed, clock_name(device, threads), own_process, load)


def _work(stream: Any, tell: Callable[[Mapping[str, Any]], None]) -> None:
    """What the process does: read the job, load the programs, time them, tell."""
    job = torch.load(io.BytesIO(stream.read()), weights_only=False)  # from the process that started this one
    threads, device = job["threads"], torch.device(job["device"])
    torch.set_num_threads(threads)
    serving = runtime(job["runtime"], device_type=device.type)
    inputs = job["inputs"].to(device)
    try:
        runs = {}
        for name, packed in job["programs"].items():
            tell({"item": f"{name} in {job['runtime']}", "done": 0})
            runs[name] = serving.load(packed, inputs, threads)
        found = _timed_rounds(
            runs, device, threads, Rounds(**job["rounds"]), lambda p: tell({"item": p.item, "done": p.done}),
            own_process=True,
        )  # fmt: skip
        tell(asdict(found) | {"milliseconds": found.milliseconds.tolist()})
    except OutOfMemory as error:
        tell({"error": "memory", "text": str(error)})
    except NotPortable as error:
        tell({"error": "portable", "text": str(error)})
    except (UnsupportedModelError, pickle.UnpicklingError) as error:
        tell({"error": "unsupported", "text": str(error)})
    except Exception as error:  # a runtime raises whatever its operators do
        if is_out_of_memory(error):
            tell({"error": "memory", "text": "the networks"})
        else:
            told = next(iter(str(error).strip().splitlines()), type(error).__name__)
            tell({"error": "unsupported", "text": f"{job['runtime']} cannot run the network ({told})."})


def main(arguments: Sequence[str] = ()) -> None:
    """Entry of the process: the job comes on standard input, JSON lines go to standard output."""
    lines = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is nothing the other side expects

    def tell(what: Mapping[str, Any]) -> None:
        lines.write(json.dumps(what) + "\n")
        lines.flush()

    _work(sys.stdin.buffer, tell)


if __name__ == "__main__":
    main()
