"""Images from a network's own answers: what they promise, what is kept, and every error they can cause."""

import pytest
import torch
from torch import nn

from modhifi_cli.data import class_inversion, pixels, synthetic
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.files import cache
from modhifi_cli.records import Preprocess

PREPROCESS = Preprocess((8, 8), (0.45, 0.45, 0.45), (0.23, 0.23, 0.23))
QUICK = {"preprocess": PREPROCESS, "labelled": False, "together": 6, "num_samples": 12, "smoothness": 0.1, "lr": 0.1}


@pytest.fixture
def plain():
    """A network without any normalisation that answers every class somewhere."""
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(48, 5))
    with torch.no_grad():
        model[4].weight.mul_(8)
    return model.eval()


def making(model, **others) -> Making:
    return Making(model, "tiny", store=cache.open_store, **others)


def test_the_network_calls_the_images_what_was_wanted_and_is_not_changed(plain):
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    source = class_inversion.load(making=making(plain), classes=[1, 4], nats=0.5, steps=60, **QUICK)
    predicted = plain(next(source.batches(12))[0]).argmax(1)
    assert source.protocol["predicted_as_wanted"] == float((predicted == torch.tensor([1, 4] * 6)).float().mean()) > 0.8
    assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in plain.parameters())


def test_what_fits_into_memory_at_once_changes_nothing_but_rounding(plain):
    one = class_inversion.load(making=making(plain), steps=5, cache=None, **QUICK)
    few = class_inversion.load(making=making(plain), steps=5, cache=None, gigabytes=1e-5, **QUICK)
    assert abs(one.images.astype(int) - few.images.astype(int)).max() <= 1


def test_parts_are_kept_and_an_interrupted_set_ends_the_same(plain):
    def stop(step):
        if step.done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        class_inversion.load(making=making(plain, progress=stop), steps=5, **QUICK)
    steps = []
    resumed = class_inversion.load(making=making(plain, progress=steps.append), steps=5, **QUICK)
    assert len(steps) == 5 and steps[-1].done == steps[-1].total == 10
    whole = class_inversion.load(making=making(plain), steps=5, cache=None, **QUICK)
    assert (resumed.images == whole.images).all()


def test_unlearning_without_data_and_without_batchnorm_gets_samples_of_every_class(plain):
    told = []
    speaking = making(plain, note=told.append)
    settings = {"preprocess": PREPROCESS, "making": speaking, "num_samples": 4, "cache": None}
    source = synthetic.load(labelled=True, labels="auto", **settings)
    assert source.protocol["source"] == "class_inversion" and "its own answers" in told[0]
    assert synthetic.load(labelled=False, **settings).protocol["source"] == "procedural"


def test_a_part_too_small_for_all_classes_draws_among_them():
    few = pixels.wanted_classes(None, 1000, together=16, seed=0)
    assert sorted(few) == list(range(1000)) and max(few[:16]) > 500
    assert few != pixels.wanted_classes(None, 1000, together=16, seed=1)
    assert pixels.wanted_classes(None, 10, together=16, seed=0) == list(range(10))


@pytest.mark.parametrize(
    ("settings", "kind", "words"),
    [
        ({"steps": 0}, ConfigError, "data.steps: expected a whole number from 1, got 0."),
        ({"nats": -1}, ConfigError, "data.nats: expected a number from 0, got -1."),
        ({"lr": 0}, ConfigError, "data.lr: expected a number above 0, got 0."),
        ({"starts": "noise"}, ConfigError, "data.starts: unknown kind 'noise'"),
        ({"classes": [9]}, ConfigError, "data.classes: the network has 5 logits, so classes are 0 to 4; got 9."),
        ({"labels": "given", "labelled": True}, DataError, "data.labels=given: class_inversion images have no labels"),
        ({"smoothness": 1e38, "lr": 1e3}, NumericsError, "the optimisation diverged in part 1 .*lower data.lr"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_are_said_in_one_sentence(plain, settings, kind, words):
    with pytest.raises(kind, match=words):
        class_inversion.load(making=making(plain), cache=None, **{**QUICK, "steps": 4, **settings})


def test_a_network_that_is_no_classifier_is_told_so():
    with pytest.raises(UnsupportedModelError, match="data=class_inversion balances classes, which needs logits"):
        class_inversion.load(making=making(nn.Conv2d(3, 4, 3).eval()), cache=None, **QUICK)


def test_one_class_may_be_named_by_its_number_alone(plain):
    one, listed = (class_inversion.load(making=making(plain), classes=named, **QUICK) for named in (4, [4]))
    assert one.protocol["sha256"] == listed.protocol["sha256"]
