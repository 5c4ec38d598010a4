"""Membership attacks: at chance where nothing can be known, right where everything can; a slow count of the area."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.membership import area_under_curve, confidence_attack


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_confidence_attack_is_at_chance_where_members_are_like_others():
    accuracies = [confidence_attack(draw(400, 2 * s), draw(400, 2 * s + 1), {}, seed=s).accuracy for s in range(8)]
    # Eight attacks on 200 + 200 images each: four standard errors of their mean.
    assert abs(sum(accuracies) / 8 - 0.5) < 4 * 0.5 / (8 * 400) ** 0.5


def test_the_confidence_attack_tells_members_that_are_surer():
    found = confidence_attack(
        0.9 + 0.1 * draw(200, 0), 0.6 * draw(200, 1), {"low": 0.5 * draw(50, 2), "high": 0.92 + 0.08 * draw(50, 3)}
    )
    assert found.accuracy > 0.98
    assert found.as_non_members["low"] > 0.95
    assert found.as_non_members["high"] < 0.05


def test_the_confidence_attack_uses_as_many_members_as_others():
    found = confidence_attack(draw(500, 0), draw(60, 1), {"none": draw(0, 2)}, samples=1000)
    assert (found.trained_on, found.asked) == (30, 30)
    assert found.as_non_members == {}


def test_the_same_seed_gives_the_same_attack():
    sides = draw(100, 0), draw(100, 1), {"x": draw(30, 2)}
    assert confidence_attack(*sides, seed=3) == confidence_attack(*sides, seed=3)


@pytest.mark.parametrize("seed", range(4))
def test_the_area_is_that_of_counting_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    # Whole numbers and infinities, so that there are many ties.
    low = torch.randint(0, 6, (17,), generator=generator).double()
    high = torch.randint(0, 6, (23,), generator=generator).double()
    low[0], high[0], high[1] = torch.inf, torch.inf, torch.inf
    pairs = [1.0 if a < b else 0.5 if a == b else 0.0 for a in low.tolist() for b in high.tolist()]
    area, error = area_under_curve(low, high)
    assert area == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert error == pytest.approx(((17 + 23 + 1) / (12 * 17 * 23)) ** 0.5)


def test_losses_that_are_all_infinite_say_nothing():
    area, _ = area_under_curve(torch.full((5,), torch.inf), torch.full((7,), torch.inf))
    assert area == 0.5


def test_too_few_images_and_confidences_that_are_no_numbers_are_refused():
    with pytest.raises(NumericsError, match="at least four members and four others, got 3 and 50"):
        confidence_attack(draw(3, 0), draw(50, 1), {})
    with pytest.raises(NumericsError, match="needs finite confidences, got NaN"):
        confidence_attack(draw(50, 0), torch.full((50,), torch.nan), {})
