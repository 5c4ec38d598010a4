"""Files of a run: what is written is read back, and what is damaged is named."""

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts, manifest
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
    artifacts.write_text(run.path / "config.yaml", "model: null\n")
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
    from modhifi_cli import api

    assert modhifi_cli.load_model is api.load_model  # folders and names on the hub
    ours, theirs = (load(saved[0]).state_dict() for load in (modhifi_cli.load_model, artifacts.load_model))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
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
    manifest.write(folder)
    with pytest.raises(DataError, match="does not fit architecture.json"):
        artifacts.load_model(folder)


def test_a_newer_format_is_refused(saved):
    folder, _ = saved
    described = json.loads((folder / "architecture.json").read_text())
    (folder / "architecture.json").write_text(json.dumps(described | {"format_version": 99}))
    manifest.write(folder)
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
    damage(next((run.path / "edits").glob("0000.*.safetensors")), "cut short")
    with pytest.raises(DataError, match=r"0000\.[0-9a-f]{64}\.safetensors: damaged"):
        run.load_edits()


def test_a_run_that_saved_nothing_is_said_to_be_started_again(run):
    with pytest.raises(DataError, match="ended before anything was saved; remove .* and start again"):
        artifacts.RunDirectory.reopen(run.path)
    with pytest.raises(DataError, match="ended before anything was saved; start it again"):
        artifacts.run_folder(run.final)


def test_a_finished_run_outlives_a_folder_that_appears_under_its_name(run):
    run.save_edit(some_edit(), "abc")
    run.final.mkdir()
    (run.final / "other").write_text("somebody else's")
    final = run.finish()
    assert final.name == "one_2" and len(artifacts.load_edits(final)[0]) == 1
    assert (run.final.with_name("one") / "other").read_text() == "somebody else's"


def test_a_run_with_results_is_never_discarded_as_empty(run):
    artifacts.write_json(run.path / "results.json", {})
    run.discard_if_empty()
    assert run.path.is_dir()


def test_a_second_process_does_not_work_in_the_same_folder(run):
    artifacts.write_text(run.path / "config.yaml", "model: null\n")
    code = (
        "import sys; from modhifi_cli.files import artifacts\n"
        "try: artifacts.RunDirectory.reopen(sys.argv[1])\n"
        "except Exception as error: print(error)\n"
        "else: print('opened')"
    )

    def other() -> str:
        return subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True).stdout

    assert "another process is working in this folder" in other()
    run.finish()
    (run.path / "results.json").unlink(missing_ok=True)
    os.rename(run.path, run.path.with_name("one.incomplete"))
    assert "opened" in other()


@pytest.mark.parametrize("name, said", [
    ("weights.safetensors", "holds other weights than were saved"),
    ("architecture.json", "damaged or changed"),
])  # fmt: skip
def test_a_changed_byte_of_a_saved_model_is_found(saved, name, said):
    folder, _ = saved
    content = bytearray((folder / name).read_bytes())
    content[-5] ^= 1
    (folder / name).write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{name}: {said}, its sha256 is"):
        artifacts.load_model(folder)


def test_a_folder_without_checksums_is_read_only_when_asked(saved):
    folder, model = saved
    (folder / artifacts.CHECKSUMS).unlink()
    with pytest.raises(DataError, match=r"has no checksums\.json, .* say unverified=true"):
        artifacts.load_model(folder)
    assert weights_hash(artifacts.load_model(folder, unverified=True)) == weights_hash(model)


def test_a_file_that_was_not_written_with_the_model_is_not_read(saved):
    folder, _ = saved
    told = json.loads((folder / artifacts.CHECKSUMS).read_text())
    del told["files"]["weights.safetensors"]
    (folder / artifacts.CHECKSUMS).write_text(json.dumps(told))
    with pytest.raises(DataError, match=r"weights\.safetensors: not in checksums\.json"):
        artifacts.load_model(folder)


@pytest.mark.parametrize("kind", ["link", "linked folder", "pipe"])
def test_no_link_and_no_pipe_is_opened(saved, tmp_path, kind):
    folder, _ = saved
    if kind == "link":
        (folder / "weights.safetensors").rename(tmp_path / "elsewhere")
        (folder / "weights.safetensors").symlink_to(tmp_path / "elsewhere")
    elif kind == "linked folder":
        (folder / "more").symlink_to("/etc")
    else:
        (folder / "architecture.json").unlink()
        os.mkfifo(folder / "architecture.json")
    with pytest.raises(DataError, match="no link .*is followed|no ordinary file"):
        artifacts.load_model(folder)


def test_a_model_folder_that_is_a_link_is_not_followed(saved, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").symlink_to(saved[0])
    with pytest.raises(DataError, match="model: a link, and no link in a run folder is followed"):
        artifacts.load_model(tmp_path / "run")


def test_writing_replaces_a_link_and_does_not_follow_it(tmp_path):
    (tmp_path / "victim").write_text("mine")
    for name in ("report.md", "report.md.writing"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    artifacts.write_text(tmp_path / "report.md", "a page")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "report.md").read_text() == "a page" and not (tmp_path / "report.md").is_symlink()


@pytest.mark.parametrize("text", ['{"a": ' * 9000, "[1]", '{"format_version": "x"}', "1" * 5000, '{"format_version": 1e400}'])
def test_wrong_json_is_one_sentence(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(DataError, match="damaged"):
        artifacts.read_results(tmp_path)


def test_a_missing_edit_of_an_interrupted_run_is_noticed(run):
    for _ in range(3):
        run.save_edit(some_edit(), "abc")
    next((run.path / "edits").glob("0001.*")).unlink()
    with pytest.raises(DataError, match="the edits before it are missing"):
        run.load_edits()


def test_edits_of_an_older_version_without_checksums_are_not_gone_on_from(run):
    run.save_edit(some_edit(), "abc")
    edit = next((run.path / "edits").glob("0000.*"))
    edit.rename(edit.with_name("0000.safetensors"))
    with pytest.raises(DataError, match="written by an older version without a checksum"):
        run.load_edits()


def test_only_who_has_the_secret_can_mark_a_folder_as_made_here(saved, monkeypatch, tmp_path):
    folder, _ = saved
    assert manifest.made_here(folder)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of somebody else"))
    assert not manifest.made_here(folder)
    manifest.renew(folder, ["architecture.json"])
    assert not manifest.made_here(folder), "a page made again made a stranger's folder ours"


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        artifacts.load_edits(tmp_path)
    with pytest.raises(DataError, match=r"not a whole run, config\.yaml is missing"):
        artifacts.run_folder(tmp_path)
    with pytest.raises(DataError, match="no such folder"):
        artifacts.run_folder(tmp_path / "nowhere")


def test_an_interrupted_run_is_no_finished_one(run):
    artifacts.write_text(run.path / "config.yaml", "model: null\n")
    with pytest.raises(DataError, match="interrupted; finish it with the same command and resume="):
        artifacts.run_folder(run.final)


def test_a_full_disk_is_one_sentence_and_leaves_no_half_file(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        run.save_edit(some_edit(), "abc")
    assert not list((run.path / "edits").iterdir())
