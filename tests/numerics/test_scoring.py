"""Scores as selection sees them: voters, the group's components only, dead outputs, baselines."""

import torch

from modhifi_cli.numerics.contributions import contribution_moments
from modhifi_cli.numerics.fidelity import singleton_fidelity
from modhifi_cli.numerics.scoring import Magnitude, Random, Saliency, Singleton
from tests.numerics import helpers


def test_votes_cover_the_group_only_and_leave_out_dead_outputs():
    first, data = helpers.make(in_group=4)
    weight = first.weight.clone()
    weight[2] = 0
    second = helpers.of(data, weight, 6, in_group=4)
    scores = Singleton()([first, second], [])
    assert [tuple(votes.shape) for votes in scores.votes] == [(4, 4), (3, 4)]
    assert scores.dead_outputs == 1
    expected = singleton_fidelity(contribution_moments(first))[:, :4]
    assert torch.equal(scores.votes[0], expected)
    saliency = Saliency()([first], [])
    torch.testing.assert_close(saliency.votes[0], contribution_moments(first).r[:, :4])


def test_magnitude_is_the_norm_over_all_producers():
    producers = [torch.tensor([[3.0, 0.0], [1.0, -1.0]]), torch.tensor([[-4.0], [2.0]])]
    assert Magnitude(order=1)([], producers).votes[0].tolist() == [[7.0, 4.0]]
    expected = torch.tensor([[5.0, 6.0**0.5]], dtype=torch.float64)
    torch.testing.assert_close(Magnitude(order=2)([], producers).votes[0], expected)


def test_random_scores_repeat_with_the_seed():
    consumer, _ = helpers.make()
    one, two, other = (Random()([consumer], [], generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one.votes[0], two.votes[0])
    assert not torch.equal(one.votes[0], other.votes[0])


def test_each_score_says_whether_it_needs_statistics():
    assert [score.needs_statistics for score in (Singleton(), Saliency(), Magnitude(), Random())] == [
        True,
        True,
        False,
        False,
    ]
