"""Runs by short names."""

import pytest

from modhifi_cli.errors import DataError
from modhifi_cli.files.run_names import named_run, named_words


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("prune/a/20260101-100000-000001_x", "prune/b/20260102-100000-000001_y", "unlearn/a/20260103-100000-1_z"):
        (tmp_path / "outputs" / name / "model").mkdir(parents=True)
    (tmp_path / "outputs" / "evaluate" / "a" / "20260104-100000-1_e").mkdir(parents=True)
    (tmp_path / "outputs" / "prune" / "a" / "20260105-100000-1_i.incomplete" / "model").mkdir(parents=True)
    return tmp_path / "outputs"


@pytest.mark.parametrize("given, found", [
    ("last", "unlearn/a/20260103-100000-1_z"),
    ("last-1", "prune/b/20260102-100000-000001_y"),
    ("last-2", "prune/a/20260101-100000-000001_x"),
    ("20260102", "prune/b/20260102-100000-000001_y"),
    ("20260104-10", "evaluate/a/20260104-100000-1_e"),
])  # fmt: skip
def test_a_run_is_named_by_its_place_or_its_beginning(outputs, given, found):
    assert named_run(given, outputs) == str(outputs / found)


def test_an_existing_folder_and_whatever_looks_like_a_path_is_left_alone(outputs):
    (outputs.parent / "last").mkdir()
    assert named_run("last", outputs) == "last" and named_run("some/where", outputs) == "some/where"


@pytest.mark.parametrize("given, said", [
    ("last-3", r"run=last-3: there are 3 finished runs with a network"),
    ("2026", r"run=2026: 5 runs begin so \(20260101-.*, …\); give more of the name"),
    ("2027", r"run=2027: no such folder, and no run under .* begins so \(the newest: 20260105"),
])  # fmt: skip
def test_a_name_without_a_run_or_with_several_is_refused(outputs, given, said):
    with pytest.raises(DataError, match=said):
        named_run(given, outputs)


def test_how_many_finished_runs_there_are_is_said_for_one_and_for_none(tmp_path):
    with pytest.raises(DataError, match=r"run=last: there is no finished run with a network under .*; give a folder"):
        named_run("last", tmp_path)
    (tmp_path / "prune/a/20260101-100000-000001_x/model").mkdir(parents=True)
    with pytest.raises(DataError, match=r"run=last-1: there is one finished run with a network under .*; give a folder"):
        named_run("last-1", tmp_path)


def test_only_the_words_that_name_runs_are_looked_at(outputs):
    words = ["model=run", "model.run=last", "run=null", "runs=[last,20260101]", "seeds=[0,1]", "output_dir=outputs"]
    found = named_words(words)
    assert found[0] == "model=run" and found[1] == ("model.run", "outputs/unlearn/a/20260103-100000-1_z")
    assert found[3] == ("runs", ["outputs/unlearn/a/20260103-100000-1_z", "outputs/prune/a/20260101-100000-000001_x"])
    assert found[2] == "run=null" and found[4:] == words[4:]
