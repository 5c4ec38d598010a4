"""Readouts: a class that is there is found, nothing is found in noise, and both against slow re-implementations."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.readout import linear_probe, nearest_class_mean, recall

READOUTS = pytest.mark.parametrize("readout", [linear_probe, nearest_class_mean])


def clusters(per_class: int, seed: int, *, apart: float, classes: int = 4, features: int = 12):
    """Features around class centres that are `apart` standard deviations from zero; 0 is noise without classes."""
    centres = apart * torch.randn(classes, features, generator=torch.Generator().manual_seed(99))
    labels = torch.arange(classes).repeat_interleave(per_class)
    noise = torch.randn(len(labels), features, generator=torch.Generator().manual_seed(seed))
    return centres[labels] + noise, labels


@READOUTS
def test_a_readout_finds_a_class_that_is_there(readout):
    features, labels = clusters(40, 0, apart=2.0)
    asked, truth = clusters(100, 1, apart=2.0)
    found = recall(readout(features, labels, asked), truth)
    assert min(found.values()) > 0.95


@READOUTS
def test_a_readout_finds_nothing_in_noise(readout):
    features, labels = clusters(100, 0, apart=0.0)
    asked, truth = clusters(500, 1, apart=0.0)
    found = recall(readout(features, labels, asked), truth)
    balanced = sum(found.values()) / 4
    # Four standard errors of a share of 2,000 around the chance of four classes.
    assert abs(balanced - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5


@READOUTS
def test_a_readout_does_not_depend_on_the_units_of_a_feature(readout):
    features, labels = clusters(30, 0, apart=0.7)
    asked, _ = clusters(50, 1, apart=0.7)
    units = torch.logspace(-3, 3, features.shape[1])
    assert torch.equal(readout(features, labels, asked), readout(features * units + 5, labels, asked * units + 5))


def test_the_nearest_class_mean_is_that_of_a_loop():
    features, labels = clusters(15, 0, apart=0.5)
    asked, _ = clusters(20, 1, apart=0.5)
    mean, spread = features.double().mean(0), features.double().std(0, unbiased=False)
    means = {c: ((features.double() - mean) / spread)[labels == c].sum(0) / int((labels == c).sum()) for c in range(4)}
    expected = []
    for row in (asked.double() - mean) / spread:
        distances = {c: float(sum((row[i] - means[c][i]) ** 2 for i in range(len(row)))) for c in means}
        expected.append(min(distances, key=distances.get))
    assert nearest_class_mean(features, labels, asked).tolist() == expected


def test_a_probe_weighs_rare_classes_as_much_as_common_ones():
    features, labels = clusters(200, 0, apart=0.4)
    rare = torch.cat([torch.arange(20), torch.arange(200, 800)])  # 20 of class 0, 200 of the others
    asked, truth = clusters(300, 1, apart=0.4)
    found = recall(linear_probe(features[rare], labels[rare], asked), truth)
    assert found[0] > 0.5 * sum(found.values()) / 4


def test_dead_features_say_nothing():
    features, labels = clusters(30, 0, apart=2.0)
    asked, truth = clusters(50, 1, apart=2.0)
    dead, dead_asked = torch.zeros(len(features), 5), 1e-9 * torch.randn(len(asked), 5)
    found = nearest_class_mean(torch.cat([features, dead], 1), labels, torch.cat([asked, dead_asked], 1))
    assert torch.equal(found, nearest_class_mean(features, labels, asked))
    assert recall(nearest_class_mean(dead, labels, dead_asked), truth)[0] == 1.0  # all are given the lowest class


@READOUTS
def test_features_that_are_not_finite_are_refused(readout):
    features, labels = clusters(10, 0, apart=1.0)
    with pytest.raises(NumericsError, match="needs finite features, got NaN or infinity"):
        readout(features, labels, features.clone().fill_(torch.nan))
    with pytest.raises(NumericsError, match="at least two classes, got one"):
        readout(features[:10], labels[:10], features)
