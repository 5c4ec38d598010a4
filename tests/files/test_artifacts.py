"""Files of a run: what is written is read back, and what is damaged is named."""

import errno
import json
import os

import pytest
import torch

from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.models import embedded
from modhifi_cli.records import Edit, ModuleEdit


def some_edit() -> Edit:
    kept, removed = torch.arange(12), torch.arange(12, 16)
    return Edit(
        name="layer1.0.conv1",
        iteration=0,
        modules=(
            ModuleEdit("layer1.0.conv1", kept_outputs=kept),
            ModuleEdit("layer1.0.bn1", kept_outputs=kept, tensors={"running_mean": torch.randn(12)}),
            ModuleEdit("layer1.0.conv2", kept_inputs=kept, tensors={"weight": torch.randn(16, 12, 3, 3)}),
        ),
        kept=kept,
        removed=removed,
        facts={"fidelity": {"layer1.0.conv2": 0.5}, "stale_batchnorms": ["layer1.0.bn2"], "one": torch.tensor(1)},
    )


def assert_equal_edits(ours: Edit, theirs: Edit) -> None:
    assert (ours.name, ours.iteration) == (theirs.name, theirs.iteration)
    assert torch.equal(ours.kept, theirs.kept) and torch.equal(ours.removed, theirs.removed)
    for mine, other in zip(ours.modules, theirs.modules, strict=True):
        assert mine.module == other.module
        for name in ("kept_outputs", "kept_inputs"):
            left, right = getattr(mine, name), getattr(other, name)
            assert (left is None and right is None) or torch.equal(left, right)
        assert mine.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(mine.tensors[key], other.tensors[key]) for key in mine.tensors)


@pytest.fixture
def run(tmp_path):
    return artifacts.RunDirectory.create(tmp_path / "runs" / "one")


@pytest.fixture
def saved(tmp_path):
    """A saved model folder of the embedded network with one edit, and the edited network."""
    loaded = embedded.load(name="embedded")
    apply_edit_(loaded.model, some_edit())
    artifacts.save_model(tmp_path / "model", loaded, loaded.model)
    return tmp_path / "model", loaded.model.eval()


def test_an_edit_is_the_same_after_saving_before_and_after_the_run_is_finished(run):
    edit = some_edit()
    run.save_edit(edit, "abc")
    run.save_edit(edit, "abc")
    for stage in ("interrupted", "finished"):
        (first, second), dense = run.load_edits()
        assert dense == "abc", stage
        assert_equal_edits(edit, first)
        assert_equal_edits(edit, second)
        assert first.facts["fidelity"] == {"layer1.0.conv2": 0.5}
        run.finish()


def test_a_run_has_its_name_only_when_it_is_finished(run):
    assert run.path.name == "one.incomplete"
    assert not run.final.exists()
    assert run.finish() == run.final
    assert not run.path.with_name("one.incomplete").exists()


def test_a_run_does_not_overwrite_another(run):
    with pytest.raises(DataError, match="exists already"):
        artifacts.RunDirectory.create(run.final)


def test_reopening_takes_either_name_and_refuses_a_finished_run(run):
    assert artifacts.RunDirectory.reopen(run.final).path == run.path
    assert artifacts.RunDirectory.reopen(run.path).path == run.path
    run.finish()
    with pytest.raises(DataError, match="finished; there is nothing to resume"):
        artifacts.RunDirectory.reopen(run.final)


def test_a_saved_model_is_of_its_own_class_with_equal_weights_and_logits(saved):
    folder, model = saved
    again = artifacts.load_model(folder)
    assert type(again) is type(model)
    assert again.layer1[0].conv1.out_channels == 12
    assert weights_hash(again) == weights_hash(model)
    images = torch.randn(2, 1, 8, 8) if again.conv1.in_channels == 1 else torch.randn(2, again.conv1.in_channels, 8, 8)
    assert torch.equal(again(images), model(images))


def test_the_package_offers_load_model(saved):
    import modhifi_cli

    assert modhifi_cli.load_model is artifacts.load_model
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        modhifi_cli.load_modle  # noqa: B018


def test_nothing_saved_is_a_pickle(saved, run):
    run.save_edit(some_edit(), "abc")
    for path in [*saved[0].iterdir(), *run.finish().rglob("*")]:
        if path.is_file():
            assert path.suffix in (".json", ".safetensors")


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"\x00\xff" * 40)


@pytest.mark.parametrize("how", ["missing", "cut short", "overwritten"])
@pytest.mark.parametrize("name", ["weights.safetensors", "architecture.json"])
def test_a_damaged_saved_model_is_named(saved, name, how):
    folder, _ = saved
    damage(folder / name, how)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        artifacts.load_model(folder)


def test_weights_of_another_network_are_named(saved):
    folder, _ = saved
    described = json.loads((folder / "architecture.json").read_text())
    described["widths"]["layer1.0.conv1"]["out_channels"] = 10
    (folder / "architecture.json").write_text(json.dumps(described))
    with pytest.raises(DataError, match="does not fit architecture.json"):
        artifacts.load_model(folder)


def test_a_newer_format_is_refused(saved):
    folder, _ = saved
    described = json.loads((folder / "architecture.json").read_text())
    (folder / "architecture.json").write_text(json.dumps(described | {"format_version": 99}))
    with pytest.raises(DataError, match="written in format 99"):
        artifacts.load_model(folder)


@pytest.mark.parametrize("how", ["cut short", "overwritten"])
@pytest.mark.parametrize("name", ["edits.safetensors", "edits.json"])
def test_damaged_edits_are_named(run, name, how):
    run.save_edit(some_edit(), "abc")
    damage(run.finish() / name, how)
    with pytest.raises(DataError, match="damaged|cannot be read"):
        artifacts.load_edits(run.final)


def test_a_damaged_edit_of_an_interrupted_run_is_named(run):
    run.save_edit(some_edit(), "abc")
    damage(run.path / "edits" / "0000.safetensors", "cut short")
    with pytest.raises(DataError, match=r"0000\.safetensors: damaged"):
        run.load_edits()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        artifacts.load_edits(tmp_path)
    with pytest.raises(DataError, match=r"not a whole run, config\.yaml is missing"):
        artifacts.run_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        artifacts.run_folder(tmp_path / "nowhere")


def test_an_interrupted_run_is_no_finished_one(run):
    with pytest.raises(DataError, match="interrupted; finish it with the same command and resume="):
        artifacts.run_folder(run.final)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        run.save_edit(some_edit(), "abc")
    assert not list((run.path / "edits").iterdir())
