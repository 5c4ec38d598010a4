"""Accuracy: counts by hand, ties, labels that do not fit, networks given back as they came."""

import pytest
import torch
from torch import nn

from modhifi_cli.errors import DataError, NumericsError, UnsupportedModelError
from modhifi_cli.evaluation import top1


def _value(measurements, model, name):
    return next(m.value for m in measurements if (m.model, m.name) == (model, name))



def test_counts_equal_a_loop_over_the_images(listed, answers, measured):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(17, 1, 2, 4, generator=generator)
    labels = torch.randint(0, 8, (17,), generator=generator)
    ranks = [
        sorted(range(8), key=lambda c: -float(image.flatten()[c])).index(int(label))
        for image, label in zip(images, labels, strict=True)
    ]

    result = measured(top1.measure, models={"dense": answers()}, evaluation_data=listed(images, labels))

    assert _value(result, "dense", "top1") == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 17)
    assert _value(result, "dense", "top5") == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 17)
    assert result[0].protocol["correct"] == sum(rank < 1 for rank in ranks)
    assert result[0].protocol["samples"] == 17
    assert result[0].unit == "%"


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_accuracy_does_not_depend_on_the_batch_size(listed, answers, measured, batch_size):
    generator = torch.Generator().manual_seed(2)
    images, labels = torch.randn(13, 1, 2, 4, generator=generator), torch.arange(13) % 8
    source = listed(images, labels)
    settings = {"models": {"dense": answers(), "pruned": answers(-1.0)}, "evaluation_data": source}

    values = [m.value for m in measured(top1.measure, **settings, batch_size=batch_size)]

    assert values == [m.value for m in measured(top1.measure, **settings, batch_size=3)]


def test_a_constant_network_is_right_only_where_the_label_is_its_first_class(listed, answers, measured):
    source = listed(torch.randn(8, 1, 2, 4), torch.arange(8))

    result = measured(top1.measure, models={"dense": answers(scale=0.0)}, evaluation_data=source)

    assert _value(result, "dense", "top1") == pytest.approx(100 / 8)
    assert _value(result, "dense", "top5") == pytest.approx(500 / 8)


def test_top5_is_left_out_for_five_classes(measured, listed, tiny_convnet):
    source = listed(torch.randn(4, 3, 8, 8), torch.arange(4))

    result = measured(top1.measure, models={"dense": tiny_convnet}, evaluation_data=source)

    assert [m.name for m in result] == ["top1"]


def test_nothing_is_measured_without_evaluation_data(listed, answers, measured):
    assert measured(top1.measure, models={"dense": answers()}, calibration_data=listed(torch.randn(2, 1, 2, 4))) == ()


def test_progress_counts_every_image(listed, answers, measured):
    source = listed(torch.randn(7, 1, 2, 4), torch.zeros(7, dtype=torch.int64))

    measured(top1.measure, models={"dense": answers()}, evaluation_data=source)

    assert [step.done for step in measured.progress] == [0, 3, 6, 7]
    assert {step.total for step in measured.progress} == {7}


def test_networks_come_back_in_the_mode_they_had(listed, measured, tiny_convnet):
    tiny_convnet.train()
    tiny_convnet[1].eval()
    before = {name: tensor.clone() for name, tensor in tiny_convnet.state_dict().items()}
    source = listed(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 9]))

    with pytest.raises(DataError):
        measured(top1.measure, models={"dense": tiny_convnet}, evaluation_data=source)

    assert tiny_convnet.training and tiny_convnet[4].training and not tiny_convnet[1].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_convnet.state_dict().items())
    assert not torch.is_inference_mode_enabled()


def test_images_are_cast_to_the_type_of_the_network(listed, answers, measured):
    source = listed(torch.randn(4, 1, 2, 4), torch.arange(4))

    assert measured(top1.measure, models={"dense": answers().double()}, evaluation_data=source)


def test_label_outside_of_the_classes_is_named(listed, answers, measured):
    source = listed(torch.randn(4, 1, 2, 4), torch.tensor([0, 1, 8, 2]))

    with pytest.raises(DataError, match=r"expected labels 0 to 7 for the 8 logits of 'dense', got 8; use data"):
        measured(top1.measure, models={"dense": answers()}, evaluation_data=source)


def test_images_without_labels_are_refused(listed, answers, measured):
    with pytest.raises(DataError, match=r"top1 needs a label for every image, got images without labels; give"):
        measured(top1.measure, models={"dense": answers()}, evaluation_data=listed(torch.randn(4, 1, 2, 4)))


def test_empty_source_is_refused(listed, answers, measured):
    with pytest.raises(DataError, match=r"evaluation_data: expected at least one image to measure top1 on, got none"):
        measured(top1.measure, models={"dense": answers()}, evaluation_data=listed(torch.randn(0, 1, 2, 4)))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_name_network_and_image(listed, answers, measured, poison):
    images = torch.randn(5, 1, 2, 4)
    images[4, 0, 0, 0] = poison
    source = listed(images, torch.zeros(5, dtype=torch.int64))

    with pytest.raises(NumericsError, match=r"pruned: .*NaN or infinity for 1 of 2 images \(the first is image 4 of"):
        measured(top1.measure, models={"pruned": answers()}, evaluation_data=source)


def test_a_network_without_logits_is_refused(listed, measured):
    source = listed(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))

    with pytest.raises(UnsupportedModelError, match=r"needs logits of shape \[2, classes\] .*got \[2, 3, 8, 8\]"):
        measured(top1.measure, models={"dense": nn.Identity()}, evaluation_data=source)
