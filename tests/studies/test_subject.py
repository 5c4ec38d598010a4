"""Which layers a study looks at, and what it says when that cannot be."""

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.numerics.scoring import Magnitude
from tests import reference
from tests.studies import helpers

EVERY = ("3.conv1", "3.conv2", "6")


def test_without_a_choice_the_layers_spread_over_the_depth(randomise_):
    about = helpers.subject(randomise_)
    assert about.eligible == EVERY, "the stem reads three channels, which says nothing"
    assert about.layers(2) == ("3.conv1", "6") and about.layers(None) == EVERY


def test_a_module_stands_for_the_layers_inside_it(randomise_):
    assert helpers.subject(randomise_, asked=("6", "3")).layers() == EVERY
    assert helpers.subject(randomise_, asked=("3.conv2",)).layers() == ("3.conv2",)


def test_an_unknown_layer_is_told_with_the_nearest(randomise_):
    with pytest.raises(ConfigError, match="layers: the network has no module '3.conv3'; did you mean '3.conv"):
        helpers.subject(randomise_, asked=("3.conv3",)).layers()


def test_a_module_without_layers_is_told(randomise_):
    with pytest.raises(ConfigError, match="layers: '3.bn1' holds no convolution or linear layer with at least 8"):
        helpers.subject(randomise_, asked=("3.bn1",)).layers()


def test_a_network_without_layers_is_refused(randomise_):
    tiny = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).double()
    with pytest.raises(UnsupportedModelError, match="has no convolution or linear layer with at least 8 inputs"):
        helpers.subject(randomise_, model=tiny).layers()


def test_a_score_that_reads_no_activations_is_refused(randomise_):
    about = helpers.subject(randomise_, steps={"scoring": Magnitude()})
    consumers, _ = helpers.finished(about.consumers(["6"]))
    with pytest.raises(ConfigError, match="scoring: Magnitude does not look at what a layer reads"):
        about.scores(consumers["6"])


def test_consumers_are_the_layers_own_inputs(randomise_):
    about = helpers.subject(randomise_, count=6)
    found, told = helpers.unchanged(about.model, lambda: helpers.finished(about.consumers(["3.conv1"], images=5)))
    consumer = found["3.conv1"]
    images = next(about.calibration.batches(5))[0]
    with torch.no_grad():
        rows = reference.patches(about.model[:3](images), (3, 3), padding=(1, 1))
    torch.testing.assert_close(consumer.statistics.second_moment, rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)
    assert consumer.components == 10 and consumer.centred and told == 1


def test_more_images_than_there_are_is_told(randomise_):
    about = helpers.subject(randomise_, count=6)
    with pytest.raises(DataError, match="7 images are asked for, there are 6; ask for fewer"):
        helpers.finished(about.consumers(["6"], images=7))


def test_quality_is_accuracy_with_labels_and_agreement_without(randomise_):
    about = helpers.subject(randomise_)
    value, _ = helpers.finished(about.quality(about.model))
    images, labels = next(about.evaluation.batches(30))
    with torch.no_grad():
        expected = (about.model(images).argmax(1) == labels).double().mean()
    assert value == pytest.approx(100 * float(expected)) and about.quality_label == "top-1 accuracy, %"
    alone = helpers.subject(randomise_, labelled=False)
    assert helpers.finished(alone.quality(alone.model))[0] == 100.0 and "agreement" in alone.quality_label
