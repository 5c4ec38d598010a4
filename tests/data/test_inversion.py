import os

import pytest
import torch
from torch import nn

from modhifi_cli.data import inversion, pixels, procedural
from modhifi_cli.data.making import Making
from modhifi_cli.data.sources import normalise
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.files import cache
from modhifi_cli.records import Preprocess

PREPROCESS = Preprocess((8, 8), (0.45, 0.45, 0.45), (0.23, 0.23, 0.23))
QUICK = {"preprocess": PREPROCESS, "labelled": False, "together": 12, "steps": 15, "lr": 0.05}


@pytest.fixture
def trained(tiny_convnet):
    """The tiny network with the statistics of images that it was not given: fractal ones, another seed."""
    images = normalise(procedural.draw(64, PREPROCESS, kind="fractal", seed=9) // 2 + 60, PREPROCESS)
    for module in tiny_convnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    tiny_convnet.train()(images)
    return tiny_convnet.eval()


def making(model, **others) -> Making:
    return Making(model, "tiny", store=cache.open_store, **others)


def plain_distance(model, images) -> float:
    """The same distance by torch's own mean and variance over the whole set at once, float64."""
    found, kept = [], []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    handles = [m.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0].double())) for m in norms]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for norm, maps in zip(norms, kept, strict=True):
        mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
        stored = norm.running_var.double() + norm.eps
        off = ((mean - norm.running_mean) ** 2 / stored).mean()
        found.append(float(off + 0.25 * (((variance + norm.eps) / stored).log() ** 2).mean()))
    return sum(found) / len(found)


@pytest.mark.parametrize("gigabytes", [2.0, 1e-4], ids=["one forward", "five forwards"])
def test_inverted_images_match_the_stored_statistics_far_better_than_their_starts(trained, gigabytes):
    source = inversion.load(making=making(trained), num_samples=12, class_weight=0.0, gigabytes=gigabytes, **QUICK)
    before = plain_distance(trained, normalise(procedural.draw(12, PREPROCESS, kind="mixture", seed=0), PREPROCESS))
    after = plain_distance(trained, next(source.batches(12))[0])
    assert source.protocol["distance_before"] == pytest.approx(before, rel=1e-3)
    assert source.protocol["distance_after"] == pytest.approx(after, rel=1e-3)
    assert after < 0.4 * before


def test_the_wanted_classes_come_out_and_only_the_pixels_have_moved(trained):
    state = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    source = inversion.load(
        making=making(trained), num_samples=12, classes=[1, 4], class_weight=1.0, **QUICK | {"steps": 40}
    )
    predicted = trained(next(source.batches(12))[0]).argmax(1)
    assert source.protocol["predicted_as_wanted"] > 0.7
    assert set(predicted.tolist()) <= {1, 4}
    assert all(torch.equal(tensor, state[key]) for key, tensor in trained.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trained.parameters())
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_images_are_pulled_towards_classes_only_where_classes_matter(trained):
    def weight(labelled=False, **settings):
        source = inversion.load(making=making(trained), num_samples=4, labelled=labelled, **others | settings)
        assert ("predicted_as_wanted" in source.protocol) == (source.protocol["settings"]["class_weight"] > 0)
        return source.protocol["settings"]["class_weight"]

    others = {key: value for key, value in QUICK.items() if key != "labelled"} | {"steps": 1, "cache": None}
    assert weight() == 0
    assert weight(labelled=True, labels="model") == weight(classes=[1, 4]) == 0.01
    assert weight(labelled=True, labels="model", class_weight=0) == 0 and weight(class_weight=0.5) == 0.5


def test_only_confident_images_pass_the_filter(trained):
    settings = QUICK | {"steps": 40, "num_samples": 6, "class_weight": 1.0}
    source = inversion.load(making=making(trained), confidence=0.5, **settings)
    sure = trained(next(source.batches(6))[0]).softmax(1).amax(1)
    assert len(source) == 6 and float(sure.min()) >= 0.5
    with pytest.raises(DataError, match="data.confidence=0.999999: only .* images made are called their class"):
        inversion.load(making=making(trained), confidence=0.999999, cache=None, **QUICK | {"steps": 1})


def test_the_same_network_and_settings_never_pay_twice(trained):
    steps = []
    counting = making(trained, progress=steps.append)
    first = inversion.load(making=counting, num_samples=12, **QUICK)
    assert len(steps) == 15
    again = inversion.load(making=counting, num_samples=7, **QUICK)
    assert len(steps) == 15 and len(again) == 7
    more = inversion.load(making=counting, num_samples=20, **QUICK)
    assert len(steps) == 30, "the first part is not made again"
    assert (more.images[:12] == first.images).all() and (again.images == first.images[:7]).all()
    with torch.no_grad():
        trained[0].weight.add_(0.01)
    inversion.load(making=counting, num_samples=12, **QUICK)
    assert len(steps) == 45, "another network is another set"


def test_an_interrupted_set_keeps_its_finished_parts_and_ends_the_same(trained):
    def stop(step):
        if step.done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        inversion.load(making=making(trained, progress=stop), num_samples=24, **QUICK)
    assert not any(module._forward_pre_hooks for module in trained.modules())
    steps = []
    resumed = inversion.load(making=making(trained, progress=steps.append), num_samples=24, **QUICK)
    assert len(steps) == 15
    whole = inversion.load(making=making(trained), num_samples=24, cache=None, **QUICK)
    assert (resumed.images == whole.images).all()


def test_the_cache_tells_its_size_and_can_be_emptied(trained, tmp_path):
    inversion.load(making=making(trained), num_samples=12, cache=str(tmp_path), **QUICK)
    (tmp_path / "not ours").mkdir()
    (one,) = cache.held(str(tmp_path))
    on_disk = sum(file.stat().st_size for file in one.folder.iterdir())
    assert (one.network, one.method, one.samples, one.bytes) == ("tiny", "inversion", 12, on_disk)
    assert cache.clean(str(tmp_path)) == on_disk
    assert [path.name for path in tmp_path.iterdir()] == ["not ours"]
    assert cache.directory() == cache.Path(os.environ["XDG_CACHE_HOME"]) / "modhifi" / "synthetic"


@pytest.mark.parametrize("harm", ["truncated", "no json", "no part"])
def test_a_damaged_cache_is_said_in_one_sentence(trained, tmp_path, harm):
    inversion.load(making=making(trained), num_samples=12, cache=str(tmp_path), **QUICK)
    (folder,) = tmp_path.iterdir()
    part = folder / "part_0000.safetensors"
    if harm == "truncated":
        part.write_bytes(part.read_bytes()[:-9])
    elif harm == "no json":
        (folder / "manifest.json").write_text("{")
    else:
        part.unlink()
    with pytest.raises(DataError, match="the cache is damaged .*modhifi synthesize cache=clean, or give another with"):
        inversion.load(making=making(trained), num_samples=12, cache=str(tmp_path), **QUICK)


def test_a_cache_that_cannot_be_written_is_said_in_one_sentence(trained, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        DataError, match=r"cannot be written \(Not a directory\); give another cache with data.cache=FOLDER"
    ):
        inversion.load(making=making(trained), num_samples=12, cache=str(tmp_path / "file"), **QUICK)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.norm.running_mean += 1

    def forward(self, left, right):
        return self.norm(left + right).mean((2, 3))


class Folded(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(5))


def without_logits():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    model[1].running_mean += 1
    return model


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (
            lambda: nn.Conv2d(3, 4, 3),
            "matches the statistics of BatchNorm layers, and this network has none; data=proc",
        ),
        (Folded, "those of this network say nothing .*folded or untrained.*; data=procedural needs no statistics"),
        (TwoInputs, "makes one image tensor of .*and this network does not take that .*single image input"),
        (without_logits, r"balances classes, which needs logits of shape \[images, classes\], got \[2, 4, 6, 6\]"),
    ],
    ids=["no BatchNorm", "folded", "two inputs", "no logits"],
)
def test_networks_that_inversion_does_not_suit_are_told_what_does(network, words):
    with pytest.raises(UnsupportedModelError, match=words):
        inversion.load(making=making(network().eval()), **QUICK)


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"classes": [2, 5]}, ConfigError, "data.classes: the network has 5 logits, so classes are 0 to 4; got 5."),
        ({"classes": []}, ConfigError, "data.classes: expected a list of class numbers"),
        ({"confidence": 1.0}, ConfigError, "data.confidence: expected a probability with 0 <= confidence < 1, got 1.0"),
        ({"lr": 0}, ConfigError, "data.lr: expected a number above 0, got 0."),
        ({"steps": 0}, ConfigError, "data.steps: expected a whole number from 1, got 0."),
        ({"starts": "noise"}, ConfigError, "data.starts: unknown kind 'noise'"),
        ({"labels": "given", "labelled": True}, DataError, "data.labels=given: inversion images have no labels"),
        ({"lr": 100.0}, NumericsError, "the optimisation diverged in part 1 .*lower data.lr"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_out_of_range_are_said_in_one_sentence(trained, settings, kind, words):
    with pytest.raises(kind, match=words):
        inversion.load(making=making(trained), **QUICK | settings)


def test_networks_that_are_not_square_can_be_inverted(trained):
    wide = Preprocess((8, 14), PREPROCESS.mean, PREPROCESS.std)
    source = inversion.load(making=making(trained), num_samples=4, **QUICK | {"preprocess": wide, "steps": 2})
    assert source.images.shape == (4, 8, 14, 3)


def test_a_long_wait_is_told_beforehand(trained, monkeypatch):
    monkeypatch.setattr(pixels, "_LONG", 0)
    told = []
    inversion.load(making=making(trained, note=told.append), num_samples=12, cache=None, **QUICK)
    assert len(told) == 1 and "parts of 12 images are kept once they are whole; data=procedural takes seconds" in told[0]
