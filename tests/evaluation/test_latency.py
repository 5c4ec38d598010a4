"""Latency: which network is slower, interleaving, time limit, and every parameter out of range.

Real times are not compared with anything: a shared machine may stop a process at any moment. The clock is replaced.
"""

import statistics

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError
from modhifi_cli.evaluation import latency
from modhifi_cli.evaluation.runtimes import clocks, names, process, runtime


class Clock:
    """A clock that only moves when a network runs."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Here(nn.Module):
    """A network that cannot be sent to another process, so that it is timed in this one."""

    def __reduce__(self):
        raise TypeError("stays here")


class Takes(Here):
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
    monkeypatch.setattr(process, "time", clock)
    monkeypatch.setattr(clocks, "clock", lambda name: clock.perf_counter)
    monkeypatch.setattr(process, "load_average", lambda: 0.0)
    return clock


def _values(measurements):
    return {(m.model, m.name): m.value for m in measurements}


def test_the_speedup_is_the_median_of_paired_rounds_with_its_interval(clock, measured):
    slow, fast = (0.4, 0.5, 0.9, 0.4, 0.3, 0.4, 0.4), (0.2, 0.2, 0.3, 0.1, 0.2, 0.2, 0.2)
    models = {"dense": Takes(clock, [], "dense", *slow), "pruned": Takes(clock, [], "pruned", *fast)}

    result = measured(latency.measure, models=models, iterations=7, warmup=0, max_seconds=100)

    values, ratios = _values(result), sorted(one / two for one, two in zip(slow, fast, strict=True))
    assert values["dense", "latency_ms"] == pytest.approx(1000 * statistics.median(slow))
    assert values["pruned", "speedup"] == pytest.approx(statistics.median(ratios))
    assert ("dense", "speedup") not in values and ("dense", "latency_median_ms") not in values
    protocol = next(m.protocol for m in result if (m.model, m.name) == ("dense", "latency_ms"))
    assert (protocol["iterations"], protocol["batch"], protocol["minimum_ms"]) == (7, 64, pytest.approx(300))
    assert protocol["mean_ms"] == pytest.approx(1000 * statistics.mean(slow))
    told = next(m.protocol for m in result if m.name == "speedup")
    assert (told["low"], told["high"]) == pytest.approx((ratios[0], ratios[-1]))
    assert told["told"] == f"2.00 × ({ratios[0]:.2f} to {ratios[-1]:.2f}), batch 64"


def test_an_interval_holds_the_median_of_most_draws():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn((400, 15), generator=generator, dtype=torch.float64)
    intervals = [latency.median_interval(draw) for draw in draws]
    assert sum(low <= 0 <= high for low, high in intervals) / 400 > 0.93
    assert all(low > draw.min() for draw, (low, _) in zip(draws, intervals, strict=True)), "narrower than all values"


@pytest.mark.parametrize(
    ("ratio", "low", "high", "rounds", "busy", "words"),
    [
        (1.5, 1.4, 1.6, 7, False, "1.50 × (1.40 to 1.60), batch 8"),
        (1.1, 0.8, 1.3, 20, False, "too noisy to tell: between 0.80 and 1.30 times"),
        (1.5, 1.4, 1.6, 3, False, "too noisy to tell: between 1.40 and 1.60 times"),
        (1.5, 1.4, 1.6, 20, True, "too noisy to tell: between 1.40 and 1.60 times"),
        (0.99, 0.99, 0.99, 1, False, "too noisy to tell: 0.99 times in one round, and 6 are needed"),
        (1.0, 0.98, 1.02, 20, False, "as fast as before: between 0.98 and 1.02 times, batch 8"),
        (0.6, 0.5, 0.7, 20, False, "0.60 × (0.50 to 0.70), batch 8"),
    ],
)
def test_a_figure_that_cannot_be_trusted_is_not_told_as_a_fact(ratio, low, high, rounds, busy, words):
    assert latency.told_speedup(ratio, low, high, rounds=rounds, batch=8, busy=busy) == words


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

    assert (result[0].protocol["warmup"], result[0].protocol["iterations"]) == (5, latency.FEWEST_ROUNDS)


def test_a_very_slow_machine_still_gets_the_least_number_of_rounds(clock, measured):
    result = measured(latency.measure, models={"dense": Takes(clock, [], "dense", 60.0)}, max_seconds=20)

    assert (result[0].protocol["warmup"], result[0].protocol["iterations"]) == (1, latency.FEWEST_ROUNDS)


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

    assert [m.name for m in result] == ["latency_ms"] and result[0].protocol["own_process"]
    assert all(m.value > 0 and m.unit == "ms" for m in result)
    assert result[0].protocol["device"] and result[0].protocol["threads"] >= 1
    assert result[0].protocol["cores"] >= 1 and result[0].protocol["load_average"] >= 0
    assert tiny_convnet.training


@pytest.mark.parametrize("name", ["jit", "onnxruntime", "openvino"])
def test_a_program_of_a_runtime_gives_the_networks_own_answers(name, tiny_convnet):
    if name != "jit":
        pytest.importorskip(name)
    images = torch.randn(2, 3, 8, 8)
    network = tiny_convnet.eval()
    answer = runtime(name).program(network, images, 1)()
    answer = answer if isinstance(answer, torch.Tensor) else torch.as_tensor(next(iter(_listed(answer))))
    with torch.no_grad():
        assert torch.allclose(answer, network(images), atol=1e-4)


def _listed(answer):
    return answer if isinstance(answer, list) else answer.values()


def test_several_runtimes_stand_side_by_side(measured, tiny_convnet):
    pytest.importorskip("onnxruntime")
    result = measured(
        latency.measure, models={"dense": tiny_convnet, "pruned": tiny_convnet}, example=torch.zeros(1, 3, 8, 8),
        iterations=1, warmup=0, cpu_batch=2, runtimes=["eager", "onnxruntime"], threads=1,
    )  # fmt: skip

    assert [(m.name, m.protocol["runtime"]) for m in result if m.model == "pruned"] == [
        ("latency_ms", "eager"), ("speedup", "eager"),
        ("latency_ms_onnxruntime", "onnxruntime"), ("speedup_onnxruntime", "onnxruntime"),
    ]  # fmt: skip
    assert all(m.protocol["clock"] == "processor" and m.protocol["own_process"] for m in result)


def test_a_runtime_that_is_not_installed_names_the_extra(monkeypatch, measured, tiny_convnet):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"runtimes=openvino needs the package .* pip install 'modhifi\[o.*\]'"):
        measured(latency.measure, models={"dense": tiny_convnet}, runtimes=["openvino"])


def test_a_runtime_of_the_cpu_is_refused_on_a_card():
    with pytest.raises(ConfigError, match=r"runtime.serve=onnxruntime is measured on a CPU only; set runtime.device=cpu"):
        runtime("onnxruntime", device_type="cuda")


class Asks(nn.Module):
    """A network with an operator that no exporter knows."""

    def forward(self, images):
        return torch.special.bessel_j0(images).flatten(1)


def test_an_operator_that_the_runtime_lacks_is_one_sentence(measured):
    pytest.importorskip("onnxruntime")
    with pytest.raises(UnsupportedModelError, match=r"the network cannot be written as ONNX \(.*\); choose another runtime"):
        measured(latency.measure, models={"dense": Asks()}, runtimes=["onnxruntime"], cpu_batch=2)


def test_failing_compiler_names_the_way_out(monkeypatch):
    def fail(model, **_):
        def run(images):
            raise RuntimeError("no C++ compiler\nand more")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(UnsupportedModelError, match=r"torch.compile cannot compile the network \(RuntimeError: no C\+\+ comp"):
        runtime("compile").program(nn.Identity(), torch.zeros(1), 1)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["accelerator", "cpu"],
)
def test_batch_that_does_not_fit_into_memory_names_the_key(measured, error):
    class Large(Here):
        def forward(self, images):
            raise error

    with pytest.raises(ConfigError, match=r"expected 64 images to fit .*set evaluation.latency.cpu_batch to fewer"):
        measured(latency.measure, models={"dense": Large()})


def test_every_runtime_is_found_by_its_file():
    assert names() == ("compile", "eager", "jit", "onnxruntime", "openvino")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"iterations": 0}, r"evaluation.latency.iterations: expected a whole number of at least 1, got 0"),
        ({"cpu_batch": 1.5}, r"evaluation.latency.cpu_batch: expected a whole number of at least 1, got 1.5"),
        ({"gpu_batch": True}, r"evaluation.latency.gpu_batch: expected a whole number of at least 1, got True"),
        ({"warmup": -1}, r"evaluation.latency.warmup: expected a whole number of at least 0, got -1"),
        ({"max_seconds": 0}, r"evaluation.latency.max_seconds: expected a number above 0, got 0"),
        ({"runtimes": ["compiled"]}, r"evaluation.latency.runtimes: there is no runtime 'compiled'; .*mean 'compile'"),
        ({"runtimes": "eager"}, r"evaluation.latency.runtimes: expected a list of runtimes such as"),
    ],
)
def test_setting_out_of_range_is_refused(measured, tiny_convnet, setting, words):
    with pytest.raises(ConfigError, match=words):
        measured(latency.measure, models={"dense": tiny_convnet}, **setting)


def test_nothing_to_time_gives_no_number(measured):
    assert measured(latency.measure) == ()
