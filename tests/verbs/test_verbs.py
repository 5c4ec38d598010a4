"""The verbs end to end on the embedded network: prune, resume, replay, verify, evaluate, info, sweeps."""

import csv
import json
import re
import shutil

import pytest
import torch

from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts, manifest
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces

SMALL = ["data.num_samples=64", "evaluation=[top1]", "evaluation_data.num_samples=100", "console=plain"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prune(*words: str) -> int:
    return main(["prune", *SMALL, *words])


def only_run(folder, pattern="prune/embedded/*"):
    (found,) = (folder / "outputs").glob(pattern)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run that tests may read but not change."""
    folder = tmp_path_factory.mktemp("finished")
    assert prune(f"output_dir={folder / 'outputs'}", "sparsity=0.4") == 0
    return only_run(folder)


@pytest.fixture
def copied(finished, here):
    """The finished run, to be damaged."""
    return shutil.copytree(finished, here / "copied")


def test_a_finished_run_holds_what_the_design_lists(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "config.yaml", "environment.json", "run.log", "edits.safetensors", "edits.json", "results.json", "report.md",
        "report.html", "calibration.png", "model", "verification.safetensors", "checksums.json",
    }  # fmt: skip
    assert "edits" not in names
    results = artifacts.read_results(finished)
    assert abs(results["achieved"]["flops"] - 0.4) < 0.01
    assert {(m["model"], m["name"]) for m in results["measurements"]} >= {("dense", "top1"), ("pruned", "top1")}
    assert results["calibration"]["sha256"]
    assert "sparsity" in (finished / "report.md").read_text()


def test_the_saved_network_is_smaller_and_loads(finished):
    model = load_model(finished)
    assert not model.training
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters < 0.7 * 174_970
    stored = artifacts.stored_answers(finished)
    assert torch.equal(model(stored["inputs"]), stored["logits"])


class Stop:
    """Presses Ctrl-C when the edit after the given number of edits is about to be saved."""

    def __init__(self, monkeypatch, after: int) -> None:
        self.left, save = after, artifacts.RunDirectory.save_edit

        def save_or_stop(run, edit, dense_hash):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            save(run, edit, dense_hash)

        monkeypatch.setattr(artifacts.RunDirectory, "save_edit", save_or_stop)


def test_a_run_interrupted_before_its_first_edit_leaves_nothing_and_says_so(here, monkeypatch, capsys):
    Stop(monkeypatch, 0)
    assert prune("sparsity=0.4") == 130
    assert "Nothing was made yet: the same command starts again." in capsys.readouterr().err
    assert not list((here / "outputs").glob("prune/embedded/*"))


@pytest.mark.parametrize("edits", [2, 6])
def test_an_interrupted_run_goes_on_to_the_same_weights(finished, here, monkeypatch, capsys, edits):
    with monkeypatch.context() as patched:
        Stop(patched, edits)
        assert prune("sparsity=0.4") == 130
    said = capsys.readouterr().err
    folder = only_run(here)
    assert folder.name.endswith(".incomplete")
    assert len(list((folder / "edits").iterdir())) == edits
    assert f"resume={folder.relative_to(here)}" in said
    assert prune("sparsity=0.4", f"resume={folder}") == 0
    assert weights_hash(load_model(only_run(here))) == weights_hash(load_model(finished))


def test_a_run_interrupted_at_its_last_batchnorms_or_while_measuring_goes_on(here, monkeypatch):
    # With drawn positions the last BatchNorms are re-estimated by an edit of their own, the tenth.
    words = ["sparsity=0.4", "round_to=1", "preset=paper", "statistics=subsampled", "statistics.positions_per_image=4"]
    assert prune(*words, "output_dir=undisturbed") == 0
    whole = load_model(next((here / "undisturbed" / "prune" / "embedded").iterdir()))
    with monkeypatch.context() as patched:
        Stop(patched, 9)
        assert prune(*words) == 130
    folder = only_run(here)
    with monkeypatch.context() as patched:
        patched.setattr(pieces, "measure", stop)
        assert prune(*words, f"resume={folder}") == 130
    assert len(list((folder / "edits").iterdir())) == 10
    assert prune(*words, f"resume={folder}") == 0
    assert weights_hash(load_model(only_run(here))) == weights_hash(whole)


def stop(*_, **__):
    raise KeyboardInterrupt


def test_resuming_with_other_settings_says_what_differs(here, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        Stop(patched, 1)
        prune("sparsity=0.4")
    folder = only_run(here)
    capsys.readouterr()
    assert prune("sparsity=0.5", "round_to=4", f"resume={folder}") == 2
    said = capsys.readouterr().err
    assert "round_to (4 here, 'auto' there)" in said and "sparsity (0.5 here, 0.4 there)" in said


def test_resuming_on_other_weights_is_refused(here, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        Stop(patched, 1)
        prune("sparsity=0.4")
    folder = only_run(here)
    edit = artifacts.load_edits(folder)[0][0]
    next((folder / "edits").glob("0000.*")).unlink()
    artifacts.RunDirectory.reopen(folder).save_edit(edit, "0" * 64)
    capsys.readouterr()
    assert prune("sparsity=0.4", f"resume={folder}") == 2
    assert "the dense weights have changed since" in capsys.readouterr().err


def test_resuming_a_finished_run_is_refused(finished, capsys):
    assert prune("sparsity=0.4", f"resume={finished}") == 2
    assert "finished; there is nothing to resume" in capsys.readouterr().err


def test_replay_without_data_gives_the_same_weights(finished, here, capsys):
    assert main(["replay", f"run={finished}", "console=json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["equals_saved_model"] is True
    again = only_run(here, "replay/embedded/*")
    assert weights_hash(load_model(again)) == weights_hash(load_model(finished))


def test_replay_on_other_weights_is_refused(finished, capsys):
    assert main(["replay", f"run={finished}", "model.weights=random"]) == 2
    assert "its edits were made on dense weights with sha256" in capsys.readouterr().err


def test_replay_makes_a_damaged_network_again(copied, here, capsys):
    (copied / "model" / "weights.safetensors").write_bytes(b"damaged")
    assert main(["replay", f"run={copied}", "console=plain"]) == 0
    assert "saved network cannot be compared with" in capsys.readouterr().out
    again = only_run(here, "replay/embedded/*")
    stored = artifacts.stored_answers(copied)
    assert torch.equal(load_model(again)(stored["inputs"]), stored["logits"])


def test_replay_of_an_interrupted_run_is_refused(here, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        Stop(patched, 1)
        prune("sparsity=0.4")
    capsys.readouterr()
    assert main(["replay", f"run={only_run(here)}"]) == 2
    assert "this run was interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content", [("edits.json", '{"edits": 3}'), ("config.yaml", "a: ["), ("config.yaml", "a: 3")]
)
def test_a_file_of_a_run_with_other_content_is_named(copied, capsys, name, content):
    (copied / name).write_text(content)
    assert main(["replay", f"run={copied}"]) == 2
    said = capsys.readouterr().err
    assert name in said and "restore the run folder" in said


def test_a_run_that_fails_after_an_edit_says_where_its_edits_lie(here, monkeypatch, capsys):
    def fail(*_, **__):
        raise DataError("no space")

    with monkeypatch.context() as patched:
        patched.setattr(pieces, "save_network", fail)
        assert prune("sparsity=0.4") == 2
    folder = only_run(here)
    assert f"resume={folder.relative_to(here)}" in capsys.readouterr().out
    assert prune("sparsity=0.4", f"resume={folder}") == 0
    report = (only_run(here) / "report.md").read_text()
    assert "resume=" not in report, "a finished run cannot be resumed"
    assert "64 of 1,347" in report and "inside the package" in report


def test_verify_reloads_in_a_fresh_process(finished, capsys):
    assert main(["verify", f"run={finished}", "console=plain"]) == 0
    assert "reloaded in a fresh process" in capsys.readouterr().out


def test_a_run_of_an_older_version_is_read_when_asked_and_under_its_targets_old_names(copied, here, capsys):
    for place in (copied, copied / "model"):
        (place / "checksums.json").unlink()
    text = (copied / "config.yaml").read_text()
    assert "modhifi_cli.engine.gathering." in text
    (copied / "config.yaml").write_text(text.replace("modhifi_cli.engine.gathering.", "modhifi_cli.tasks.gathering."))
    for words in (["verify"], ["replay"], ["evaluate", "evaluation=[size]"]):
        assert main([*words, f"run={copied}", "console=plain"]) == 2
        assert "has no checksums.json" in capsys.readouterr().err
        assert main([*words, f"run={copied}", "unverified=true", "console=plain"]) == 0
        assert "whether its files are what was written, nobody can tell" in capsys.readouterr().out


def test_a_strangers_run_names_no_file_on_this_machine(copied, monkeypatch, capsys):
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("weights: default", "weights: /etc/passwd"))
    monkeypatch.setenv("XDG_STATE_HOME", str(copied.parent / "of the stranger"))
    manifest.write(copied)
    monkeypatch.undo()
    monkeypatch.chdir(copied.parent)
    assert main(["replay", f"run={copied}", "console=plain"]) == 2
    assert "model.weights: the folder was not made by you on this machine" in capsys.readouterr().err


def test_verify_finds_changed_weights(copied, capsys):
    path = copied / "model" / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-4000:] = bytes(4000)
    path.write_bytes(bytes(content))
    assert main(["verify", f"run={copied}"]) == 2
    assert "weights.safetensors: holds other weights than were saved, its sha256 is" in capsys.readouterr().err
    path.write_bytes(bytes(content)[:-8])
    assert main(["verify", f"run={copied}"]) == 2
    assert "damaged or changed, its sha256 is" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["verification.safetensors", "edits.json", "results.json"])
def test_a_damaged_run_is_named_before_it_is_used(copied, capsys, name):
    (copied / name).unlink()
    assert main(["verify", f"run={copied}"]) == 2
    assert name in capsys.readouterr().err


def test_evaluate_measures_a_run_beside_its_dense_network_again(finished, here, capsys):
    words = ["evaluate", f"run={finished}", "evaluation=[top1,size]", "console=json"]
    assert main(words) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    found = {(m["model"], m["name"]): m["value"] for m in last["measurements"]}
    before = {(m["model"], m["name"]): m["value"] for m in artifacts.read_results(finished)["measurements"]}
    assert found["dense", "top1"] == before["dense", "top1"]
    assert found["pruned", "top1"] == before["pruned", "top1"]
    assert found["pruned", "parameters"] < found["dense", "parameters"]


def test_evaluate_measures_a_dense_network_alone(here, capsys):
    assert main(["evaluate", "evaluation=[size]", "console=json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {m["model"] for m in last["measurements"]} == {"dense"}


def test_info_counts_what_hangs_on_a_group(capsys):
    assert main(["info", "console=json"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["parameters"] == 174_970
    stem = next(group for group in last["groups"] if group["group"] == "conv1")
    assert "layer1.1.conv2" in stem["producers"]
    assert 0 < stem["parameters"] < last["parameters"]


def test_info_tells_heads_channels_and_features_of_queries_and_keys_apart(capsys):
    assert main(["info", "model=deit_tiny", "console=json"]) == 0
    groups = json.loads(capsys.readouterr().out.splitlines()[-1])["groups"]
    first = {group["component"]: group for group in groups if group["group"].startswith("blocks.0.")}
    assert [(kind, group["components"]) for kind, group in first.items()] == [
        ("Q/K feature", 64), ("head", 3), ("channel", 768),
    ]  # fmt: skip
    weights = 2 * 192 * (192 + 1)  # of queries and keys, all heads
    assert first["Q/K feature"]["parameters"] == weights and first["Q/K feature"]["FLOPs (MACs)"] == 197 * 2 * 192 * 192


def test_exports_are_checked_before_the_run_is_finished(here):
    assert prune("sparsity=0.3", "export=[torch_export]") == 0
    folder = only_run(here)
    assert (folder / "export" / "model.pt2").is_file()
    (export,) = artifacts.read_results(folder)["exports"]
    assert export["max_difference"] <= 1e-4 * export["max_logit"]


def test_everything_in_float64_reloads_to_the_same_logits(here):
    assert prune("sparsity=0.3", "runtime.dtype=float64") == 0
    assert next(load_model(only_run(here)).parameters()).dtype == torch.float64


def test_the_same_command_twice_keeps_the_same_components(finished, here):
    assert prune("sparsity=0.4") == 0
    ours, theirs = artifacts.load_edits(only_run(here))[0], artifacts.load_edits(finished)[0]
    assert all(torch.equal(a.kept, b.kept) for a, b in zip(ours, theirs, strict=True))


def summary(folder):
    (path,) = (folder / "outputs" / "sweeps").glob("*/summary.csv")
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_sweep_records_failures_and_skips_what_is_finished(here, capsys):
    words = ["-m", "sparsity=0.2,1.5,0.4"]
    assert prune(*words) == 2
    rows = summary(here)
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert "0 <= sparsity < 1 (none with target=max_drop); got 1.5." in rows[1]["message"]
    assert abs(float(rows[2]["removed_flops"]) - 0.4) < 0.01
    assert prune(*words) == 2
    assert [row["status"] for row in summary(here)] == ["finished before", "failed", "finished before"]
    told = capsys.readouterr()
    assert "sweep of 3 jobs" in told.out
    assert re.search(r"error: outputs/sweeps/\S+: a job did not finish, as said above", told.err)


def test_a_sweep_goes_on_with_an_interrupted_job(here, monkeypatch, capsys):
    words = ["-m", "sparsity=0.3,0.2"]
    with monkeypatch.context() as patched:
        Stop(patched, 4)
        assert prune(*words) == 130
    assert "the same command again" in capsys.readouterr().err
    assert prune(*words) == 0
    assert "4 edits of the interrupted run" in capsys.readouterr().out
    assert [row["status"] for row in summary(here)] == ["finished", "finished"]


def test_a_wrong_choice_stops_a_sweep_before_its_first_job(here, capsys):
    assert prune("-m", "scoring=singleton,singelton") == 2
    assert "scoring=singelton: there is no such choice; did you mean 'singleton'" in capsys.readouterr().err


def test_two_jobs_of_a_sweep_side_by_side(here):
    assert prune("-m", "hydra/launcher=per_gpu", "sparsity=0.2,0.4", "evaluation=[]") == 0
    rows = summary(here)
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert float(rows[0]["removed_params"]) < float(rows[1]["removed_params"])


WRONG = {
    "everything excluded": (["exclude=[conv1,layer1,layer2,layer3]"], "cannot be reached"),
    "an unknown module": (["exclude=[layer9]"], "the network has no module 'layer9'"),
    "weights that are not there": (["model.weights=gone.safetensors"], "gone.safetensors"),
    "too few rows": (["data.num_samples=3", "compensation.ridge=0"], "set compensation.ridge above 0"),
    "too many samples": (["data.num_samples=1000000"], "num_samples"),
}


@pytest.mark.parametrize("words, expected", WRONG.values(), ids=WRONG.keys())
def test_what_is_found_wrong_during_the_work_is_one_sentence_too(here, capsys, words, expected):
    samples = [word for word in SMALL if not any(word.split("=")[0] == given.split("=")[0] for given in words)]
    assert main(["prune", *samples, *words]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0]


def test_a_run_that_ends_before_its_first_edit_leaves_no_folder(here):
    assert prune("exclude=[layer9]") == 2
    assert not list((here / "outputs").glob("prune/embedded/*"))


@pytest.mark.parametrize(
    ("labels", "origin"), [("auto", "labels of the source"), ("model", "the dense network's own predictions")]
)
def test_a_score_of_classes_says_whose_labels_it_used(here, labels, origin):
    words = ["preset=discedit_sp", "data.num_samples=128", f"data.labels={labels}", "scoring.least_images=2"]
    assert prune(*words, "evaluation=[]") == 0
    run = only_run(here)
    assert artifacts.read_results(run)["calibration"]["labels"] == f"128 images of 10 of 10 classes, {origin}"
    assert origin in (run / "report.md").read_text()


def test_labels_are_opened_for_a_score_of_classes_alone(here, capsys):
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 1), dtype=np.uint8)
    np.savez(here / "spoiled.npz", images=pixels, labels=np.array(["cat"] * 64))
    words = ["data=arrays", "data.path=spoiled.npz", "evaluation=[]", "evaluation_data=none"]
    assert main(["prune", "preset=magnitude", *words, "console=plain"]) == 0
    assert main(["prune", "preset=discedit_sp", *words, "console=plain"]) == 2
    assert "spoiled.npz [labels]: expected whole-number class indices" in capsys.readouterr().err
    assert not list((here / "outputs").glob("prune/embedded/*incomplete"))


@pytest.mark.parametrize("scoring", ["discedit_sp", "tvsprune"])
def test_a_score_of_classes_is_not_for_language_models(scoring, capsys):
    words = ["model=hf", "model.path=nowhere", "data=text", "data.path=nowhere.txt", f"scoring={scoring}"]
    assert main(["prune", *words, "console=plain"]) == 2
    assert "this scoring tells the classes of images apart, and a language model reads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "named"),
    [("target=latency", "target=latency"), ("target=max_drop", "target=max_drop"), ("preset=torch_pruning_magnitude", "outside")],
)
def test_several_processes_are_refused_what_only_one_can_decide(word, named, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=f"2 processes were started, and a run with {named} is one process's"):
        pieces.team_of(config.compose("prune", [word]))


class Killed(BaseException):
    """What no handler of the tool takes for anything else."""


@pytest.mark.parametrize("verb", ["prune", "unlearn"])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_run_that_was_killed_while_it_began_says_to_start_again(verb, written, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [verb, *(["forget_class=3"] if verb == "unlearn" else []), "data.num_samples=60", "evaluation=[]"]
    write, count = artifacts.write_text, []

    def killed(path, text):
        if len(count) == written:
            raise Killed
        count.append(path)
        write(path, text)

    for name in ("write_text", "write_json"):
        monkeypatch.setattr(artifacts, name, lambda path, content: killed(path, str(content)))
    with pytest.raises(Killed):
        main([*words, "console=plain"])
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    (left,) = tmp_path.glob("outputs/*/*/*.incomplete")
    capsys.readouterr()
    assert main([*words, f"resume={left}", "console=plain"]) == 2
    assert "the run was ended before anything was saved; remove" in capsys.readouterr().err
