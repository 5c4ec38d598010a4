"""What a tracker is handed lies where it reads: every measured number of a run, under one name for all runs."""

import sys
from pathlib import Path

import pytest

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files.trackers.tensorboard import TensorBoard
from modhifi_cli.records import Measurement, Results
from modhifi_cli.settings import config

RESULTS = Results(
    verb="prune", model="net", target="flops", achieved={"flops": 0.4},
    measurements=(Measurement("dense", "top1", 90.0, "%"), Measurement("pruned", "top1", 88.0, "%")),
    groups=({"group": "a", "kept": 3, "removed": 1}, {"group": "b", "kept": 1, "removed": 1}),
    trials=({"share": 0.2, "agreement": 99.0}, {"share": 0.4, "agreement": 97.0}),
)  # fmt: skip


def test_tensorboard_reads_every_number_of_a_run(tmp_path):
    pytest.importorskip("tensorboard", reason="comes with the extra [tracker]")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    place = TensorBoard(str(tmp_path / "board")).write(Path("outputs/prune/net/RUN"), RESULTS, {"sparsity": "0.4"})
    assert place == tmp_path / "board" / "prune" / "net" / "RUN"
    read = EventAccumulator(str(place)).Reload()

    def of(name):
        return [event.value for event in read.Scalars(name)]

    assert of("top1/dense") == [90.0] and of("top1/pruned") == [88.0] and of("removed/flops") == [40.0]
    assert of("groups/kept") == [0.75, 0.5] and of("trials/agreement") == [99.0, 97.0]
    assert "_hparams_/session_start_info" in read.summary_metadata


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="comes with the extra [tracker]")
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with pytest.raises(DataError, match=r"tracker.folder: .*RUN cannot be written \(.*No space left.*\); give another folder"):
        TensorBoard(str(tmp_path)).write(Path("outputs/prune/net/RUN"), RESULTS, {})


def test_a_tracker_without_its_package_is_refused_before_the_run(monkeypatch):
    chosen = config.compose("prune", ["tracker=tensorboard", "output_dir=runs"])["tracker"]
    assert chosen["folder"] == "runs/tensorboard" and "tracker" not in config.compose("prune", [])
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"tracker=tensorboard needs the package tensorboard, .* 'modhifi\[tracker\]'"):
        config.build(chosen)
