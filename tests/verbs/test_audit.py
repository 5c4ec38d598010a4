"""`modhifi audit` on the embedded network: what it writes, and what it says to folders it cannot audit."""

import json
import shutil

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.files import artifacts, manifest
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.records import Edit, ModuleEdit
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces

QUICK = [
    "data.num_samples=200", "evaluation_data.num_samples=150", "audit.relearn.steps=1", "audit.relearn.held_out=20",
    "console=plain", "data=digits", "evaluation_data=digits",
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An unlearning run whose edit only pushes one row of the classifier down."""
    settings = config.compose("prune", [])
    loaded = config.build(settings["model"])
    dense_hash = weights_hash(loaded.model)
    place = artifacts.RunDirectory.create(tmp_path_factory.mktemp("made") / "run")
    artifacts.write_text(place.path / "config.yaml", config.to_yaml(settings))
    with torch.no_grad():
        loaded.model.linear.bias[3] = -50
    tensors = {"weight": loaded.model.linear.weight.detach(), "bias": loaded.model.linear.bias.detach()}
    empty = torch.arange(0)
    place.save_edit(Edit("linear", 0, (ModuleEdit("linear", tensors=tensors),), empty, empty), dense_hash)
    pieces.save_network(place, loaded, loaded.model)
    results = {"format_version": 1, "verb": "unlearn", "model": loaded.name, "forget": [3], "measurements": []}
    artifacts.write_json(place.path / "results.json", results)
    return place.finish()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(made, here):
    return shutil.copytree(made, here / "copied")


def refused(capsys, *words: str) -> str:
    assert main(["audit", *QUICK, *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert len(told.strip().splitlines()) == 1
    return told


def change(path, **facts) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | facts))
    manifest.write(path.parent)


def test_an_audit_writes_figures_a_page_and_a_verdict(made, here, capsys):
    assert main(["audit", f"run={made}", f"audit.reference={made}", *QUICK]) == 0
    (folder,) = (here / "outputs" / "audit" / "embedded").iterdir()
    written = {"audit.json", "audit.md", "audit.html", "audit.png", "audit.svg"}
    written |= {"checksums.json", "config.yaml", "environment.json", "results.json"}
    assert written == {path.name for path in folder.iterdir()}
    content = json.loads((folder / "audit.json").read_text())
    assert content["figures"]["edited"]["FA"] == 0
    assert content["gaps"]["edited"]["FA"] == 0  # the reference is the run itself
    assert content["verdict"]["level"].startswith("forgotten at the output")
    page = (folder / "audit.md").read_text()
    for name, meaning in content["definitions"].items():
        assert f"{name}" in page and f": {meaning}." in page
    for sentence in content["verdict"]["sentences"]:
        assert sentence in page
    assert "| edited − reference |" in page and "forget accuracy (FA), %" in page
    html = (folder / "audit.html").read_text()
    assert '<p class="banner' in html and "<svg" in html
    assert "unlearned" not in page.lower()
    assert (folder / "audit.png").read_bytes()[:4] == b"\x89PNG"
    results = artifacts.read_results(folder)
    assert {"audit_UA", "audit_MIA", "audit_probe_penultimate"} <= {one["name"] for one in results["measurements"]}
    told = capsys.readouterr().out
    assert f"verdict: {content['verdict']['level']}" in told
    assert "head-only" in told


def test_an_audit_takes_the_images_of_the_run(made, here):
    assert main(["audit", f"run={made}", "audit.relearn.steps=1", "audit.relearn.held_out=10", "console=plain"]) == 0
    (folder,) = (here / "outputs" / "audit" / "embedded").iterdir()
    protocol = json.loads((folder / "audit.json").read_text())["protocol"]
    assert (protocol["calibration"]["num_samples"], protocol["evaluation"]["num_samples"]) == (1347, 450)
    assert protocol["calibration labels"] == "1,347 images of 10 of 10 classes, labels of the source"


def test_a_run_that_is_no_unlearning_run_is_refused(copied, capsys):
    change(copied / "results.json", verb="prune")
    assert "an audit needs an unlearning run, this folder is of modhifi prune" in refused(capsys, f"run={copied}")


def test_a_run_that_does_not_say_what_it_forgot_is_damaged(copied, capsys):
    change(copied / "results.json", forget=None)
    assert "damaged, it does not say what was forgotten" in refused(capsys, f"run={copied}")


def test_a_class_that_does_not_exist_is_refused(copied, capsys):
    change(copied / "results.json", forget=[12])
    assert "there is no class 12; the classes are 0 0, 1 1" in refused(capsys, f"run={copied}")


def test_dense_weights_that_have_changed_are_refused(copied, capsys):
    edits = json.loads((copied / "edits.json").read_text())
    (copied / "edits.json").write_text(json.dumps(edits | {"dense_sha256": "0" * 64}))
    manifest.write(copied)
    assert "the dense weights have changed since" in refused(capsys, f"run={copied}")


def test_a_missing_folder_and_an_interrupted_run_are_refused(made, here, capsys):
    assert "no such folder" in refused(capsys, "run=nowhere")
    shutil.copytree(made, here / "half.incomplete")
    assert "this run was interrupted" in refused(capsys, "run=half.incomplete")


def test_a_missing_reference_is_refused(made, here, capsys):
    told = refused(capsys, f"run={made}", "audit.reference=nowhere.safetensors")
    assert "audit.reference: nothing at nowhere.safetensors; give a weights file for embedded, or the folder" in told
    assert not list(here.glob("outputs/audit/*/*"))


def test_a_reference_with_other_classes_is_refused(made, here, capsys):
    import safetensors.torch

    from modhifi_cli.models import embedded

    safetensors.torch.save_file(embedded.build(num_classes=9).state_dict(), here / "nine.safetensors")
    told = refused(capsys, f"run={made}", "audit.reference=nine.safetensors")
    assert "audit.reference: model.weights: nine.safetensors does not fit CifarResNet" in told
    assert "linear.weight is 9×64 instead of 10×64" in told


def test_too_few_samples_are_refused_and_nothing_is_left_behind(made, here, capsys):
    told = refused(capsys, f"run={made}", "data.num_samples=30")
    assert "a probe needs at least 10; give more labelled images of it" in told
    assert not list(here.glob("outputs/audit/*/*"))


def test_an_audit_of_nothing_is_refused(made, capsys):
    assert main(["audit", f"run={made}", "audit=none", "console=plain"]) == 2
    assert "audit=none leaves nothing to do; give audit=standard" in capsys.readouterr().err


def test_a_misspelt_key_is_explained(made, capsys):
    assert "did you mean" in refused(capsys, f"run={made}", "audit.relearn.step=3")
    assert "audit.relearn.steps must be a whole number from 1; got 0" in refused(
        capsys, f"run={made}", "audit.relearn.steps=0"
    )
