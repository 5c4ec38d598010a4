"""The latency table on machines whose time is known: it must predict networks that it has not seen."""

import dataclasses
import json
import time

import numpy as np
import pytest
import torch

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation import latency_probe
from modhifi_cli.evaluation.latency_probe import Saved, Timing, fit, measure_table, narrowed, saved_share, widths_of
from modhifi_cli.evaluation.latency_table import LatencyTable, LayerTimes, monotone
from modhifi_cli.evaluation.runtimes import clocks
from modhifi_cli.graph.counting import LayerWidths, independent_inputs, output_size
from modhifi_cli.graph.law import randomise_
from modhifi_cli.records import Progress
from tests.card import pretend
from tests.graph import networks, transformers
from tests.machines import Machine


def table_of(model, machine, example, **settings):
    _, groups, _ = discover(model, example)
    settings = {"batch": 2, "rounds": 1, "max_seconds": 1e9, "stopwatch": machine, **settings}
    *steps, table = measure_table(model, example[:1], groups, Timing(**settings))
    assert all(isinstance(step, Progress) for step in steps)
    return groups, table


def drawn_widths(groups, count, seed=0):
    generator = np.random.default_rng(seed)
    return [[int(generator.integers(1, group.components + 1)) for group in groups] for _ in range(count)]


@pytest.mark.parametrize("name", ["projected", "grouped", "concatenated"])
def test_a_table_predicts_networks_it_has_not_seen(name):
    model, example = networks.small(name)
    randomise_(model)
    machine = Machine(fixed=0.02)
    groups, table = table_of(model, machine, example)
    images = torch.randn(2, *example.shape[1:])
    for keep in drawn_widths(groups, 6):
        network = narrowed(model, groups, keep)
        assert network(images).shape == model(images).shape
        predicted = table.removed_share(widths_of(LayerWidths(model, groups), keep))
        assert predicted == pytest.approx(machine.share(model, network, images), abs=0.03)
    assert table.removed_share({}) == pytest.approx(0, abs=1e-9)


def test_widths_are_those_of_the_narrowed_network():
    model, example = networks.small("grouped")
    _, groups, _ = discover(model, example)
    for keep in drawn_widths(groups, 4):
        network = narrowed(model, groups, keep)
        for name, pair in widths_of(LayerWidths(model, groups), keep).items():
            layer = network.get_submodule(name)
            paired = independent_inputs(model.get_submodule(name)) == 1  # inputs go with outputs
            assert pair == (1 if paired else independent_inputs(layer), output_size(layer))


def test_steps_of_the_machine_are_found_by_halving_the_widest_jumps():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 40, 3), torch.nn.Conv2d(40, 40, 3), torch.nn.Flatten(), torch.nn.Linear(640, 5)
    ).eval()
    example = torch.randn(2, 3, 8, 8)
    machine = Machine(tile=16, fixed=0.01)
    groups, table = table_of(model, machine, example)
    kind = table.kinds[table.layers["1"]]
    assert {16, 17, 32, 33} <= set(kind.inputs) and {16, 17, 32, 33} <= set(kind.outputs)
    images = torch.randn(2, *example.shape[1:])
    for keep in ([33, 33], [32, 32], [17, 40], [16, 16], [20, 9]):
        predicted = table.removed_share(widths_of(LayerWidths(model, groups), keep))
        truth = machine.share(model, narrowed(model, groups, keep), images)
        assert predicted == pytest.approx(truth, abs=0.02), keep


def test_what_lies_between_the_layers_is_fitted_to_whole_networks():
    model, example = networks.small("projected")
    machine = Machine(fixed=0.5, per_element=1e-4)
    groups, table = table_of(model, machine, example)
    assert table.scale == pytest.approx(1, rel=0.1)
    assert table.protocol["largest_misfit"] < 0.01
    assert table.per_element_ms > 0 and 0.4 < table.fixed_ms < table.dense_ms
    images = torch.randn(2, *example.shape[1:])
    for keep in drawn_widths(groups, 4):
        predicted = table.removed_share(widths_of(LayerWidths(model, groups), keep))
        assert predicted == pytest.approx(machine.share(model, narrowed(model, groups, keep), images), abs=0.02)


def test_the_time_bound_leaves_the_coarse_grid_and_three_rounds_of_networks():
    model, example = networks.small("projected")
    ticks = iter(range(10**6))
    _, table = table_of(model, Machine(), example, rounds=50, max_seconds=5, now=lambda: float(next(ticks)))
    assert table.protocol["layer_rounds"] == 1 and table.protocol["network_rounds"] == 3
    assert all(len(times.outputs) <= 4 for times in table.kinds.values())


def test_a_batch_that_does_not_fit_is_one_sentence():
    model, example = networks.small("projected")

    def full(module, images):
        raise torch.OutOfMemoryError("no room")

    with pytest.raises(ConfigError, match=r"a forward pass of 2 images does not fit .* set target.batch_size to fewer"):
        table_of(model, full, example)


@pytest.mark.parametrize("seed", range(5))
def test_smoothed_times_never_fall_and_keep_what_was_in_order(seed):
    noisy = np.random.default_rng(seed).random((5, 7)) + np.add.outer(np.arange(5), np.arange(7)) * 0.1
    smooth = monotone(noisy)
    assert (np.diff(smooth, axis=0) >= 0).all() and (np.diff(smooth, axis=1) >= 0).all()
    assert np.allclose(monotone(smooth), smooth)
    line = noisy[:1]
    assert monotone(line).mean() == pytest.approx(line.mean())  # pooling averages, it does not lift


def test_between_the_measured_widths_times_are_bilinear_and_every_channel_is_worth_something():
    times = LayerTimes((2, 4), (10, 20, 30), ((1.0, 2.0, 4.0), (3.0, 5.0, 9.0)))
    assert times.at(3, 15) == pytest.approx((1 + 2 + 3 + 5) / 4)
    assert times.at(4, 30) == 9 and times.at(1, 5) == 1 and times.at(9, 99) == 9
    flat = LayerTimes.smoothed((1, 8), (1, 8), np.full((2, 2), 3.0))
    assert flat.at(8, 8) == pytest.approx(3) and flat.at(8, 7) < flat.at(8, 8) and flat.at(7, 8) < flat.at(8, 8)


def test_the_fit_has_no_negative_part_and_meets_the_dense_network():
    layers, elements = np.array([10.0, 6.0, 3.0]), np.array([100.0, 80.0, 50.0])
    for times in ([12.0, 9.0, 7.0], [5.0, 1.0, 0.1], [3.0, 4.0, 5.0], [20.0, 19.0, 17.0]):
        scale, per_element, fixed = fit(layers, elements, np.array(times))
        assert min(scale, per_element, fixed) >= 0
        assert scale * 10 + per_element * 100 + fixed == pytest.approx(times[0])
    exact = 2 * layers + 0.01 * elements + 3
    assert fit(layers, elements, exact) == pytest.approx((2, 0.01, 3))


def test_a_table_survives_its_file_and_a_damaged_file_is_named():
    model, example = networks.small("projected")
    _, table = table_of(model, Machine(), example)
    table = dataclasses.replace(table, aims={"0.4 x": (0.41, -0.01)})
    content = json.loads(json.dumps(table.to_json()))
    assert LatencyTable.from_json(content, "here") == table
    del content["kinds"]
    with pytest.raises(DataError, match=r"here: not a latency table .*; give the latency_table.json of a run"):
        LatencyTable.from_json(content, "here")


def test_two_networks_are_timed_side_by_side_in_turning_order():
    model, example = networks.small("projected")
    _, groups, _ = discover(model, example)
    narrow = narrowed(model, groups, [2] * len(groups))
    order = []

    def watch(module, images):
        order.append(module is model)
        return 4.0 if module is model else 3.0

    *_, saved = saved_share(model, narrow, example[:1], batch=2, rounds=4, max_seconds=1e9, stopwatch=watch)
    assert saved == Saved(0.25, 0.25, 0.25, 4)
    assert order[2:] == [True, False, False, True] * 2


def test_the_stopwatch_follows_the_processor_where_one_thread_does_the_work():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert latency_probe.clock_name(torch.device("cpu"), 1) == "processor"
        torch.set_num_threads(2)
        assert latency_probe.clock_name(torch.device("cpu"), 2) == "wall"
        assert latency_probe.stopwatch(torch.nn.Identity(), torch.zeros(1)) >= 0
    finally:
        torch.set_num_threads(before)


def test_a_table_of_a_transformer_times_its_projections_and_knows_what_fewer_heads_save():
    model, example = transformers.build("torchvision_vit"), transformers.images("torchvision_vit")
    machine = Machine(fixed=0.02)
    groups, table = table_of(model, machine, example)
    assert {name.rpartition(".")[2] for name in table.layers} == {"out_proj", "0", "3"}
    images = torch.randn(2, *example.shape[1:])
    for keep in ([2, 30, 3, 48], [1, 48, 1, 20]):
        predicted = table.removed_share(widths_of(LayerWidths(model, groups), keep))
        truth = machine.share(model, narrowed(model, groups, keep), images)
        assert predicted == pytest.approx(truth, abs=0.1)


def test_on_a_card_its_own_events_are_the_clock_and_the_protocol_names_its_rate():
    with pretend.card() as seen:
        before = seen.synchronised
        took = clocks.milliseconds(lambda: time.sleep(0.01), torch.device("cuda"), 1)
        assert 10 <= took < 5000 and seen.synchronised == before + 2  # what was queued before, and the second event
        assert clocks.clock_name(torch.device("cuda"), 1) == "card"
        assert clocks.card_clocks(torch.device("cuda")) == {"clock_mhz": 1980}
    assert clocks.card_clocks(torch.device("cpu")) == {}


def test_a_driver_that_does_not_tell_its_clock_ends_no_measurement(monkeypatch):
    def silent(*_):
        raise Exception("Not Supported")  # as the driver's own library says it

    with pretend.card():
        monkeypatch.setattr(torch.cuda, "clock_rate", silent)
        assert clocks.card_clocks(torch.device("cuda")) == {}
