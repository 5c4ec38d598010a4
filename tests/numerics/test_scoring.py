"""Scores as selection sees them: voters, the group's components only, dead outputs, baselines."""

import pytest
import torch

from modhifi_cli.numerics.contributions import contribution_moments
from modhifi_cli.numerics.fidelity import singleton_fidelity
from modhifi_cli.numerics.scoring import Energy, Fluctuation, Magnitude, Random, Saliency, Singleton
from tests import reference
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


@pytest.mark.parametrize("per", [1, 3])
def test_energy_and_fluctuation_are_the_power_and_variance_of_contributions(per):
    consumer, data = helpers.make(per=per, in_group=4)
    raw = reference.contributions(data, consumer.weight, 6, centred=False)[:, :, :4]
    varying = reference.contributions(data, consumer.weight, 6, centred=True)[:, :, :4]
    for score, parts in ((Energy(), raw), (Fluctuation(), varying)):
        votes = score([consumer, consumer], []).votes
        assert [tuple(rows.shape) for rows in votes] == [(1, 4), (1, 4)]
        torch.testing.assert_close(votes[0][0], parts.square().mean(1).sum(0), rtol=1e-5, atol=1e-5)


def test_energy_of_one_feature_is_its_power_times_the_weight_norm():
    consumer, data = helpers.make()
    norms = consumer.weight.square().sum(0)
    power, variance = data.square().mean(0), data.var(0, correction=0)
    torch.testing.assert_close(Energy()([consumer]).votes[0][0], power * norms, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Fluctuation()([consumer]).votes[0][0], variance * norms, rtol=1e-5, atol=1e-5)
