"""Likeness of scorings against scipy and by hand."""

import math

import pytest
import torch
from scipy.stats import spearmanr

from modhifi_cli.numerics.ranks import kept_in_common, rank_correlation


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys(ties):
    generator = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    if ties:
        first, second = (2 * first).round(), (2 * second).round()
    expected = spearmanr(first.numpy(), second.numpy()).statistic
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12)


def test_the_same_order_is_one_and_the_opposite_minus_one_and_none_has_no_answer():
    scores = torch.tensor([0.1, 5.0, 2.0])
    assert rank_correlation(scores, scores.exp()) == pytest.approx(1)
    assert rank_correlation(scores, -scores) == pytest.approx(-1)
    assert math.isnan(rank_correlation(scores, torch.ones(3)))


def test_kept_in_common_counts_the_best_of_both():
    first, second = torch.tensor([9.0, 8, 7, 1, 0]), torch.tensor([9.0, 0, 7, 8, 1])
    assert kept_in_common(first, second, 1) == 1
    assert kept_in_common(first, second, 2) == 0.5
    assert kept_in_common(first, second, 3) == pytest.approx(2 / 3)
