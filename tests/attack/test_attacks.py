"""Part of the attacks, for every change; `scripts/attack.py` runs as many as are wanted and prints its figures."""

import random
from pathlib import Path

import pytest

from tests.attack import damage, fuzz, hostile, kills, places, runs
from tests.attack.forked import run as forked
from tests.attack.forked import warm

pytestmark = pytest.mark.attack
PACKAGE = Path(__file__).resolve().parent.parent.parent
SHARE = 5  # every so many of the hostile things


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    room = tmp_path_factory.mktemp("attacked")
    run = runs.make(room)
    warm(runs.readers(run).values(), room)
    return run


@pytest.fixture(scope="module")
def weights(finished):
    return runs.weights(finished)


def test_a_strangers_folder_reaches_nothing_outside_it(finished, tmp_path):
    things = list(hostile.every())
    assert len(things) >= 200
    found = [hostile.attack(one, finished, tmp_path / str(n)) for n, one in enumerate(things) if n % SHARE == 0]
    assert not [one for one in found if one]


def test_damage_is_never_read_as_other_weights(finished, weights, tmp_path):
    found = [damage.attack_finished(finished, weights, tmp_path / str(seed), seed) for seed in range(30)]
    assert not [one for one in found if one]


def test_damaged_edits_are_never_gone_on_from(weights, tmp_path):
    begun = places.interrupted(tmp_path, kills.PRUNE)
    found = []
    for seed in range(12):
        room = tmp_path / str(seed)
        room.mkdir()
        found.append(damage.attack_interrupted(begun, kills.PRUNE, weights, room, seed))
    assert not [one for one in found if one]


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory):
    room = tmp_path_factory.mktemp("forgotten")
    assert forked(kills.UNLEARN, room).code == 0
    return runs.only(room / "outputs", "unlearn/embedded/*")


@pytest.mark.parametrize("verb", [verb for verb in kills.victims() if verb != "coverage"])
def test_what_a_kill_leaves_ends_with_the_same_weights(verb, finished, forgotten, tmp_path):
    victim = kills.victims()[verb]
    ended = forked(victim.words, kills.prepared(tmp_path / "undisturbed", finished, forgotten), limit=600)
    wanted = victim.made(tmp_path / "undisturbed")
    assert ended.code == 0 and wanted
    found = []
    for seed in range(1 if verb in kills.SLOW else 2):
        here = kills.prepared(tmp_path / str(seed), finished, forgotten)
        found.append(kills.attack(verb, wanted, ended.seconds, here, seed)[0])
    assert not [one for one in found if one]


def test_no_command_line_ends_in_a_traceback_or_never(finished, tmp_path):
    fuzz.litter(tmp_path)
    draw = random.Random(0)
    lines = [fuzz.words_of(draw, finished) for _ in range(150)]
    found = [(words, fuzz.attack(words, tmp_path, whole=n % 15 == 0)[0]) for n, words in enumerate(lines)]
    assert not [one for one in found if one[1]]


@pytest.mark.parametrize("size", [5_000, 50_000, 300_000])
def test_a_limit_on_file_sizes_loses_nothing(tmp_path, size):
    assert places.limited(tmp_path, size) is None


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    assert places.read_only(tmp_path) is None


def test_two_processes_do_not_share_a_run(tmp_path, weights):
    assert places.two(tmp_path, weights) is None


def test_a_closed_pipe_and_a_gone_terminal_are_no_errors_of_ours(tmp_path):
    assert places.closed_pipe(tmp_path, PACKAGE) is None
    assert places.gone_terminal(tmp_path) is None
