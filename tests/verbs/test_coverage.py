"""`modhifi coverage` on the smallest networks: what it finds, that it goes on where it stopped, and what it refuses."""

import json
import os

import pytest

from modhifi_cli.cli import main
from modhifi_cli.engine import coverage as task
from modhifi_cli.files import kept
from modhifi_cli.models import catalogue
from modhifi_cli.verbs import coverage as verb

NAME = "squeezenet1_1"
ASKED = {"library": "torchvision", "share": 0.3, "onnx": False}


def run(*words: str) -> int:
    return main(["coverage", "console=plain", "jobs=1", *words])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    root = tmp_path_factory.mktemp("coverage")
    assert run(f"pattern={NAME}", f"output_dir={root}") == 0
    return root / "coverage" / "torchvision"


def test_a_network_is_cut_saved_and_read_back(done):
    (row,) = json.loads((done / "results.json").read_text())["networks"]
    assert row["counts"] and row["why"] is None
    assert row["groups"] == 25 and not row["refused"]
    assert row["carried"] == 1.0 and 0.35 < row["removed"] < 0.55
    assert row["law_dtype"] == "float64" and row["difference"] < 1e-5 and row["reload"] == 0.0
    assert row["input"] == [3, 64, 64]


def test_the_page_has_a_row_with_versions_and_the_command(done):
    page = (done / "coverage.md").read_text()
    assert (done / "coverage.html").read_text().startswith("<!doctype html>")
    assert f"| {NAME} | classification | 3×64×64 | 1.2 M | 25 | 0 | 100 % |" in page
    assert "torchvision: 1 of 1 networks" in page and "torch " in page and f"pattern={NAME}" in page


def test_a_finished_network_is_not_examined_again(done, monkeypatch, capsys):
    monkeypatch.setattr(verb, "_examined", lambda names, *rest: iter([pytest.fail("examined")] if names else []))
    assert run(f"pattern={NAME}", f"output_dir={done.parent.parent}") == 0
    assert "1 of them finished before" in capsys.readouterr().out


def test_a_damaged_result_and_one_of_other_settings_are_made_anew(done, here):
    file = verb._file(done, NAME)
    asked = json.loads(file.read_text())["asked"]
    assert kept.read_cell(file, verb._OF_A_NETWORK, asked=asked) is not None
    assert kept.read_cell(file, verb._OF_A_NETWORK, asked=asked | {"share": 0.5}) is None
    damaged = here / "damaged.json"
    damaged.write_text(file.read_text()[:50])
    assert kept.read_cell(damaged, verb._OF_A_NETWORK, asked=asked) is None


def test_a_process_that_takes_too_long_is_ended_and_the_reason_kept(here):
    assert run(f"pattern={NAME}", "timeout=0.01") == 0
    (row,) = json.loads((here / "outputs/coverage/torchvision/results.json").read_text())["networks"]
    assert not row["counts"] and row["why"] == "it took longer than 0.01 s"


def test_a_failing_network_gives_its_reason_and_no_traceback(here):
    verb.examine_into_file({"name": "none", "kind": "", "asked": ASKED, "memory": 6, "file": str(here / "none.json")})
    found = json.loads((here / "none.json").read_text())
    assert not found["counts"] and "torchvision has no image network 'none'" in found["why"]


def test_what_the_library_itself_cannot_run_is_named_apart_and_not_counted():
    from modhifi_cli.pages import coverage as pages
    from modhifi_cli.pages.page import markdown

    row = {"name": "good", "kind": "causal decoder", "counts": False, "why": "law", "refused": []}
    rows = [row, row | {"name": "broken", "why": "it is not made", "apart": True}]
    content = {"library": "transformers", "date": "today", "settings": {"share": 0.3}, "networks": rows}
    page = markdown(pages.page(content, {"packages": {}, "system": "here", "command": "modhifi coverage"}))
    assert "transformers: 0 of 1 networks" in page and "Named apart in transformers: 1" in page
    assert "| broken | causal decoder | it is not made |" in page


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"finite": False}, "its answer is not finite"),
        ({"difference": 0.25}, "sliced and zeroed logits differ by 2.5e-01 of their scale"),
        ({"reload": None}, "the saved network does not answer as before"),
        ({"reload": 0.25}, "the saved network does not answer as before"),
        ({"carried": 0.5}, "its groups carry 50 % of the parameters, less than 80 %"),
        ({"removed": 0.1}, "10 % of the parameters are gone, less than 20 %"),
        ({"own_forward": False}, "the library's own forward fails after the cut"),
        ({}, None),
    ],
)
def test_why_a_network_does_not_count_is_said(found, words):
    counts = {"finite": True, "difference": 0.0, "reload": 0.0, "carried": 1.0, "removed": 0.5}
    assert verb._why_not(counts | found, task) == words


def test_a_pattern_that_matches_nothing_names_the_nearest(capsys):
    assert run("pattern=resnet1000*") == 2
    error = capsys.readouterr().err
    assert "torchvision has no network that matches 'resnet1000*', did you mean 'resnet101'" in error
    assert not os.path.exists("outputs")


def test_a_library_is_a_name(capsys):
    assert run("library=3") == 2
    assert "library must be torchvision, timm or transformers; got 3." in capsys.readouterr().err


def test_an_unknown_library_names_the_known_ones(capsys):
    assert run("library=torchvison") == 2
    assert "there is no library 'torchvison' here, did you mean 'torchvision'?" in capsys.readouterr().err


def test_one_per_file_is_for_timm(capsys):
    assert run(f"pattern={NAME}", "one_per_file=true") == 2
    assert "one_per_file chooses among the module files of timm" in capsys.readouterr().err


def test_the_smallest_of_a_file_is_found_without_weights():
    smallest: dict[str, str] = {}
    known = {"resnet10t": "resnet", "resnet50": "resnet", "vgg11": "vgg", "test_resnet": "resnet"}
    stages = list(catalogue.smallest_of_each_file(known, smallest))
    assert smallest == {"resnet": "resnet10t", "vgg": "vgg11"}
    assert stages[-1].done == stages[-1].total == 2


def test_every_torchvision_network_of_the_three_kinds_is_known():
    kinds = catalogue.kinds("torchvision")
    assert {kinds[name] for name in ("resnet18", "ssd300_vgg16", "fcn_resnet50")} == {
        "classification", "detection", "segmentation",
    }  # fmt: skip
    found = list(catalogue.matching("torchvision", ["vgg1?", "resnet18"]))
    assert found == ["resnet18", "vgg11", "vgg13", "vgg16", "vgg19"]
