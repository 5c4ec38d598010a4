"""Agreement with the reference network: by hand, against torch's KL, and which images are used."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from modhifi_cli.errors import NumericsError, UnsupportedModelError
from modhifi_cli.evaluation import agreement


def _by_name(measurements):
    return {m.name: m for m in measurements}


def test_a_network_agrees_wholly_with_itself(listed, answers, measured):
    source = listed(torch.randn(9, 1, 2, 4))

    result = _by_name(
        measured(agreement.measure, models={"dense": answers(), "pruned": answers()}, calibration_data=source)
    )

    assert result["agreement"].value == 100
    assert result["kl"].value == 0
    assert {m.model for m in result.values()} == {"pruned"}


def test_shift_of_all_logits_changes_nothing(listed, answers, measured):
    source = listed(torch.randn(9, 1, 2, 4))

    result = _by_name(
        measured(agreement.measure, models={"dense": answers(), "pruned": answers(1, 7)}, calibration_data=source)
    )

    assert result["agreement"].value == 100
    # The images are float32: adding 7 rounds the logits by up to 5e-7, and KL is quadratic in that.
    assert result["kl"].value < 1e-10


def test_values_equal_a_loop_with_torchs_divergence(listed, answers, measured):
    images = torch.randn(11, 1, 2, 4, generator=torch.Generator().manual_seed(3))
    p, q = images.flatten(1).double(), -0.5 * images.flatten(1).double()
    expected = sum(
        float(functional.kl_div(b.log_softmax(0), a.softmax(0), reduction="sum")) for a, b in zip(p, q, strict=True)
    )
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))

    result = _by_name(
        measured(
            agreement.measure, models={"dense": answers(), "pruned": answers(-0.5)}, calibration_data=listed(images)
        )
    )

    assert result["kl"].value == pytest.approx(expected / 11, rel=1e-6)
    assert result["kl"].unit == "nats"
    assert result["agreement"].value == pytest.approx(100 * same / 11)
    assert result["agreement"].protocol["same"] == same


def test_divergence_is_taken_from_the_reference():
    reference, other = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 0.0]]).double()
    p = 1 / (1 + math.exp(-2))

    value = agreement.kl_divergence(reference, other)

    assert float(value) == pytest.approx(p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))


def test_held_out_images_come_before_calibration_images(listed, answers, measured):
    held_out, seen = listed(torch.randn(2, 1, 2, 4)), listed(torch.randn(5, 1, 2, 4))
    models = {"dense": answers(), "pruned": answers(2)}

    both = measured(agreement.measure, models=models, evaluation_data=held_out, calibration_data=seen)
    alone = measured(agreement.measure, models=models, calibration_data=seen)

    assert (both[0].protocol["samples"], both[0].protocol["held_out"]) == (2, True)
    assert (alone[0].protocol["samples"], alone[0].protocol["held_out"]) == (5, False)


def test_nothing_to_compare_gives_no_number(listed, answers, measured):
    source = listed(torch.randn(2, 1, 2, 4))

    assert measured(agreement.measure, models={"dense": answers()}, evaluation_data=source) == ()
    assert measured(agreement.measure, models={"dense": answers(), "pruned": answers()}) == ()


def test_other_classes_are_refused(listed, answers, measured):
    models = {"dense": answers(), "pruned": nn.Sequential(nn.Flatten(), nn.Linear(8, 3))}

    with pytest.raises(UnsupportedModelError, match=r"as many classes as 'dense' has \(8\), got 3; compare networks"):
        measured(agreement.measure, models=models, evaluation_data=listed(torch.randn(2, 1, 2, 4)))


def test_not_finite_edited_network_is_named(listed, answers, measured):
    models = {"dense": answers(), "pruned": answers(scale=float("nan"))}

    with pytest.raises(NumericsError, match=r"pruned: expected finite logits while measuring agreement"):
        measured(agreement.measure, models=models, calibration_data=listed(torch.randn(2, 1, 2, 4)))
