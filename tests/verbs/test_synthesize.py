"""`modhifi synthesize` and the runs that make their calibration data themselves, from the command line down."""

import json

import numpy as np
import pytest
from PIL import Image

from modhifi_cli.cli import main
from modhifi_cli.data import digits
from modhifi_cli.data.making import made_ahead, made_up
from modhifi_cli.models import embedded
from modhifi_cli.verbs.quality import as_pixels

QUICK = ["data.num_samples=8", "data.together=8", "data.steps=2", "data.class_weight=0", "console=plain"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def only_run(here, verb="synthesize"):
    (folder,) = (here / "outputs" / verb).glob("*/*")
    return folder


def test_a_set_is_written_with_manifest_and_sheet_and_calibrates_a_run(here, capsys):
    assert main(["synthesize", *QUICK]) == 0
    folder = only_run(here)
    manifest = json.loads((folder / "manifest.json").read_text())
    images = np.load(folder / "images.npz")["images"]
    assert images.shape == (8, 8, 8, 1) and images.dtype == np.uint8
    assert manifest["settings"]["steps"] == 2 and len(manifest["weights_sha256"]) == 64
    assert manifest["quality"]["samples"] == 8 and manifest["images"]["source"] == "inversion"
    assert Image.open(folder / "calibration.png").size == (10 * 8 + 9 * 2, 8)
    said = capsys.readouterr().out
    path = f"data.path={folder.relative_to(here)}/images.npz"
    assert f"use them with data=arrays {path}" in said
    words = ["data=arrays", path, "evaluation=[]", "preset=fast", "sparsity=0.1", "console=plain"]
    assert main(["prune", *words]) == 0
    again = json.loads((only_run(here, "prune") / "calibration.json").read_text())
    assert again["sha256"] == manifest["images"]["sha256"], "the very same images"
    assert again["made_by"] == "inversion" and made_up(again)


def test_a_folder_of_pictures_holds_the_same_images(here):
    assert main(["synthesize", *QUICK, "form=folder"]) == 0
    folder = only_run(here)
    files = sorted((folder / "images").iterdir())
    assert [file.name for file in files][:2] == ["000000.png", "000001.png"] and len(files) == 8
    assert np.array(Image.open(files[0])).shape == (8, 8)
    for path in (folder, folder / "images"):
        assert made_ahead(path) == {"made_by": "inversion"}
    assert made_ahead(folder / "images" / "000000.png") == {}


@pytest.mark.parametrize(
    "text", ["", "[]", '"x"', "{", '{"images": 3}', '{"images": {"source": "arrays"}}', '{"images": {"source": ["a"]}}']
)
def test_somebody_elses_manifest_says_nothing(text, here):
    (here / "manifest.json").write_text(text)
    assert made_ahead(here) == {} and not made_up({"source": "arrays"})


def test_the_second_run_takes_its_images_from_the_cache_which_can_be_shown_and_emptied(here, capsys):
    assert main(["synthesize", *QUICK]) == 0
    assert "made and kept in" in capsys.readouterr().out
    assert main(["synthesize", *QUICK]) == 0
    assert "taken from" in capsys.readouterr().out
    assert main(["synthesize", "cache=show", "console=plain"]) == 0
    said = capsys.readouterr().out
    assert "1 sets, 0.0 MB in" in said and "embedded" in said
    assert main(["synthesize", "cache=clean", "console=plain"]) == 0
    assert "1 sets, 0.0 MB, removed from" in capsys.readouterr().out
    assert main(["synthesize", "cache=show", "console=json"]) == 0
    assert '"sets": []' in capsys.readouterr().out


def test_a_network_without_data_is_calibrated_on_images_of_its_own(here, capsys):
    words = ["model=timm", "model.name=resnet10t", "model.weights=random", "model.num_classes=4"]
    words += [
        "model.preprocess={size: 32, resize: null}",
        "data.num_samples=6",
        "evaluation=[]",
        "preset=fast",
        "sparsity=0.1",
    ]
    assert main(["prune", *words, "console=plain"]) == 0
    assert "no data= was given, so resnet10t is calibrated on procedural images" in capsys.readouterr().out
    told = json.loads((only_run(here, "prune") / "calibration.json").read_text())
    assert told["source"] == "procedural" and told["num_samples"] == 6 and "chosen" in told


WRONG = {
    "a form that is not": (["form=list"], "form must be array or folder; got 'list'."),
    "a cache that is not": (["cache=wipe"], "cache must be use, show or clean; got 'wipe'."),
    "classes that are not": (
        ["data.classes=[10]"],
        "data.classes: the network has 10 logits, so classes are 0 to 9; got 10.",
    ),
    "a cache in the way": (
        ["data.cache=file", *QUICK[:-1]],
        "cannot be written (Not a directory); give another cache with",
    ),
    "no statistics": (["model.weights=random"], "those of this network say nothing"),
}


@pytest.mark.parametrize("words, expected", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(here, capsys, words, expected):
    (here / "file").write_text("in the way")
    assert main(["synthesize", *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0], lines
    assert [path.name for path in here.iterdir()] == ["file"], "nothing half-written is left"


def test_unlearning_works_on_images_inverted_from_the_network(here, capsys):
    words = ["data=inversion", "data.num_samples=40", "data.together=40", "data.steps=12", "data.class_weight=1", "data.lr=0.05"]
    words += ["data.confidence=0.3", "forget_class=3", "evaluation=[]", "console=plain", "audit=none"]
    assert main(["unlearn", *words]) == 0
    results = json.loads((only_run(here, "unlearn") / "results.json").read_text())
    assert results["labels"] == "model" and results["calibration"]["source"] == "inversion"
    quality = json.loads((only_run(here, "unlearn") / "quality.json").read_text())
    assert quality["classes_seen"] >= 5


@pytest.mark.parametrize("checked", [True, False])
def test_statistics_that_poor_images_would_ruin_are_kept(here, capsys, checked):
    from modhifi_cli.files.artifacts import load_model

    np.save("noise.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8))
    words = ["data=arrays", "data.path=noise.npy", "preset=fast", "sparsity=0.1", "evaluation=[]", "console=plain"]
    assert main(["prune", *words, f"check_data={str(checked).lower()}"]) == 0
    said, run = capsys.readouterr().out, only_run(here, "prune")
    dense, pruned = embedded.load(name="embedded").model.state_dict(), load_model(run).state_dict()
    variances = [name for name in pruned if name.endswith("running_var")]
    # What is kept of a layer's statistics is a slice of the dense ones.
    kept = all(set(pruned[name].tolist()) <= set(dense[name].tolist()) for name in variances)
    assert kept == checked
    assert ("the stored BatchNorm statistics are kept" in said) == checked
    assert (run / "quality.json").is_file() == checked
    if checked:
        page = (run / "report.md").read_text()
        assert "effective rank percent of channels" in page and "the stored BatchNorm statistics are kept" in page


TASKS = {
    "prune": ["preset=fast", "sparsity=0.1"],
    "unlearn": ["data.labels=model", "forget_class=3", "method.beta=0.3", "finetune.epochs=1", "audit=none"],
}


@pytest.mark.parametrize("verb", TASKS)
def test_warnings_on_the_calibration_set_are_counted_and_told_as_all_others(here, capsys, verb):
    if verb == "prune":
        images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1)).astype(np.uint8)
    else:  # what a classifier tells apart, darkened
        preprocess = embedded.load().preprocess
        source = digits.load(preprocess=preprocess, labelled=False, num_samples=120)
        images = as_pixels(next(source.batches(120))[0], preprocess) // 2
    np.save("poor.npy", images)
    words = ["data=arrays", "data.path=poor.npy", "evaluation=[]", "console=json", *TASKS[verb]]
    assert main([verb, *words]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [event["text"] for event in events if event["event"] == "warning"]
    found = json.loads((only_run(here, verb) / "results.json").read_text())["warnings"]
    assert len(found) > 1 and set(found) == set(told) and events[-1]["warnings"] == found
    assert any(event.get("text", "").startswith(f"{len(found)} warnings were raised") for event in events)


def test_check_data_is_yes_or_no(here, capsys):
    assert main(["prune", "check_data=maybe"]) == 2
    assert "check_data must be true or false; got 'maybe'." in capsys.readouterr().err
