"""`modhifi prune` with targets that are measured: time, and the drop in agreement; on machines whose time is known."""

import json
import re

import pytest

from modhifi_cli.cli import main
from modhifi_cli.console import Console
from modhifi_cli.evaluation import latency_probe
from modhifi_cli.files import artifacts
from modhifi_cli.files.artifacts import RunDirectory
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.settings import config
from tests.machines import Machine

SMALL = ["data.num_samples=40", "evaluation=[top1]", "evaluation_data.num_samples=60", "console=plain"]
TIMED = ["target=latency", "target.batch_size=2", "target.rounds=3", "target.max_seconds=0.5"]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A fresh working folder, and a stopwatch that computes."""
    monkeypatch.chdir(tmp_path)
    found = Machine(fixed=0.2)
    monkeypatch.setattr(latency_probe, "stopwatch", found)
    return found


def prune(*words: str) -> int:
    return main(["prune", *SMALL, *words])


def only_run(root, pattern="outputs/prune/embedded/*"):
    (found,) = root.glob(pattern)
    return found


def interrupt_after(monkeypatch, edits):
    save, count = RunDirectory.save_edit, []

    def stop(self, *arguments):
        save(self, *arguments)
        count.append(1)
        if len(count) == edits:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunDirectory, "save_edit", stop)
    return lambda: monkeypatch.setattr(RunDirectory, "save_edit", save)


def test_a_run_to_a_share_of_time_keeps_its_table_and_reports_asked_predicted_and_measured(tmp_path):
    assert prune(*TIMED, "sparsity=0.3") == 0
    folder = only_run(tmp_path)
    results = artifacts.read_results(folder)
    latency = results["latency"]
    assert results["achieved"]["latency"] == latency["measured"] == pytest.approx(0.3, abs=0.03)
    assert latency["predicted"] == pytest.approx(0.3, abs=0.03) and latency["batch"] == 2
    page = (folder / "report.md").read_text()
    assert "time saved, by the table" in page and "time saved, measured" in page and "% of time" in page
    table = artifacts.load_latency_table(folder / "latency_table.json")
    # Given to another run, the table brings the same widths without the grid being measured again.
    words = [*TIMED, "sparsity=0.3", f"target.table={folder / 'latency_table.json'}", "output_dir=again"]
    assert prune(*words) == 0
    again = only_run(tmp_path, "again/prune/embedded/*")
    assert weights_hash(artifacts.load_model(again)) == weights_hash(artifacts.load_model(folder))
    assert artifacts.load_latency_table(again / "latency_table.json") == table


def test_an_interrupted_run_goes_on_with_its_own_table(tmp_path, monkeypatch, machine):
    assert prune(*TIMED) == 0
    whole = only_run(tmp_path)
    restore = interrupt_after(monkeypatch, 2)
    assert prune(*TIMED, "output_dir=cut", f"target.table={whole / 'latency_table.json'}") == 130
    restore()
    machine.tile = 16  # measuring now would give other widths
    begun = only_run(tmp_path, "cut/prune/embedded/*")
    words = ["output_dir=cut", f"target.table={whole / 'latency_table.json'}", f"resume={begun}"]
    assert prune(*TIMED, *words) == 0
    finished = only_run(tmp_path, "cut/prune/embedded/*")
    assert weights_hash(artifacts.load_model(finished)) == weights_hash(artifacts.load_model(whole))


def test_a_prediction_that_the_clock_contradicts_is_a_warning(tmp_path, monkeypatch, capsys):
    from modhifi_cli.verbs import timing

    real = timing.Times.clocked

    def slower(self, summary, dense, model, *rest):
        return real(self, summary, dense, dense, *rest)  # as if the new network took as long as the dense one

    monkeypatch.setattr(timing.Times, "clocked", slower)
    assert prune(*TIMED, "sparsity=0.3") == 0
    assert "% of the time and save 0.0%" in capsys.readouterr().out
    assert any("save 0.0%" in text for text in artifacts.read_results(only_run(tmp_path))["warnings"])


def test_another_machines_table_is_taken_and_said_to_be_unchecked(tmp_path, capsys):
    assert prune(*TIMED) == 0
    path = only_run(tmp_path) / "latency_table.json"
    content = json.loads(path.read_text())
    content["protocol"]["device"] = "another processor"
    path.write_text(json.dumps(content))
    assert prune(*TIMED, f"target.table={path}", "output_dir=there") == 0
    assert "the latency table is that of another machine (another processor" in capsys.readouterr().out
    assert "latency" not in artifacts.read_results(only_run(tmp_path, "there/prune/embedded/*"))["achieved"]


def test_the_jobs_of_a_sweep_share_one_table(tmp_path, machine):
    assert main(["prune", "-m", *SMALL, *TIMED, "sparsity=0.2,0.3"]) == 0
    (shared,) = tmp_path.glob("outputs/sweeps/*/latency_table_*.json")
    kinds = [artifacts.load_latency_table(path).kinds for path in tmp_path.glob("outputs/sweeps/*/*/latency_table.json")]
    assert len(kinds) == 2 and kinds[0] == kinds[1] == artifacts.load_latency_table(shared).kinds


def test_a_comparison_takes_shares_of_time_as_budgets(tmp_path):
    words = ["methods=[magnitude,torch_pruning_magnitude]", "budgets=[0.3]", "seeds=[0]"]
    assert main(["compare", *SMALL, *TIMED, *words]) == 0
    folder = only_run(tmp_path, "outputs/compare/*")
    head = (folder / "comparison.csv").read_text().splitlines()[0].split(",")
    assert "removed_latency" in head and "time_saved" in head
    assert (folder / "methods.svg").exists(), "one budget is bars"
    assert "time removed" in (folder / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*TIMED, "target.table=nowhere.json"], r"target.table=nowhere.json: no such file; give the latency_table.json"),
        ([*TIMED, "sparsity=0.99"], r"sparsity=0.99 of latency cannot be reached: the largest share possible is 0\."),
        ([*TIMED, "target.rounds=0"], r"target.rounds must be a whole number from 1; got 0"),
        ([*TIMED, "target.max_seconds=0"], r"target.max_seconds must be a number above 0; got 0"),
        ([*TIMED, "target.batch_size=0"], r"target.batch_size must be a whole number from 1, or null; got 0"),
        (["target=flops", "target.table=x"], r"no key 'target.table'"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(words, sentence, capsys, tmp_path, machine):
    machine.fixed = 50.0
    assert prune(*words) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not list(tmp_path.glob("outputs/prune/embedded/*"))


def test_a_file_that_is_no_table_is_named(capsys, tmp_path):
    (tmp_path / "table.json").write_text('{"kinds": 3}')
    assert prune(*TIMED, "target.table=table.json") == 2
    assert "table.json: not a latency table" in capsys.readouterr().err


BOUND = ["target=max_drop", "target.value=20", "target.trials=3", "data.num_samples=80"]


def test_a_bound_on_the_drop_is_kept_by_the_network_that_is_saved(tmp_path):
    import torch

    from modhifi_cli.data import digits
    from modhifi_cli.data.parts import Part
    from modhifi_cli.engine.max_drop import measured_drop
    from modhifi_cli.models import embedded

    assert prune(*BOUND, "preset=paper") == 0
    folder = only_run(tmp_path)
    results = artifacts.read_results(folder)
    (taken,) = [trial for trial in results["trials"] if trial["verdict"] == "taken"]
    assert not (folder / "trials").exists()
    dense = embedded.load()
    held_out = Part(digits.load(preprocess=dense.preprocess, num_samples=80, labelled=False), share=0.25, held_out=True)
    images = torch.cat([batch for batch, _ in held_out.batches(80)])
    with torch.inference_mode():
        drop = measured_drop(dense.model(images), artifacts.load_model(folder)(images))
    assert drop <= 20 and f"{drop:.2f}" == taken["measured drop, points"]
    assert results["achieved"]["flops"] == pytest.approx(float(taken["asked, flops"].rstrip("%")) / 100, abs=0.03)
    page = (folder / "report.md").read_text()
    assert "## Trials" in page and "as few FLOPs as 20 points of agreement allow" in page and "| taken |" in page
    assert main(["replay", f"run={folder}", "console=plain"]) == 0


def test_finished_trials_are_not_pruned_again(tmp_path, monkeypatch):
    assert prune(*BOUND, "preset=paper") == 0
    whole = only_run(tmp_path)
    edits = len(artifacts.load_edits(whole)[0])
    restore = interrupt_after(monkeypatch, edits + 3)  # in the second trial, or while the first is taken over
    assert prune(*BOUND, "preset=paper", "output_dir=cut") == 130
    restore()
    begun = only_run(tmp_path, "cut/prune/embedded/*")
    before = json.loads((begun / "trials" / "trials.json").read_text())["trials"]
    assert before
    saved, save = [], RunDirectory.save_edit

    def counted(self, *arguments):
        saved.append(self.path)
        save(self, *arguments)

    monkeypatch.setattr(RunDirectory, "save_edit", counted)
    assert prune(*BOUND, "preset=paper", "output_dir=cut", f"resume={begun}") == 0
    assert not [path for path in saved if path.name == "00"]
    finished = only_run(tmp_path, "cut/prune/embedded/*")
    assert weights_hash(artifacts.load_model(finished)) == weights_hash(artifacts.load_model(whole))
    assert artifacts.read_results(finished)["trials"] == artifacts.read_results(whole)["trials"]


def test_a_bound_that_no_cut_keeps_leaves_nothing(tmp_path, monkeypatch, capsys):
    from modhifi_cli.engine import max_drop

    monkeypatch.setattr(max_drop, "measured_drop", lambda dense, other: 37.5)
    assert prune(*BOUND, "preset=magnitude", "target.trials=2") == 2
    said = capsys.readouterr().err
    assert re.search(r"target.value=20 cannot be kept: even 2\.0% fewer flops cost 37\.50 points of agreement on the 20 "
                     r"held-out images \(one image is 5\.00\); raise target.value", said)
    assert not list(tmp_path.glob("outputs/prune/embedded/*"))


def test_a_bound_is_searched_over_time_too(tmp_path):
    words = [*BOUND, "preset=best", "target.of=latency", *TIMED[1:], "target.trials=2"]
    assert prune(*words) == 0
    results = artifacts.read_results(only_run(tmp_path))
    assert results["achieved"]["latency"] == results["latency"]["measured"] > 0
    assert all(trial["predicted drop, points"] != "" for trial in results["trials"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([*BOUND, "sparsity=0.3"], "sparsity=0.3 makes no sense with target=max_drop, which finds the share itself"),
        (["target=flops", "sparsity=null"], "sparsity must be given with target=flops"),
        ([*BOUND, "target.value=0"], "target.value must be points of agreement, above 0 and below 100; got 0"),
        ([*BOUND, "target.of=components"], "target.of must be params, flops or latency; got 'components'"),
        ([*BOUND, "target.held_out=0.9"], "target.held_out must be a share with 0 < held_out <= 0.5; got 0.9"),
        ([*BOUND, "target.trials=1"], "target.trials must be a whole number from 2; got 1"),
        ([*BOUND, "data.num_samples=3"], "3 calibration images cannot be parted"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_mistake_with_a_bound_is_one_sentence_and_leaves_nothing(words, sentence, capsys, tmp_path):
    assert prune(*words) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("outputs/prune/embedded/*"))


def test_a_comparison_has_no_bound_on_the_drop(capsys):
    assert main(["compare", *SMALL, *BOUND, "methods=[magnitude]", "budgets=[0.3]", "seeds=[0]"]) == 2
    assert "target=max_drop has none; choose another target" in capsys.readouterr().err


def test_help_teaches_measured_targets(capsys):
    assert main(["prune", "--help"]) == 0
    said = capsys.readouterr().out
    assert "target=latency sparsity=0.3" in said and "target=max_drop target.value=1" in said
    assert "auto, components, flops, latency, max_drop, params" in said


@pytest.mark.parametrize("words, timed", [
    (["target=latency"], True),
    (["target=max_drop", "target.of=latency", "sparsity=null"], True),
    (["target=max_drop", "target.of=flops", "sparsity=null"], False),
    (["target=flops"], False),
])  # fmt: skip
def test_timing_is_a_part_of_every_run_that_is_timed(words, timed):
    from modhifi_cli.verbs import prune as verb

    settings, parts = config.steps("prune", words), []
    console = Console()
    console.part = lambda name, number, total: parts.append((name, number == total))
    with verb._steps(settings, console, config.build(settings["target"]))("latency"):
        pass
    assert parts == ([("timing", True)] if timed else [])
