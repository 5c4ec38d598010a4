"""Scores as selection sees them: voters, the group's components only, dead outputs, baselines."""

import pytest
import torch

from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics.contributions import contribution_moments
from modhifi_cli.numerics.fidelity import singleton_fidelity
from modhifi_cli.numerics.scoring import (
    DisCEditSP,
    Energy,
    Fluctuation,
    Magnitude,
    Place,
    Random,
    Saliency,
    Singleton,
    TVSPrune,
)
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


@pytest.mark.parametrize("score", [DisCEditSP, TVSPrune])
def test_scores_of_classes_refuse_settings_that_make_no_sense(score):
    with pytest.raises(ConfigError, match="^scoring.witness: unknown witness 'sums', did you mean 'sum'"):
        score(witness="sums")
    with pytest.raises(ConfigError, match="^scoring.robust must be a number of at least 0, got -0.1: set it to 0.$"):
        score(robust=-0.1)
    with pytest.raises(ConfigError, match="^scoring.least_images must be a whole number of at least 1, got 0.$"):
        score(least_images=0)


def test_an_unknown_bound_is_refused():
    with pytest.raises(ConfigError, match="^scoring.bound: unknown bound 'fishr', did you mean 'fisher'"):
        DisCEditSP(bound="fishr")


def test_a_component_counts_with_the_largest_bound_over_places_and_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    noise = torch.randn(2, 60, 4, generator=generator, dtype=torch.float64)
    noise[0, :, 1] += 3.0 * (labels == 0)
    noise[1, :, 3] += 3.0 * (labels == 2)
    places = [Place(name, summaries, labels, 3) for name, summaries in zip("ab", noise, strict=True)]
    for score in (DisCEditSP(), TVSPrune(), DisCEditSP(witness="quadratic", bound="fisher", robust=0.01)):
        both = score([], [], places=places).votes
        alone = torch.cat([score([], [], places=[place]).votes[0] for place in places])
        assert len(both) == 1 and torch.equal(both[0][0], alone.amax(0))
        assert both[0][0].argsort(descending=True)[:2].sort().values.tolist() == [1, 3]
