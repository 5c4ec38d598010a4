"""Kills at random moments: what is left can be gone on with, and ends with the very same weights."""

import random
import signal
from pathlib import Path

from tests.attack.forked import begin, end, run
from tests.attack.runs import QUICK

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
PRUNE = ["prune", *QUICK, "sparsity=0.3"]
UNLEARN = [
    "unlearn", "forget_class=3", "data=digits", "data.num_samples=60", "evaluation=[]", "evaluation_data=none", "audit=none",
    "check_data=false", "measure_dense=false", "console=plain", "method=modhifi_u", "method.fraction=0.1", "layers='last 2'",
]  # fmt: skip


def commands(finished: Path) -> dict[str, list[str]]:
    """What is killed, by verb; those that read a run read this one."""
    return {
        "prune": PRUNE,
        "unlearn": UNLEARN,
        "replay": ["replay", f"run={finished}", "console=plain"],
        "evaluate": ["evaluate", f"run={finished}", "evaluation=[size]", "measure_dense=false", "console=plain"],
        "report": ["report", f"run={finished}", "console=plain"],
        "verify": ["verify", f"run={finished}", "console=plain"],
    }


def attack(verb: str, words: list[str], wanted: str | None, seconds: float, room: Path, seed: int) -> tuple[str | None, str]:
    """Kill a command once, and again while it is resumed, then let it end.

    Args:
        verb: Its verb.
        words: The command.
        wanted: Hash of the weights of the undisturbed run, for verbs that make a network.
        seconds: How long the undisturbed command took.
        room: An empty folder.
        seed: Of moment and signal.

    Returns:
        What went wrong, or None; and what was done.
    """
    from modhifi_cli.cli import main

    draw = random.Random(seed)
    number = draw.choice(SIGNALS)
    moment = draw.uniform(0, seconds)
    log = room / ".output"
    ended = end(begin(lambda: main(words), room, log), log, limit=300, kill=(moment, number))
    what = f"{verb} {number.name} after {moment:.2f} s (seed {seed})"
    expected = {0, 130, -int(number)}
    if ended.hung or ended.code not in expected or "Traceback" in ended.output:
        return f"{what}: ended with {ended.code}: {ended.output[-300:]}", what
    if wanted is None:
        again = run(words, room, limit=300)
        return (None if again.code == 0 else f"{what}: afterwards {again.code}: {again.output[-300:]}"), what
    begun = [path for path in room.glob(f"outputs/{verb}/embedded/*") if path.name.endswith(".incomplete")]
    done = [path for path in room.glob(f"outputs/{verb}/embedded/*") if not path.name.endswith(".incomplete")]
    if begun and not done and verb != "replay":
        again = run([*words, f"resume={begun[0]}"], room, limit=300)
        if again.code == 2 and "ended before anything was saved" in again.output:
            what += ", before anything was saved"
            again = run([*words, "output_dir=again"], room, limit=300)
    elif done:
        again = ended
    else:
        again = run([*words, "output_dir=again"], room, limit=300)
    finished = [p for p in (*room.glob(f"outputs/{verb}/embedded/*"), *room.glob(f"again/{verb}/embedded/*"))
                if not p.name.endswith(".incomplete")]  # fmt: skip
    if not finished:
        return f"{what}: nothing finished, {again.code}: {again.output[-300:]}", what
    from tests.attack.runs import weights

    return (None if weights(finished[0]) == wanted else f"{what}: other weights"), what
