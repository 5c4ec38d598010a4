"""`modhifi prune healing=distill`: marked as trained wherever it is told, resumed, replayed, refused in a sentence."""

import pytest

from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.engine import healing
from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts
from modhifi_cli.files.healing import NAME, forget_state, load_state, save_state
from modhifi_cli.graph.surgery import weights_hash
from tests.verbs.test_verbs import prune

HEAL = (
    "sparsity=0.7", "preset=magnitude_batchnorm", "healing=distill", "healing.epochs=2", "healing.batch_size=16",
    "healing.augment=false",
)  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_healed_run_says_that_it_is_trained_replays_and_resumes_to_the_same_weights(here, monkeypatch, capsys):
    monkeypatch.setattr(healing, "_SAVE_SECONDS", -1.0)
    assert prune("output_dir=whole", *HEAL) == 0
    (run,) = (here / "whole").glob("prune/embedded/*")
    results = artifacts.read_results(run)
    assert results["healing"]["trained"] and results["healing"]["after"] < results["healing"]["before"]
    assert any("these results are trained" in text for text in results["warnings"])
    page = (run / "report.md").read_text()
    assert "these results are trained" in page and "no training" not in page and "## Healing" in page
    assert not (run / NAME).exists()
    assert main(["replay", f"run={run}", "output_dir=again", "console=plain"]) == 0
    assert "weights equal to those of the run's saved network" in capsys.readouterr().out



def test_an_interrupted_healing_resumes_to_the_same_weights(here, monkeypatch):
    monkeypatch.setattr(healing, "_SAVE_SECONDS", -1.0)  # a state after every step
    assert prune("output_dir=whole", *HEAL) == 0
    (run,) = (here / "whole").glob("prune/embedded/*")
    left = [4]

    def stop(folder, state):
        save_state(folder, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("modhifi_cli.verbs.healing.files.save_state", stop)
        assert prune("output_dir=broken", *HEAL) == 130
    (broken,) = (here / "broken").glob("prune/embedded/*.incomplete")
    assert (broken / NAME).is_file()
    assert prune("output_dir=broken", *HEAL, f"resume={broken}") == 0
    (resumed,) = (here / "broken").glob("prune/embedded/*")
    assert weights_hash(load_model(resumed)) == weights_hash(load_model(run))


def test_without_samples_to_hold_out_it_is_refused_before_any_work(here, capsys):
    assert prune("healing=distill", "data.num_samples=4") == 2
    assert "at least 5 calibration samples; got 4" in capsys.readouterr().err
    assert not (here / "outputs").exists()


@pytest.mark.parametrize("word", ["lr=-1", "temperature=hot", "match=-1", "epochs=-1", "augment=3"])
def test_a_setting_out_of_range_is_refused_before_any_work(here, capsys, word):
    assert prune("healing=distill", f"healing.{word}") == 2
    key, _, value = word.partition("=")
    said = capsys.readouterr().err
    assert said.startswith(f"error: healing.{key} must be") and value in said and said.count("\n") == 1
    assert not (here / "outputs").exists()


def test_a_damaged_state_is_named(tmp_path):
    save_state(tmp_path, healing.HealingState({}, {"stage": 0}))
    assert load_state(tmp_path).facts == {"stage": 0}
    (tmp_path / NAME).write_bytes(b"no tensors")
    with pytest.raises(DataError, match="healing.safetensors: damaged .*remove it to begin the healing again"):
        load_state(tmp_path)
    forget_state(tmp_path)
    assert load_state(tmp_path) is None
