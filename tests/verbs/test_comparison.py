"""`modhifi compare` end to end on the embedded network: the same protocol for all, cells kept, failures recorded."""

import csv
import functools
import json
import re

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.errors import NumericsError
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts
from modhifi_cli.settings import config
from modhifi_cli.verbs import prune as verb

SMALL = ["data.num_samples=32", "evaluation=[top1,agreement]", "evaluation_data.num_samples=60", "console=plain"]
GRID = ["methods=[magnitude,paper]", "budgets=[0.4]", "seeds=[0,1]"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def compare(*words: str) -> int:
    return main(["compare", *SMALL, *words])


def only_folder(root):
    (found,) = (root / "outputs" / "compare").iterdir()
    return found


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


class Runs:
    """Counts the runs that really prune, and lets some of them end otherwise."""

    def __init__(self, monkeypatch):
        self.made: list[str] = []
        self.ends: dict[str, BaseException] = {}
        edit = verb._edit_

        def edit_(work, *rest):
            name = work.place.final.name
            self.made.append(name)
            for start, error in self.ends.items():
                if name.startswith(start):
                    raise error
            return edit(work, *rest)

        monkeypatch.setattr(verb, "_edit_", edit_)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished comparison that tests may read but not change."""
    root = tmp_path_factory.mktemp("finished")
    assert compare(*GRID, f"output_dir={root / 'outputs'}") == 0
    return root


def test_a_comparison_holds_a_table_and_figures_of_all_cells(finished):
    folder = only_folder(finished)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"comparison.csv", "comparison.md", "comparison.html", "cells.csv", "methods.png", "methods.svg"}
    assert not [name for name in names if name.startswith("frontier")], "one budget is no curve"
    assert len(list((folder / "cells").iterdir())) == 4
    rows = read_csv(folder / "comparison.csv")
    assert [row["method"] for row in rows] == ["dense", "magnitude", "paper"]
    for row in rows[1:]:
        assert abs(float(row["removed_flops"]) - 100 * float(row["budget"])) < 1
        assert row["seeds"] == "2" and row["top1_sd"] != "" and row["agreement"] != ""
    text = (folder / "comparison.md").read_text()
    assert "| dense |" in text and "methods.svg" in text and "modhifi compare" in text
    assert "At 40 % " in text and " keeps most: top-1 accuracy " in text


def test_cells_share_network_images_and_evaluation_whatever_the_preset_says(finished):
    folder = only_folder(finished)
    settings = [config.from_yaml((run / "config.yaml").read_text()) for run in (folder / "cells").iterdir()]
    for key in ("model", "evaluation_data", "evaluation", "target", "runtime"):
        assert all(own[key] == settings[0][key] for own in settings), key
    assert {own["data"]["num_samples"] for own in settings} == {32}  # preset=paper asks for 2,000
    drawn = {}
    for run in (folder / "cells").iterdir():
        seed = config.from_yaml((run / "config.yaml").read_text())["data"]["seed"]
        drawn.setdefault(seed, set()).add(json.loads((run / "calibration.json").read_text())["sha256"])
    assert all(len(hashes) == 1 for hashes in drawn.values())
    assert drawn[0] != drawn[1]


def test_a_cell_is_the_run_that_prune_makes(finished, here):
    folder = only_folder(finished)
    (cell,) = (folder / "cells").glob("paper_flops-0.4_seed-1_*")
    assert main(["prune", *SMALL, "target=flops", "preset=paper", "sparsity=0.4", "data.seed=1"]) == 0
    (alone,) = (here / "outputs" / "prune" / "embedded").iterdir()
    theirs, ours = artifacts.read_results(alone), artifacts.read_results(cell)

    def values(results):
        return {(m["model"], m["name"]): m["value"] for m in results["measurements"]}

    assert values(ours) == values(theirs)
    assert ours["achieved"] == theirs["achieved"]


def test_finished_cells_are_kept_and_new_ones_are_added(here, monkeypatch, capsys):
    runs = Runs(monkeypatch)
    assert compare("methods=[magnitude]", "budgets=[0.2]", "seeds=[0]") == 0
    assert len(runs.made) == 1
    assert compare("methods=[magnitude]", "budgets=[0.2]", "seeds=[0]") == 0
    assert len(runs.made) == 1
    assert compare("methods=[magnitude]", "budgets=[0.2,0.4]", "seeds=[0]") == 0
    assert len(runs.made) == 2
    rows = read_csv(only_folder(here) / "comparison.csv")
    assert [row["budget"] for row in rows] == ["0.0", "0.2", "0.4"]
    assert "mean ± standard deviation over seeds" in capsys.readouterr().out


def test_a_failed_cell_is_recorded_and_the_rest_goes_on(here, monkeypatch, capsys):
    runs = Runs(monkeypatch)
    runs.ends["magnitude_flops-0.2"] = NumericsError("conv1: made to fail.")
    runs.ends["magnitude_flops-0.4"] = ZeroDivisionError()
    words = ["methods=[magnitude,paper]", "budgets=[0.2,0.4]", "seeds=[0]"]
    assert compare(*words) == 2
    said = capsys.readouterr()
    assert "2 of 4 cells failed, the first (magnitude, 0.2 of flops, seed 0) with: conv1: made to fail." in said.err
    folder = only_folder(here)
    by_method = {(row["method"], row["budget"]): row for row in read_csv(folder / "cells.csv")}
    assert by_method["magnitude", "0.2"]["message"] == "conv1: made to fail."
    assert "ZeroDivisionError" in by_method["magnitude", "0.4"]["message"]
    assert by_method["paper", "0.4"]["status"] == "finished"
    assert "made to fail" in (folder / "comparison.md").read_text()
    assert "Traceback" in next((folder / "records").glob("*.txt")).read_text()
    runs.ends, runs.made = {}, []
    assert compare(*words) == 0
    assert len(runs.made) == 2 and all(name.startswith("magnitude") for name in runs.made)


def test_an_interrupted_comparison_goes_on_in_the_middle_of_a_cell(finished, here, monkeypatch, capsys):
    save = artifacts.RunDirectory.save_edit
    saved: list[str] = []

    def save_or_stop(run, edit, dense_hash):
        if run.final.name.startswith("paper_flops-0.4") and len(saved) == 3:
            raise KeyboardInterrupt
        saved.extend([edit.name] if run.final.name.startswith("paper_flops-0.4") else [])
        save(run, edit, dense_hash)

    words = ["methods=[magnitude,paper]", "budgets=[0.4]", "seeds=[0]"]
    with monkeypatch.context() as patched:
        patched.setattr(artifacts.RunDirectory, "save_edit", save_or_stop)
        assert compare(*words) == 130
    assert "Type the same command again: finished cells are kept" in capsys.readouterr().err
    folder = only_folder(here)
    (left,) = (folder / "cells").glob("*.incomplete")
    assert len(list((left / "edits").iterdir())) == 3
    runs = Runs(monkeypatch)
    assert compare(*words) == 0
    assert len(runs.made) == 1
    (cell,) = (folder / "cells").glob("paper_flops-0.4_seed-0_*")
    (undisturbed,) = (only_folder(finished) / "cells").glob("paper_flops-0.4_seed-0_*")
    assert (cell / "model" / "weights.safetensors").read_bytes() == (
        undisturbed / "model" / "weights.safetensors"
    ).read_bytes()


def test_an_outside_method_is_a_cell_like_any_other(here):
    assert compare("methods=[torch_pruning_magnitude]", "budgets=[0.3]", "seeds=[0]") == 0
    (row,) = read_csv(only_folder(here) / "cells.csv")
    assert abs(float(row["removed_flops"]) - 30) < 1
    (cell,) = (only_folder(here) / "cells").iterdir()
    assert "torch_pruning_ (importance magnitude" in (cell / "report.md").read_text()
    assert main(["replay", f"run={cell}", "console=plain"]) == 0


def test_latency_gives_a_second_frontier_and_no_labels_give_agreement(here):
    words = ["evaluation=[agreement,latency]", "evaluation.latency.max_seconds=0.2", "evaluation.latency.warmup=1"]
    assert compare(*words, "methods=[magnitude]", "budgets=[0.4]", "seeds=[0]") == 0
    folder = only_folder(here)
    assert (folder / "frontier_latency.svg").is_file()
    assert "agreement with dense, % of images" in (folder / "frontier_latency.svg").read_text()
    assert "time of a forward pass saved" in (folder / "frontier_latency.svg").read_text()


SOURCES = "sources=[{name: digits, num_samples: 32, title: their own}, {name: procedural, num_samples: 24}]"
OF_SOURCES = [
    "evaluation=[top1]", "evaluation_data.num_samples=60", "console=plain", "methods=[magnitude]", "seeds=[0]",
]  # fmt: skip


def test_sources_of_calibration_data_are_rows_of_one_protocol(here, monkeypatch):
    runs = Runs(monkeypatch)
    assert main(["compare", *OF_SOURCES, "budgets=[0.4]", SOURCES]) == 0
    folder = only_folder(here)
    rows = read_csv(folder / "comparison.csv")
    assert [row["method"] for row in rows] == ["dense", "their own", "procedural 24"]
    assert [row["calibration_images"] for row in rows[1:]] == ["32.0", "24.0"]
    assert float(rows[1]["batchnorm_distance"]) < float(rows[2]["batchnorm_distance"])
    page = (folder / "comparison.md").read_text()
    assert "2 sources compared" in page and "| source |" in page
    assert "their own: data=digits data.num_samples=32; procedural 24: data=procedural data.num_samples=24" in page
    (made,) = (folder / "cells").glob("magnitude_procedural-24_*")
    words = json.loads((made / "environment.json").read_text())["command"]
    assert "data=procedural data.num_samples=24" in words
    assert main(["prune", *OF_SOURCES[:3], "preset=magnitude", "target=flops", "sparsity=0.4", "data=procedural",
                 "data.num_samples=24"]) == 0  # fmt: skip
    (alone,) = (here / "outputs" / "prune" / "embedded").iterdir()
    assert artifacts.read_results(alone)["calibration"] == artifacts.read_results(made)["calibration"]
    assert main(["compare", *OF_SOURCES, "budgets=[0.2,0.4]", SOURCES]) == 0
    assert len(runs.made) == 5, "finished cells of sources are found again"


def test_several_methods_on_several_sources_say_both(here):
    words = [word for word in OF_SOURCES if not word.startswith("methods")]
    assert main(["compare", *words, "methods=[magnitude,paper]", "budgets=[0.4]", SOURCES]) == 0
    methods = [row["method"] for row in read_csv(only_folder(here) / "comparison.csv")]
    assert methods[1:3] == ["their own, magnitude", "their own, paper"] and len(methods) == 5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sources=[]"], r"sources must be a list such as \[{name: folder, path: IMAGES}\]; got \[\]"),
        (["sources=[{name: digts}]"], r"sources\[0\].name: there is no such choice; did you mean 'digits'"),
        (["sources=[{name: folder}]"], r"sources\[0\].path must be given: folder needs it"),
        (["sources=[{name: digits, nm: 3}]"], r"sources\[0\].source has no key 'nm'"),
        (["sources=[{name: digits}, {name: digits, split: test}]"], "two sources are called 'digits'; give one of them"),
        (["sources=[{name: digits, seed: 1}]"], r"sources\[0\].seed: a comparison draws every source with seeds="),
        (["data=digits", SOURCES], r"sources=\[…\] says what every row is calibrated on; leave data out"),
        (["data.num_samples=9", SOURCES], "leave data.num_samples out, or give it there"),
    ],
)
def test_a_mistake_among_sources_is_one_sentence_before_any_work(words, sentence, capsys):
    assert main(["compare", "console=plain", *words]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert len(said.strip().splitlines()) == 1


def test_a_setting_is_spelled_as_hydra_reads_it():
    parts = [{"name": "folder", "path": "my images/a, b", "weight": 0.5}, {"name": "procedural", "labels": None}]
    word = config.spell("data.sources", parts)
    assert word.startswith('data.sources=[{name: folder, path: "my images/a, b", weight: 0.5}')
    read = config.compose("prune", ["data=mixed", word])["data"]["sources"]
    assert [one["source"].get("path") for one in read] == ["my images/a, b", None] and read[0]["weight"] == 0.5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["methods=[papr]"], "methods: there is no preset 'papr'; did you mean 'paper'"),
        (["methods=[]"], "methods must be a list of presets"),
        (["budgets=[1.0]"], "budgets must be a list of shares with 0 <= budget < 1"),
        (["budgets=[]"], "budgets must be a list of shares"),
        (["budgets=0.4"], "budgets must be a list of shares"),
        (["seeds=[-1]"], "seeds must be a list of whole numbers from 0"),
        (["sparsity=0.4"], r"compare sets sparsity itself for every cell; give budgets=\[…\] instead"),
        (["preset=paper"], r"compare sets preset itself for every cell; give methods=\[…\] instead"),
        (["resume=x"], "compare sets resume itself for every cell; leave it out"),
        (["dry_run=true"], "compare sets dry_run itself for every cell; leave it out"),
        (["method=[paper]"], "modhifi compare has no key 'method', which is for modhifi unlearn: did you mean 'methods'"),
        (["-m"], "-m is for prune, unlearn and evaluate"),
    ],
)
def test_a_mistake_is_one_sentence_before_any_work(words, sentence, capsys):
    assert compare(*words) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert len(said.strip().splitlines()) == 1


def test_help_names_the_grid(capsys):
    assert main(["compare", "--help"]) == 0
    said = capsys.readouterr().out
    for key in ("methods=", "budgets=", "seeds=", "target=auto", "model=embedded", "batchnorm="):
        assert key in said


def test_remembered_logits_run_the_network_once_per_batch(tiny_convnet):
    calls = []
    tiny_convnet.register_forward_hook(lambda *_: calls.append(1))
    remembered = RememberedLogits(tiny_convnet)
    images = torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        first, again, other = remembered(images), remembered(images.clone()), remembered(images + 1)
    assert len(calls) == 2
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_only_methods_that_look_at_classes_are_handed_labels(here, monkeypatch):
    opened = []
    load = config.build({"_target_": "modhifi_cli.data.digits.load", "_partial_": True}).func

    @functools.wraps(load)  # what settings may name is known by the module it says it is of
    def watched(**settings):
        if settings.get("labels"):  # of calibration images
            opened.append(settings["labelled"])
        return load(**settings)

    monkeypatch.setattr("modhifi_cli.data.digits.load", watched)
    words = ["methods=[magnitude,discedit_sp,tvsprune]", "budgets=[0.3]", "seeds=[0]", "data.num_samples=128"]
    assert compare(*words, "evaluation=[top1]") == 0
    assert opened == [False, True], "one set without labels and one with, which two methods share"
    told = {}
    for cell in (only_folder(here) / "cells").iterdir():
        told[cell.name.split("_0.3")[0]] = artifacts.read_results(cell)["calibration"].get("labels")
    whose = {name: labels and labels.rpartition(", ")[2] for name, labels in told.items()}
    assert sorted(whose.values(), key=str) == [None, "labels of the source", "labels of the source"], told
