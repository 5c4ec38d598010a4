"""Directions of the forgotten classes alone: what the projection keeps exactly, and what it takes."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.prototypes import forget_directions, without_directions


def drawn(forget=1, retain=5, features=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(forget, features, generator=generator), torch.randn(retain, features, generator=generator)


@pytest.mark.parametrize("forget", [1, 3])
@pytest.mark.parametrize("strength", [0.3, 1.0, 2.0])
def test_mean_outputs_of_retain_classes_stay_and_those_of_forget_classes_lose_their_own_part(forget, strength):
    lost, kept = drawn(forget)
    weight = torch.randn(7, 16, generator=torch.Generator().manual_seed(1)).double()
    directions = forget_directions(lost, kept)
    edited = without_directions(weight, directions, strength)
    assert directions.shape == (16, forget)
    assert torch.allclose(edited @ kept.T.double(), weight @ kept.T.double(), rtol=0, atol=1e-12)
    # Written another way: the residual of a least-squares fit of the forget prototype by the retain prototypes.
    fit = torch.linalg.lstsq(kept.T.double(), lost.T.double()).solution
    own = lost.T.double() - kept.T.double() @ fit
    assert torch.allclose(edited @ lost.T.double(), weight @ (lost.T.double() - strength * own), rtol=0, atol=1e-10)


def test_two_forget_classes_that_are_alike_give_one_direction():
    lost, kept = drawn(1)
    assert forget_directions(torch.cat([lost, 2 * lost]), kept).shape == (16, 1)


def test_nothing_is_left_where_the_retain_prototypes_span_everything():
    lost, kept = drawn(1, retain=20)
    directions = forget_directions(lost, kept)
    weight = torch.randn(3, 16).double()
    assert directions.shape == (16, 0) and torch.equal(without_directions(weight, directions, 1.0), weight)


def test_a_prototype_that_is_not_finite_is_named_with_its_layer():
    lost, kept = drawn()
    lost[0, 0] = torch.nan
    with pytest.raises(NumericsError, match="conv3: class prototypes must be finite"):
        forget_directions(lost, kept, name="conv3")
