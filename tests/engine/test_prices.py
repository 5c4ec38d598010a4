"""Time as a target of a run, on machines whose time is known: asked, predicted and reached shares agree."""

import copy

import pytest
import torch

from modhifi_cli.engine.plan import Plan, Summary
from modhifi_cli.engine.prices import Latency, MaxDrop, Params, as_price
from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.numerics.allocation import Global, Uniform
from modhifi_cli.records import Edit
from modhifi_cli.rivals.torch_pruning import torch_pruning_
from tests.engine.test_prune import run, setting
from tests.machines import Machine


def timed(machine, **settings):
    return Latency(batch_size=2, rounds=3, max_seconds=1e9, stopwatch=machine, **settings)


def pruned(name, machine, *, latency=None, **settings):
    model, images = setting(name)
    dense = copy.deepcopy(model)
    settings = {"target": latency or timed(machine), **settings}
    edits, events = run(model, images, **settings)
    tables = [event for event in events if isinstance(event, LatencyTable)]
    return dense, model, edits, events, tables


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0.2},
        {"sparsity": 0.4, "allocation": Global()},
        {"sparsity": 0.4, "iterations": 2},
        {"sparsity": 0.4, "round_to": 2, "allocation": Global()},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_the_asked_share_of_time_is_reached(settings):
    machine = Machine(fixed=0.05, per_element=1e-5)
    dense, model, _, events, _ = pruned("projected", machine, **settings)
    reached = machine.share(dense, model, torch.randn(2, 3, 16, 16))
    summary = events[-1]
    assert isinstance(summary, Summary)
    assert reached == pytest.approx(settings["sparsity"], abs=0.04)  # eight components a group come in steps
    assert summary.latency["predicted"] == pytest.approx(reached, abs=0.02)
    (plan,) = [event for event in events if isinstance(event, Plan)]
    assert {"params", "flops", "components", "latency"} == plan.predicted.keys()


def test_trials_put_a_wrong_table_right_before_the_cut():
    machine = Machine(fixed=0.05)
    _, _, _, _, tables = pruned("projected", machine, sparsity=0.4)
    table = tables[0]
    kinds = {
        kind: type(times)(times.inputs, times.outputs, tuple(tuple(v**0.7 for v in row) for row in times.milliseconds))
        for kind, times in table.kinds.items()
    }
    scale = table.layers_ms({}) / type(table)(**{**vars(table), "kinds": kinds}).layers_ms({})
    wrong = type(table)(**{**vars(table), "kinds": kinds, "scale": table.scale * scale, "aims": {}})
    dense, model, _, events, later = pruned("projected", machine, sparsity=0.4, latency=timed(machine, measured=wrong))
    reached = machine.share(dense, model, torch.randn(2, 3, 16, 16))
    (aim, offset) = next(iter(later[-1].aims.values()))
    assert abs(aim - 0.4) > 0.02  # the wrong table had to be asked for something else
    assert reached == pytest.approx(0.4, abs=0.04)
    assert events[-1].latency["predicted"] == pytest.approx(events[-1].latency["table"] + offset)


def test_a_continued_run_takes_the_saved_table_and_times_nothing():
    machine = Machine(fixed=0.05)
    _, model, edits, _, tables = pruned("projected", machine, allocation=Global())

    def forbidden(module, images):
        raise AssertionError("measured again")

    settings = {"latency": timed(forbidden, measured=tables[-1]), "allocation": Global(), "done": edits[:2]}
    _, again, rest, _, _ = pruned("projected", machine, **settings)
    assert weights_hash(again) == weights_hash(model)
    assert [edit.name for edit in rest] == [edit.name for edit in edits[2:]]


def test_a_share_of_time_out_of_reach_names_the_largest_possible():
    with pytest.raises(ConfigError, match=r"sparsity=0\.9 of latency cannot be reached: the largest share possible is "
                       r"0\.\d+, since \d+% of the .* ms of a forward pass does not depend on the widths"):
        pruned("projected", Machine(fixed=5.0), sparsity=0.9)


def test_another_networks_table_is_refused():
    _, _, _, _, tables = pruned("projected", Machine(fixed=0.05))
    with pytest.raises(ConfigError, match=r"target.table: the table was measured for other layers"):
        pruned("concatenated", Machine(), latency=timed(Machine(), measured=tables[-1]))


def test_an_outside_pruner_is_run_to_a_share_of_time_too():
    model, images = setting("projected")
    dense, machine = copy.deepcopy(model), Machine(fixed=0.01)
    events = list(
        torch_pruning_(
            model, calibration=images, sparsity=0.3, target=timed(machine), importance="magnitude",
            batch_size=8,
        )
    )  # fmt: skip
    reached = machine.share(dense, model, torch.randn(2, 3, 16, 16))
    assert any(isinstance(event, LatencyTable) for event in events)
    assert any(isinstance(event, Edit) for event in events)
    assert events[-1].latency["table"] == pytest.approx(reached, abs=0.02)
    assert reached == pytest.approx(0.3, abs=0.08)


def test_uneven_widths_take_the_step_of_the_machine():
    """On a machine that rounds widths up to eights, a group that loses four of eight components saves nothing."""
    sizes = [16, 16]
    share = lambda keep: 1 - sum(-(-k // 8) * 8 for k in keep) / 32  # noqa: E731 - one line, used once
    curves = [[0.01 * removed for removed in range(16)], [0.02 * removed for removed in range(16)]]
    assert Global()(sizes, sizes, share, sparsity=0.25, steps=[1, 1], curves=curves, stepwise=True) == [8, 16]
    assert Uniform()(sizes, sizes, share, sparsity=0.5, steps=[1, 1], stepwise=True) == [8, 8]


def test_a_table_of_another_runtime_is_refused():
    _, _, _, _, tables = pruned("projected", Machine(fixed=0.05))
    with pytest.raises(ConfigError, match=r"the table was measured in eager, and runtime.serve=onnxruntime"):
        pruned("projected", Machine(), latency=timed(Machine(), measured=tables[-1], serve="onnxruntime"))


def test_time_in_another_runtime_is_measured_there():
    pytest.importorskip("onnxruntime")
    price = Latency(batch_size=1, rounds=1, max_seconds=0.1, serve="onnxruntime")
    _, model, _, events, tables = pruned("projected", None, latency=price, sparsity=0.0)
    assert tables[0].protocol["runtime"] == "onnxruntime" and tables[0].dense_ms > 0
    assert events[-1].latency.keys() == {"table", "predicted"}


def test_prices_say_what_they_count():
    assert Params().goal(0.4) == "40 % of parameters removed"
    assert MaxDrop(value=2.0, of="latency").goal(None) == "as little time as 2 points of agreement allow"
    assert MaxDrop(of="latency", serve="onnxruntime").price == Latency(serve="onnxruntime")
    with pytest.raises(ConfigError, match=r"target must be one of params, flops, components, got 'flop'; .*'flops'"):
        as_price("flop")
