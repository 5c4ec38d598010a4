"""`modhifi unlearn` end to end on the embedded network: the run's folder, verify, replay, evaluate, resume, sweeps."""

import csv
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch

from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.data import digits
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.files import artifacts
from modhifi_cli.graph.surgery import weights_hash

SAMPLES = ["data.num_samples=200", "evaluation_data.num_samples=150", "console=plain"]
SMALL = [*SAMPLES, "audit=none"]
AUDITED = [*SAMPLES, "audit.relearn.steps=1", "audit.relearn.held_out=20"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def unlearn(*words: str) -> int:
    return main(["unlearn", *SMALL, *words])


def only_run(folder, pattern="unlearn/embedded/*"):
    (found,) = (folder / "outputs").glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that tests may read but not change."""
    folder = tmp_path_factory.mktemp("finished")
    assert unlearn(f"output_dir={folder / 'outputs'}", "forget_class=3") == 0
    return only_run(folder)


def test_a_run_forgets_keeps_and_tells(finished):
    results = artifacts.read_results(finished)
    assert results["verb"] == "unlearn" and results["forget"] == [3]
    assert results["classes"] == [str(digit) for digit in range(10)]
    found = {(m["model"], m["name"]): m["value"] for m in results["measurements"]}
    assert found["edited", "forget_accuracy"] <= 5
    assert found["edited", "retain_accuracy"] >= found["dense", "retain_accuracy"] - 2
    report = (finished / "report.md").read_text()
    assert "Accuracy of every class" in report and "fine-tuning | none" in report
    assert json.loads((finished / "calibration.json").read_text())["sha256"]


def test_a_run_brings_its_audit_and_says_what_it_did_not_reach(here, capsys):
    assert main(["unlearn", *AUDITED, "forget_class=3", "method.beta=0.3"]) == 0
    folder = only_run(here)
    assert {"audit.json", "audit.md", "audit.png", "audit.svg"} <= {path.name for path in folder.iterdir()}
    found = json.loads((folder / "audit.json").read_text())
    results = artifacts.read_results(folder)
    assert results["audit"]["verdict"] == found["verdict"]["level"]
    assert {"audit_FA", "audit_probe_penultimate"} <= {one["name"] for one in results["audit"]["measurements"]}
    report, told = (folder / "report.md").read_text(), capsys.readouterr().out
    assert f"## Audit: {found['verdict']['level']}" in report and f"verdict: {found['verdict']['level']}" in told
    for sentence in found["verdict"]["sentences"]:
        assert sentence in report
    assert "unlearned" not in report and "unlearned" not in told
    again = (folder / "audit.md").read_text().rsplit("modhifi audit run=")[1].splitlines()[0]
    assert again == f"outputs/unlearn/embedded/{folder.name}"


def test_what_the_audit_has_heard_is_not_computed_again_for_the_measurement(here, monkeypatch):
    asked = []

    def known(memory, key, images):
        asked.append(key in memory._logits)
        return answer(memory, key, images)

    answer = RememberedLogits.known
    monkeypatch.setattr(RememberedLogits, "known", known)
    assert main(["unlearn", *AUDITED, "forget_class=3", "method.beta=0.3"]) == 0
    assert asked and all(asked)
    results = artifacts.read_results(only_run(here))
    measured = {(one["model"], one["name"]): one["value"] for one in results["measurements"]}
    for one in results["audit"]["measurements"]:
        if one["name"] == "audit_FA" and one["model"] != "head_only":
            assert one["value"] == pytest.approx(measured[one["model"], "forget_accuracy"])


def test_a_run_without_an_audit_says_that_nothing_is_known_of_the_inside(finished):
    assert artifacts.read_results(finished)["audit"] is None
    report = (finished / "report.md").read_text()
    assert "## Audit: left out" in report and "not what the features still hold" in report


def test_too_few_images_for_the_audit_are_told_before_anything_is_edited(here, capsys):
    words = ["data.num_samples=80", "evaluation_data.num_samples=150", "console=plain", "forget_class=4"]
    assert main(["unlearn", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "a probe needs at least 10" in line and line.endswith("Or leave the audit out: audit=none.")
    assert "evaluation=[forgotten_rank] tells what one image of a class can tell" in line
    assert not list((here / "outputs").glob("unlearn/*/*"))


def test_test_images_without_the_class_are_refused_before_anything_is_edited_and_ranks_do_without(here, capsys):
    images, labels = digits.read("test")
    np.savez(here / "others.npz", images=images[labels != 3], labels=labels[labels != 3])
    words = ["evaluation_data=arrays", "evaluation_data.path=others.npz", "forget_class=3"]
    assert unlearn(*words) == 2
    assert "forget_retain needs images of forget classes" in capsys.readouterr().err
    assert not list((here / "outputs").glob("unlearn/*/*"))
    assert unlearn(*words, "evaluation=[forgotten_rank]") == 0
    found = {(one["model"], one["name"]): one["value"] for one in artifacts.read_results(only_run(here))["measurements"]}
    assert found["edited", "others_agreement"] > 90 and ("edited", "forgotten_rank") not in found


def test_edits_outlive_an_audit_without_enough_test_images(finished, here, capsys):
    words = ["data.num_samples=200", "evaluation_data.num_samples=100", "console=plain", "forget_class=3"]
    assert main(["unlearn", *words]) == 2
    assert "evaluation images, a probe needs at least 10 held-out ones" in capsys.readouterr().err
    assert main(["unlearn", *words, "audit=none", f"resume={only_run(here)}"]) == 0
    assert weights_hash(load_model(only_run(here))) == weights_hash(load_model(finished))


def test_verify_and_replay_take_the_run(finished, here, capsys):
    assert main(["verify", f"run={finished}"]) == 0
    assert main(["replay", f"run={finished}", "console=json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["equals_saved_model"] is True


def test_evaluate_names_the_network_and_knows_its_class(finished, here, capsys):
    assert main(["evaluate", f"run={finished}", "evaluation=[forget_retain]", "console=json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    before = artifacts.read_results(finished)["measurements"]
    assert [(m["model"], m["name"], m["value"]) for m in last["measurements"]] == [
        (m["model"], m["name"], m["value"]) for m in before
    ]


def test_evaluate_looks_for_the_forgotten_class_of_a_run(finished, here, capsys):
    assert main(["evaluate", f"run={finished}", "evaluation=[forgotten_rank]", "console=json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["measurements"]
    edited = {one["name"]: one["value"] for one in found if one["model"] == "edited"}
    assert edited["forgotten_rank"] > 1 and edited["forgotten_gap"] < 0 and edited["others_agreement"] > 90


def test_an_interrupted_run_goes_on_to_the_same_weights(finished, here, monkeypatch, capsys):
    save, left = artifacts.RunDirectory.save_edit, [2]

    def save_or_stop(run, edit, dense_hash):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(run, edit, dense_hash)

    with monkeypatch.context() as patched:
        patched.setattr(artifacts.RunDirectory, "save_edit", save_or_stop)
        assert unlearn("forget_class=3") == 130
    folder = only_run(here)
    again = f"modhifi unlearn {' '.join(SMALL)} forget_class=3 resume={folder.relative_to(here)}"
    assert again in capsys.readouterr().err
    assert unlearn("forget_class=3", f"resume={folder}") == 0
    assert weights_hash(load_model(only_run(here))) == weights_hash(load_model(finished))


def test_a_run_without_labels_takes_the_networks_own_predictions_and_says_so(here):
    assert unlearn("forget_class=3", "data.labels=model") == 0
    assert "the dense network's own predictions" in (only_run(here) / "report.md").read_text()
    assert artifacts.read_results(only_run(here))["labels"] == "model"


def test_finetuning_is_marked_wherever_the_result_is_shown(here, capsys):
    assert unlearn("forget_class=3", "finetune.epochs=1", "method.beta=0.3") == 0
    marked = "fine-tuned for 1 epochs on retain samples"
    assert marked in capsys.readouterr().out
    assert marked in (only_run(here) / "report.md").read_text()
    results = artifacts.read_results(only_run(here))
    assert results["finetuned_epochs"] == 1 and any(marked in text for text in results["warnings"])


def test_a_sweep_over_classes_ends_with_their_mean(here, capsys):
    words = ["-m", "forget_class=range(0,3)", "method.beta=0.3"]
    assert main(["unlearn", *AUDITED, *words]) == 0
    (path,) = (here / "outputs" / "sweeps").glob("*/summary.csv")
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and lines[-1].startswith("mean")
    rows = list(csv.DictReader(lines))
    for key in ("edited_forget_accuracy", "edited_audit_probe_penultimate", "head_only_audit_probe_penultimate"):
        assert float(rows[-1][key]) == pytest.approx(sum(float(row[key]) for row in rows[:3]) / 3)
    assert rows[-1]["verdict"].startswith(("1 × ", "2 × ", "3 × ")) and "mean" in capsys.readouterr().out


def test_exports_of_a_network_that_forgot_are_checked(here):
    assert unlearn("forget_class=[3,5]", "method.beta=0.3", "export=[torch_export]") == 0
    (export,) = artifacts.read_results(only_run(here))["exports"]
    assert export["max_difference"] <= 1e-4 * export["max_logit"]


def test_float64_runs_and_reloads(here):
    assert unlearn("forget_class=3", "method=modhifi_u", "method.fraction=0.1", "runtime.dtype=float64") == 0
    assert next(load_model(only_run(here)).parameters()).dtype == torch.float64


WRONG = {
    "no class": ([], "forget_class must be given, e.g. forget_class=3"),
    "a class that is not there": (["forget_class=12"], "there is no class 12; the classes are 0 to 9"),
    "too few samples": (["forget_class=3", "data.num_samples=20"], "forget samples, got"),
    "all classes": (["forget_class=[0,1,2,3,4,5,6,7,8,9]"], "none is left to keep"),
    "labels of another head": (
        ["forget_class=1", "model.num_classes=3", "model.weights=random"],
        "data: expected labels 0 to 2 for the 3 logits of 'embedded', got 9; use data labelled for this network",
    ),
    "a wrong share": (["forget_class=3", "forget_target=2"], "forget_target must be a share from 0 to 1; got 2"),
    "no data": (["forget_class=3", "~data"], "~data: modhifi unlearn needs data and cannot do without; leave it as it is"),
}  # fmt: skip


@pytest.mark.parametrize("words, expected", WRONG.values(), ids=WRONG.keys())
def test_what_a_user_can_mend_is_one_sentence_and_leaves_nothing(here, capsys, words, expected):
    samples = [word for word in SMALL if not any(word.split("=")[0] == given.split("=")[0] for given in words)]
    if "~data" in words:
        samples = ["console=plain", "audit=none"]
    assert main(["unlearn", *samples, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]
    assert not list((here / "outputs").glob("unlearn/*/*"))


def test_class_names_and_logits_must_agree(capsys, monkeypatch):
    from modhifi_cli.models import embedded

    load = embedded.load

    @functools.wraps(load)  # settings may only name what its module defines
    def misnamed(**given):
        return dataclasses.replace(load(**given), classes=("a", "b"))

    monkeypatch.setattr(embedded, "load", misnamed)
    assert main(["unlearn", "forget_class=1", "console=plain"]) == 2
    assert "names 2 classes but has 10 logits; use weights and model.num_classes" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["forget_retain", "forgotten_rank"])
def test_classes_that_a_measurement_cannot_be_asked_about_are_refused_before_the_work(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["unlearn", "forget_class=3", "audit=none", f"evaluation=[{name}]", "console=plain"]
    for odd in ("abc", "true", "1.5", "[1.5]"):
        assert main([*words, f"evaluation.{name}.forget_class={odd}"]) == 2
        assert f"evaluation.{name}.forget_class: expected a class by its number" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.incomplete"))
