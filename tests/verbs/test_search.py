"""A search over budgets and presets: the sweeper sees what runs became, and the table says which trades are best."""

import json

import pytest

from modhifi_cli.cli import main
from modhifi_cli.pages import many
from modhifi_cli.records import Measurement, Results


def run(method, budget, top1):
    return many.Run(method, budget, values={"removed_flops": 100 * budget, "top1": top1}, dense={"top1": 95.0})


def test_the_best_trades_are_those_that_nothing_beats_in_both():
    rows = many.grouped([run("a", 0.2, 94.0), run("b", 0.2, 90.0), run("a", 0.4, 80.0), run("b", 0.4, 91.0)])
    assert many.best_trades(rows) == (
        "Nothing else is better both in top-1 accuracy and in what is removed than: a at 20 % (94.00), b at 40 % (91.00)."
    )
    assert many.best_trades(rows[:2]) == "", "at one budget the first place says it all"


def test_a_search_is_told_the_share_removed_and_the_quality_of_a_run():
    top1 = Results("prune", target="flops", achieved={"flops": 0.4}, measurements=(Measurement("pruned", "top1", 90.0, "%"),))
    text = Results(
        "prune", target="params", achieved={"params": 0.2},
        measurements=(Measurement("pruned", "token_perplexity", 30.0, ""),),
    )  # fmt: skip
    assert many.objectives(top1) == (40.0, 90.0) and many.objectives(text) == (20.0, -30.0)
    assert all(worst < one for worst, one in zip(many.WORST, many.objectives(text), strict=True))


def test_a_search_goes_over_the_choices_and_counts_every_run_once(tmp_path, monkeypatch, capsys):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="comes with the extra [search]")
    monkeypatch.chdir(tmp_path)
    words = [
        "sparsity=choice(0.2,0.4)", "preset=magnitude", "data.num_samples=16", "evaluation=[top1]", "check_data=false",
        "evaluation_data.num_samples=32", "console=json",
    ]  # fmt: skip
    assert main(["prune", "-m", "hydra/sweeper=search", "hydra.sweeper.n_trials=5", *words]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    rows = events[-1]["jobs"]
    made = [path for path in folder.iterdir() if (path / "results.json").is_file()]
    assert 0 < len(rows) == len(made) <= 2 and (folder / "optimization_results.yaml").is_file()
