"""The union rule against growing p by hand, and top-k."""

import pytest
import torch

from modhifi_cli.numerics.scoring import Scores
from modhifi_cli.numerics.selection import TopK, Union
from tests import reference


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 4], ids=["distinct", "many_ties"])
def test_union_is_growing_p_by_hand(seed, levels):
    generator = torch.Generator().manual_seed(seed)
    votes = [torch.rand(count, 9, generator=generator, dtype=torch.float64) for count in (3, 2)]
    if levels:
        votes = [(block * levels).floor() / levels for block in votes]
    for keep in range(1, 10):
        kept = Union()(Scores(tuple(votes)), keep=keep)
        assert kept.tolist() == reference.union(votes, keep)
        assert kept.dtype == torch.int64


def test_union_keeps_what_a_single_voter_needs_and_top_k_does_not():
    votes = torch.zeros(4, 5, dtype=torch.float64)
    votes[:3] = torch.tensor([0.9, 0.8, 0.7, 0.0, 0.0])
    votes[3, 4] = 0.6
    scores = Scores((votes,))
    assert Union()(scores, keep=2).tolist() == [0, 4]
    assert TopK()(scores, keep=2).tolist() == [0, 1]


def test_top_k_gives_every_consumer_the_same_weight():
    loud = torch.tensor([[100.0, 0.0, 90.0]], dtype=torch.float64)
    quiet = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    dead = torch.zeros(1, 3, dtype=torch.float64)
    assert TopK()(Scores((loud, quiet, dead)), keep=2).tolist() == [0, 1]


def test_equal_votes_keep_the_lowest_indices():
    scores = Scores((torch.ones(3, 6, dtype=torch.float64),))
    assert Union()(scores, keep=4).tolist() == TopK()(scores, keep=4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("rule", [Union(), TopK()], ids=["union", "top_k"])
@pytest.mark.parametrize("keep", [0, 4])
def test_keeping_none_or_more_than_all_is_a_defect(rule, keep):
    with pytest.raises(ValueError, match="keep must lie in 1 … 3"):
        rule(Scores((torch.rand(2, 3),)), keep=keep)
