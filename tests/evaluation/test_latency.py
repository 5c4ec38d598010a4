"""Latency: which network is slower, interleaving, time limit, and every parameter out of range.

Real times are not compared with anything: a shared machine may stop a process at any moment. The clock is replaced.
"""

import statistics

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation import latency


class Clock:
    """A clock that only moves when a network runs."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Takes(nn.Module):
    """A network that takes the given seconds, one after the other, and writes its runs down."""

    def __init__(self, clock, log, name, *seconds):
        super().__init__()
        self.clock, self.log, self.name, self.seconds, self.runs = clock, log, name, seconds, 0

    def forward(self, images):
        self.log.append((self.name, len(images)))
        self.clock.now += self.seconds[self.runs % len(self.seconds)]
        self.runs += 1
        return images.flatten(1)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(latency, "time", clock)
    return clock


def _values(measurements):
    return {(m.model, m.name): m.value for m in measurements}


def test_mean_median_spread_and_speedup_are_those_of_the_rounds(clock, measured):
    slow, fast = (0.4, 0.5, 0.9, 0.4, 0.3), (0.2, 0.2, 0.3, 0.1, 0.2)
    models = {"dense": Takes(clock, [], "dense", *slow), "pruned": Takes(clock, [], "pruned", *fast)}

    result = measured(latency.measure, models=models, iterations=5, warmup=0, max_seconds=100)

    values = _values(result)
    assert values["dense", "latency_ms"] == pytest.approx(1000 * statistics.mean(slow))
    assert values["dense", "latency_median_ms"] == pytest.approx(1000 * statistics.median(slow))
    assert values["pruned", "speedup"] == pytest.approx(statistics.median(slow) / statistics.median(fast))
    assert ("dense", "speedup") not in values
    protocol = next(m.protocol for m in result if (m.model, m.name) == ("dense", "latency_ms"))
    assert (protocol["iterations"], protocol["batch"], protocol["minimum_ms"]) == (5, 64, pytest.approx(300))
    assert protocol["p10_ms"] == pytest.approx(340) and protocol["p90_ms"] == pytest.approx(740)
    ratio = next(m.protocol for m in result if m.name == "speedup")
    assert ratio["ratio_of_means"] == pytest.approx(statistics.mean(slow) / statistics.mean(fast))


def test_every_round_times_each_network_once_in_turning_order(clock, measured):
    log = []
    models = {name: Takes(clock, log, name, 0.1) for name in ("dense", "pruned")}

    measured(latency.measure, models=models, iterations=4, warmup=1, max_seconds=100, cpu_batch=3)

    names = [name for name, _ in log]
    assert names == ["dense", "pruned"] * 2 + ["pruned", "dense"] + ["dense", "pruned"] + ["pruned", "dense"]
    assert {images for _, images in log} == {3}


def test_a_slow_machine_stops_at_the_time_limit(clock, measured):
    models = {"dense": Takes(clock, [], "dense", 1.0), "pruned": Takes(clock, [], "pruned", 1.0)}

    result = measured(latency.measure, models=models, iterations=100, warmup=10, max_seconds=20)

    assert (result[0].protocol["warmup"], result[0].protocol["iterations"]) == (5, 5)


def test_a_very_slow_machine_still_gets_the_least_number_of_rounds(clock, measured):
    result = measured(latency.measure, models={"dense": Takes(clock, [], "dense", 60.0)}, max_seconds=20)

    assert (result[0].protocol["warmup"], result[0].protocol["iterations"]) == (1, 3)


def test_real_networks_give_positive_times_and_keep_their_mode(measured, tiny_convnet):
    tiny_convnet.train()

    result = measured(
        latency.measure,
        models={"dense": tiny_convnet},
        example=torch.zeros(1, 3, 8, 8),
        iterations=2,
        warmup=1,
        cpu_batch=2,
    )

    assert [m.name for m in result] == ["latency_ms", "latency_median_ms"]
    assert all(m.value > 0 and m.unit == "ms" for m in result)
    assert result[0].protocol["device"] and result[0].protocol["threads"] >= 1
    assert result[0].protocol["cores"] >= 1 and result[0].protocol["load_average"] >= 0
    assert tiny_convnet.training


def test_traced_network_can_be_timed(measured, tiny_convnet):
    result = measured(
        latency.measure,
        models={"dense": tiny_convnet},
        example=torch.zeros(1, 3, 8, 8),
        iterations=1,
        warmup=0,
        cpu_batch=2,
        compile="jit",
    )

    assert result[0].protocol["compile"] == "jit"


def test_failing_compiler_names_the_way_out(monkeypatch, measured, tiny_convnet):
    def fail(model, **_):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", fail)

    with pytest.raises(ConfigError, match=r"compile=compile to work for 'dense', got RuntimeError \(no C\+\+ compiler"):
        measured(latency.measure, models={"dense": tiny_convnet}, compile="compile", example=torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("compile", ["none", "compile"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["accelerator", "cpu"],
)
def test_batch_that_does_not_fit_into_memory_names_the_key(measured, monkeypatch, error, compile):
    class Large(nn.Module):
        def forward(self, images):
            raise error

    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    with pytest.raises(ConfigError, match=r"expected 64 images to fit .*set evaluation.latency.cpu_batch to fewer"):
        measured(latency.measure, models={"dense": Large()}, compile=compile)


def test_defect_inside_a_network_keeps_its_own_error(measured):
    class Broken(nn.Module):
        def forward(self, images):
            raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measured(latency.measure, models={"dense": Broken()})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"iterations": 0}, r"evaluation.latency.iterations: expected a whole number of at least 1, got 0"),
        ({"cpu_batch": 1.5}, r"evaluation.latency.cpu_batch: expected a whole number of at least 1, got 1.5"),
        ({"gpu_batch": True}, r"evaluation.latency.gpu_batch: expected a whole number of at least 1, got True"),
        ({"warmup": -1}, r"evaluation.latency.warmup: expected a whole number of at least 0, got -1"),
        ({"max_seconds": 0}, r"evaluation.latency.max_seconds: expected a number above 0, got 0"),
        ({"compile": "compiled"}, r"evaluation.latency.compile: expected none, compile or jit, .*mean 'compile'"),
    ],
)
def test_setting_out_of_range_is_refused(measured, tiny_convnet, setting, words):
    with pytest.raises(ConfigError, match=words):
        measured(latency.measure, models={"dense": tiny_convnet}, **setting)


def test_nothing_to_time_gives_no_number(measured):
    assert measured(latency.measure) == ()
