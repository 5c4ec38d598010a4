"""Forget and retain accuracy: what is counted, and what is refused."""

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation.forget_retain import measure
from modhifi_cli.pages import terms


@pytest.fixture
def images(listed):
    logits = torch.tensor([[5.0, 0, 0], [0, 5, 0], [0, 5, 0], [0, 0, 5], [5, 0, 0], [5, 0, 0]]).view(6, 1, 1, 3)
    return listed(logits, torch.tensor([0, 1, 1, 2, 2, 1]))


def test_each_kind_is_counted_over_its_own_images(measured, answers, images):
    found = measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=1)
    assert [(m.name, m.value) for m in found] == [
        ("forget_accuracy", pytest.approx(200 / 3)), ("retain_accuracy", pytest.approx(200 / 3)),
    ]  # fmt: skip
    assert found[0].protocol["per_class"] == {0: 100.0, 1: pytest.approx(66.6667), 2: 50.0}
    assert found[0].protocol["samples"] == 3 and found[0].protocol["forget_class"] == [1]


def test_several_classes_are_forgotten_together(measured, answers, images):
    found = measured(measure, models={"a": answers(), "b": answers(-1)}, evaluation_data=images, forget_class=[0, 1])
    assert [(m.model, m.protocol["samples"]) for m in found] == [("a", 4), ("a", 2), ("b", 4), ("b", 2)]


def test_without_images_nothing_is_measured(measured, answers):
    assert measured(measure, models={"dense": answers()}, forget_class=1) == ()


def test_without_a_class_it_says_so(measured, answers, images):
    with pytest.raises(ConfigError, match="name the forgotten classes by number"):
        measured(measure, models={"dense": answers()}, evaluation_data=images)


@pytest.mark.parametrize("forget, kind", [([0, 1, 2], "retain"), (7, "forget")])
def test_both_kinds_must_be_among_the_images(measured, answers, images, forget, kind):
    with pytest.raises(DataError, match=f"needs images of {kind} classes, got none among 6"):
        measured(measure, models={"dense": answers()}, evaluation_data=images, forget_class=forget)


def test_images_without_labels_are_refused(measured, answers, listed):
    with pytest.raises(DataError, match="forget_retain needs a label for every image"):
        measured(measure, models={"dense": answers()}, evaluation_data=listed(torch.rand(4, 1, 1, 3)), forget_class=1)


def test_a_share_of_few_images_is_told_as_a_count(measured, answers, images):
    found = measured(measure, models={"dense": answers(), "edited": answers(-1)}, evaluation_data=images, forget_class=1)
    (forget, _) = terms.table(found)
    assert (forget.before, forget.after, forget.change) == ("2 of 3", "1 of 3", "")
