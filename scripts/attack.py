"""Attack the tool for as long as wanted, and print the figures of docs/results/reliability.md.

python scripts/attack.py                                    everything: hours on two cores
python scripts/attack.py hostile damage --minutes 10        some kinds, at most so long each
python scripts/attack.py fuzz --count 2000 --seed 7         another draw
"""

import argparse
import collections
import contextlib
import io
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ["OMP_NUM_THREADS"] = "1"  # threads of a pool do not survive the fork, and their child would wait for them

COUNTS = {"hostile": 2000, "damage": 500, "edits": 100, "kills": 150, "fuzz": 2000, "places": 1, "reading": 15}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(COUNTS), help=f"of {', '.join(COUNTS)}")
    parser.add_argument("--count", type=int, help="attacks of each kind, at most")
    parser.add_argument("--minutes", type=float, default=1e9, help="for each kind, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--whole", type=int, default=100, help="every so many command lines may begin its work")
    parser.add_argument("--skip", type=int, default=0, help="leave out so many of the hostile things, to go on with the rest")
    parser.add_argument("--verbs", nargs="*", help="only these are killed")
    asked = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as place:
        os.environ["XDG_STATE_HOME"] = os.environ["XDG_CACHE_HOME"] = f"{place}/of the user"
        from tests.attack import forked, runs

        with contextlib.redirect_stdout(io.StringIO()):
            finished = runs.make(Path(place) / "attacked")
        if asked.kinds != ["reading"]:
            forked.compose_once()
            forked.warm(runs.readers(finished).values(), Path(place))
        for kind in asked.kinds:
            attacks = ATTACKS[kind](finished, Path(place) / kind, asked.count or COUNTS[kind], asked)
            bad += _report(kind, attacks, asked.minutes * 60)
    return 1 if bad else 0


def _report(kind: str, attacks: Iterator[tuple[str, str | None]], seconds: float) -> int:
    """Run attacks until they or the time end; print each finding at once and the counts at the end."""
    began, counts, bad = time.monotonic(), collections.Counter(), 0
    for what, found in attacks:
        counts[what] += 1
        if found is not None:
            bad += 1
            print(f"FOUND {kind}: {found}", flush=True)
        if time.monotonic() - began > seconds:
            break
    told = ", ".join(f"{what} {count}" for what, count in sorted(counts.items()))
    print(f"{kind}: {sum(counts.values())} attacks, {bad} found something, {time.monotonic() - began:.0f} s ({told})", flush=True)
    return bad


def _hostile(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import hostile

    things = list(hostile.every())
    random.Random(asked.seed).shuffle(things)
    for number, one in enumerate(things[asked.skip : asked.skip + count]):
        yield one.name.split()[0].partition(".")[0], hostile.attack(one, finished, room / str(number))
        shutil.rmtree(room / str(number), ignore_errors=True)


def _damage(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import damage, runs

    wanted = runs.weights(finished)
    for seed in range(asked.seed * 10**6, asked.seed * 10**6 + count):
        yield "finished runs", damage.attack_finished(finished, wanted, room / str(seed), seed)
        shutil.rmtree(room / str(seed))


def _edits(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import damage, kills, places, runs

    wanted = runs.weights(finished)
    room.mkdir(parents=True)
    begun = places.interrupted(room, kills.PRUNE)
    for seed in range(asked.seed * 10**6, asked.seed * 10**6 + count):
        (room / str(seed)).mkdir()
        yield "interrupted runs", damage.attack_interrupted(begun, kills.PRUNE, wanted, room / str(seed), seed)


def _kills(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import kills, runs
    from tests.attack.forked import run, warm

    (room / "first").mkdir(parents=True)
    ended = run(kills.UNLEARN, room / "first")
    assert ended.code == 0, ended.output
    forgotten = runs.only(room / "first" / "outputs", "unlearn/embedded/*")
    victims = {verb: victim for verb, victim in kills.victims().items() if not asked.verbs or verb in asked.verbs}
    here = kills.prepared(room / "warm", finished, forgotten)
    warm([victim.words for verb, victim in victims.items() if verb not in kills.SLOW], here)
    known: dict[str, tuple[float, str]] = {}
    # All of them in turn, those that start interpreters of their own every fourth time.
    order = [verb for turn in range(4) for verb in victims if verb not in kills.SLOW or turn == 3]
    for number in range(count):
        verb = order[number % len(order)]
        if verb not in known:
            here = kills.prepared(room / f"{verb} undisturbed", finished, forgotten)
            ended = run(victims[verb].words, here, limit=600)
            assert ended.code == 0, ended.output
            known[verb] = ended.seconds, victims[verb].made(here)
            assert known[verb][1], verb
            shutil.rmtree(here)
        here = kills.prepared(room / str(number), finished, forgotten)
        found, what = kills.attack(verb, known[verb][1], known[verb][0], here, asked.seed * 10**6 + number)
        shutil.rmtree(here)
        yield " ".join(what.split()[:2]), found


def _fuzz(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import fuzz

    room.mkdir(parents=True)
    fuzz.litter(room)
    draw = random.Random(asked.seed)
    for number in range(count):
        words = fuzz.words_of(draw, finished)
        found, code = fuzz.attack(words, room, whole=number % asked.whole == 0)
        yield f"exit {code}", None if found is None else f"{words}: {found}"


def _places(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    from tests.attack import places, runs

    wanted = runs.weights(finished)
    for size in (5_000, 10_000, 20_000, 50_000, 100_000, 300_000, 600_000):
        (room / f"limit {size}").mkdir(parents=True)
        yield "ulimit -f", places.limited(room / f"limit {size}", size)
    for name, act in (
        ("read-only", places.read_only),
        ("two processes", lambda here: places.two(here, wanted)),
        ("closed pipe", lambda here: places.closed_pipe(here, REPOSITORY)),
        ("terminal gone", places.gone_terminal),
    ):
        (room / name).mkdir(parents=True)
        yield name, act(room / name)
    mount = os.environ.get("MODHIFI_SMALL_DISK")  # a mounted file system with almost no room, emptied before
    if mount:
        (room / "full").mkdir(parents=True)
        yield "full disk", places.full(room / "full", Path(mount))


def _reading(finished: Path, room: Path, count: int, asked: argparse.Namespace) -> Iterator[tuple[str, str | None]]:
    """The time of reading saved networks with and without the checks, turn by turn in one process."""
    from modhifi_cli.files import artifacts
    from tests.attack import reading

    folders = {"embedded": finished / "model"}
    for loaded in reading.networks():
        folders[loaded.name] = room / loaded.name / "model"
        artifacts.save_model(folders[loaded.name], loaded, loaded.model)
    for name, folder in folders.items():
        told = reading.costs(folder, count)
        print(f"reading {name}: {1000 * told['checked']:.1f} ms with the checks, {1000 * told['unchecked']:.1f} ms without "
              f"(medians of {count} turns), median ratio of a turn {told['ratio']:.3f}", flush=True)  # fmt: skip
        yield name, None


ATTACKS = {"hostile": _hostile, "damage": _damage, "edits": _edits, "kills": _kills, "fuzz": _fuzz, "places": _places, "reading": _reading}


if __name__ == "__main__":
    sys.exit(main())
