"""Kills at random moments: what is left can be gone on with, and ends with the very same weights, rows or images."""

import hashlib
import json
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.attack.forked import Ended, begin, end, run
from tests.attack.runs import QUICK, weights

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
PRUNE = ["prune", *QUICK, "sparsity=0.3"]
UNLEARN = [
    "unlearn", "forget_class=3", "data=digits", "data.num_samples=60", "evaluation=[]", "evaluation_data=none", "audit=none",
    "check_data=false", "measure_dense=false", "console=plain", "method=modhifi_u", "method.fraction=0.1", "layers='last 2'",
]  # fmt: skip
# Two processes of its own (a fresh interpreter each) or a whole library's imports: killed less often.
SLOW = ("verify", "export", "coverage")


@dataclass(frozen=True)
class Victim:
    """A command that is killed.

    Attributes:
        words: The command; ``run`` and ``forgotten`` are copies of finished runs beside it.
        made: What it has made in its folder, as text that is the same whenever the work is; empty before it is whole.
        resumes: Whether an interrupted run goes on by ``resume=FOLDER``; others by the same command again.
    """

    words: list[str]
    made: Callable[[Path], str]
    resumes: bool = False


def victims() -> dict[str, Victim]:
    """Every verb that works for longer than a moment, and a sweep."""
    small = ["data=digits", "data.num_samples=64", "evaluation_data=none", "console=plain"]
    grid = ["methods=[magnitude_batchnorm]", "budgets=[0.3]", "seeds=[0,1]", "evaluation=[size]"]
    audit = ["data=digits", "data.num_samples=400", "evaluation_data=none", "audit.relearn=null", "audit.membership=null"]
    return {
        "prune": Victim(PRUNE, lambda room: _networks(room, "prune/embedded"), resumes=True),
        "unlearn": Victim(UNLEARN, lambda room: _networks(room, "unlearn/embedded"), resumes=True),
        "sweep": Victim(["prune", "-m", *QUICK, "sparsity=0.3,0.4"], lambda room: _networks(room, "sweeps/*")),
        "compare": Victim(["compare", *small, *grid, "check_data=false"], lambda room: _networks(room, "compare/*/cells")),
        "replay": Victim(["replay", "run=run", "console=plain"], lambda room: _networks(room, "replay/embedded")),
        "study": Victim(["study", "name=existence", *small, "layers=[layer1.0.conv1]", "seeds=[0,1]"],
                        lambda room: _files(room, "outputs/study/**/rows.csv")),
        "synthesize": Victim(["synthesize", "data=procedural", "data.num_samples=64", "console=plain"], _pixels),
        "evaluate": Victim(["evaluate", "run=run", "evaluation=[size]", "measure_dense=false", "console=plain"],
                           lambda room: _numbers(room, "evaluate")),
        "audit": Victim(["audit", "run=forgotten", *audit, "console=plain"], lambda room: _numbers(room, "audit")),
        "export": Victim(["export", "run=run", "export=[onnx]", "console=plain"], lambda room: _files(room, "run/**/*.onnx")),
        "report": Victim(["report", "run=run", "console=plain"], lambda room: _files(room, "run/report.md")),
        "verify": Victim(["verify", "run=run", "console=plain"], lambda room: "nothing"),
        "coverage": Victim(["coverage", "pattern=squeezenet1_1", "jobs=1", "console=plain"],
                           lambda room: _files(room, "outputs/coverage/*/networks/*.json", "status")),
    }  # fmt: skip


def prepared(room: Path, finished: Path, forgotten: Path) -> Path:
    """A folder to work in, with copies of a pruned and of an unlearnt run, whose files others shall not share."""
    room.mkdir(parents=True)
    shutil.copytree(finished, room / "run")
    shutil.copytree(forgotten, room / "forgotten")
    return room


def attack(verb: str, wanted: str, seconds: float, room: Path, seed: int) -> tuple[str | None, str]:
    """Kill a command once, perhaps again while it goes on, then let it end.

    Args:
        verb: One of `victims`.
        wanted: What the undisturbed command made.
        seconds: How long that took.
        room: As `prepared`.
        seed: Of moments and signals.

    Returns:
        What went wrong, or None; and what was done.
    """
    victim, draw = victims()[verb], random.Random(seed)
    what, words, ended = verb, victim.words, None
    for _ in range(draw.choice((1, 1, 1, 2))):
        number, moment = draw.choice(SIGNALS), draw.uniform(0, seconds)
        what += f" {number.name} after {moment:.2f} s"
        ended = _killed(words, room, moment, number)
        if ended.hung or ended.code not in {0, 130, -int(number)} or "Traceback" in ended.output:
            return f"{what} (seed {seed}): ended with {ended.code}: {ended.output[-300:]}", what
        if ended.code == 0:
            break
        words = _going_on(victim, verb, room)
    if ended is not None and ended.code != 0:
        ended = run(words, room, limit=600)
        if ended.code == 2 and "ended before anything was saved" in ended.output:
            shutil.rmtree(words[-1].partition("=")[2])
            ended = run(victim.words, room, limit=600)
        elif ended.code == 2 and "this run is finished" in ended.output:  # killed between its name and its last words
            ended = run(victim.words, room, limit=600)
    if ended.code != 0:
        return f"{what} (seed {seed}): afterwards {ended.code}: {ended.output[-300:]}", what
    found = victim.made(room)
    if found != wanted:
        return f"{what} (seed {seed}): made {found:.100}, not {wanted:.100}", what
    return next((f"{what} (seed {seed}): {bad}" for name in ("run", "forgotten") if (bad := _harmed(room / name))), None), what


def _killed(words: list[str], room: Path, moment: float, number: signal.Signals) -> Ended:
    from modhifi_cli.cli import main

    log = room / ".output"
    return end(begin(lambda: main(words), room, log), log, limit=600, kill=(moment, number))


def _going_on(victim: Victim, verb: str, room: Path) -> list[str]:
    begun = sorted(room.glob(f"outputs/{verb}/embedded/*.incomplete"))
    return [*victim.words, f"resume={begun[0]}"] if victim.resumes and begun else victim.words


def _harmed(folder: Path) -> str | None:
    """What is wrong with a finished run that was only read, or asked for a page or an export."""
    from modhifi_cli.errors import DataError
    from modhifi_cli.files import manifest

    try:
        for place in (folder, folder / "model"):
            manifest.checked(place).check()
    except DataError as error:
        return str(error)
    left = [path.name for path in folder.rglob("*") if path.name.endswith(".writing")]
    return f"{left} left in {folder.name}" if left else None


def _networks(room: Path, place: str) -> str:
    """Hashes of the weights of all finished runs, each once."""
    runs = [path for path in room.glob(f"outputs/{place}/*") if (path / "model").is_dir() and not path.name.endswith(".incomplete")]
    return " ".join(sorted({weights(path) for path in runs}))


def _files(room: Path, pattern: str, key: str | None = None) -> str:
    """Digests of files, or of one key of JSON files, each once."""
    found = (path.read_bytes() if key is None else repr(json.loads(path.read_text()).get(key)).encode() for path in room.glob(pattern))
    return " ".join(sorted({hashlib.sha256(content).hexdigest() for content in found}))


def _pixels(room: Path) -> str:
    import numpy as np

    found = [np.load(path)["images"] for path in room.glob("outputs/synthesize/embedded/*/images.npz") if ".incomplete" not in str(path)]
    return " ".join(sorted({hashlib.sha256(one.tobytes()).hexdigest() for one in found}))


def _numbers(room: Path, verb: str) -> str:
    """The measurements of all finished runs, without times, each once."""
    told = [json.loads(path.read_text()) for path in room.glob(f"outputs/{verb}/embedded/*/results.json") if ".incomplete" not in str(path)]
    return " ".join(sorted({json.dumps(_timeless(one.get("measurements", one))) for one in told}))


def _timeless(value: object) -> object:
    """JSON without what a clock says, and without names of folders."""
    if isinstance(value, dict):
        return {key: _timeless(one) for key, one in value.items() if not any(word in key for word in ("second", "time", "command", "run"))}
    return [_timeless(one) for one in value] if isinstance(value, list) else value
