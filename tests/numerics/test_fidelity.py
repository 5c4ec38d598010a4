"""Fidelity laws: brute-force rescaling, monotonicity, dead outputs, and the layer fidelity that reports print."""

from dataclasses import replace

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.compensation import PerKernel
from modhifi_cli.numerics.contributions import contribution_moments, remembered, similarity
from modhifi_cli.numerics.fidelity import joint_fidelity, layer_fidelity, saliency, singleton_fidelity, subset_fidelity
from modhifi_cli.numerics.linalg import feature_index
from tests import reference
from tests.numerics import helpers


@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("centred", [True, False])
def test_singleton_fidelity_is_brute_force_rescaling(per, rows, centred):
    consumer, data = helpers.make(per=per, rows=rows, centred=centred)
    scores = singleton_fidelity(contribution_moments(consumer))
    parts = reference.contributions(data, consumer.weight, consumer.components, centred=centred)
    torch.testing.assert_close(scores, reference.singleton_scores(parts), rtol=1e-4, atol=1e-5)
    singles = torch.stack([subset_fidelity(similarity(consumer), torch.tensor([i])) for i in range(6)], 1)
    torch.testing.assert_close(scores, singles, rtol=1e-6, atol=1e-9)


def test_subset_fidelity_is_least_squares_on_explicit_contributions():
    consumer, data = helpers.make(per=2)
    parts = reference.contributions(data, consumer.weight, consumer.components, centred=True)
    gram = similarity(consumer)
    for kept in ([0, 3], [1, 2, 4, 5]):
        expected = torch.tensor([reference.fidelity_of(part, kept) for part in parts], dtype=torch.float64)
        torch.testing.assert_close(subset_fidelity(gram, torch.tensor(kept)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [80, 4], ids=["well_posed", "singular"])
def test_subset_fidelity_never_falls_and_ends_at_one(rows):
    consumer, _ = helpers.make(rows=rows)
    gram = similarity(consumer)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    series = torch.stack([subset_fidelity(gram, order[:count]) for count in range(7)])
    assert series[0].eq(0).all()
    assert (series.diff(dim=0) >= -1e-9).all()
    torch.testing.assert_close(series[-1], torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-7)


def test_top_k_singletons_are_the_best_subset_of_uncorrelated_contributions():
    generator = torch.Generator().manual_seed(2)
    gram = torch.diag(torch.rand(6, generator=generator, dtype=torch.float64))
    scores = torch.stack([subset_fidelity(gram, torch.tensor([i])) for i in range(6)])
    best = scores.topk(3).indices
    rivals = torch.combinations(torch.arange(6), 3)
    assert subset_fidelity(gram, best) >= torch.stack([subset_fidelity(gram, rival) for rival in rivals]).max() - 1e-12


@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("centred", [True, False])
def test_layer_fidelity_is_the_error_on_the_rows(rows, centred):
    consumer, data = helpers.make(per=2, rows=rows, centred=centred)
    kept = torch.tensor([0, 2, 3, 5])
    features = torch.tensor([0, 1, 4, 5, 6, 7, 10, 11])
    weight = consumer.weight[:, features] * 1.1
    output, edited = data @ consumer.weight.T, data[:, features] @ weight.T
    error = output - edited
    if centred:
        output, error = output - output.mean(0), error - error.mean(0)
    expected = float(1 - error.square().sum() / output.square().sum())
    assert layer_fidelity(consumer, kept, weight) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    plain = layer_fidelity(consumer, kept, consumer.weight[:, features])
    assert layer_fidelity(consumer, kept) == pytest.approx(plain)
    assert layer_fidelity(consumer, torch.arange(6)) == 1


def test_dead_outputs_score_zero_and_dead_components_too():
    consumer, data = helpers.make(components=3)
    weight = consumer.weight.clone()
    weight[1] = 0
    weight[:, 2] = 0
    consumer = helpers.of(data, weight, 3)
    moments = contribution_moments(consumer)
    assert moments.alive.tolist() == [True, False, True, True]
    for score in (singleton_fidelity, saliency):
        scores = score(moments)
        assert scores[1].eq(0).all() and scores[:, 2].eq(0).all() and scores[0, :2].ne(0).all()


@pytest.mark.parametrize("centred", [True, False])
def test_a_layer_whose_outputs_are_all_dead_is_an_error_that_names_it(centred):
    consumer = helpers.of(torch.randn(9, 3), torch.zeros(2, 3), 3, centred=centred, name="fc1")
    moments = contribution_moments(consumer)
    for score in (singleton_fidelity, saliency):
        with pytest.raises(NumericsError, match=r"fc1: at least one output must have energy.*2 dead outputs.*exclude"):
            score(moments)
    with pytest.raises(NumericsError, match=r"fc1: at least one output must have energy"):
        layer_fidelity(consumer, torch.tensor([0]))


def test_a_single_row_that_would_be_centred_says_that_one_image_is_too_few():
    consumer = helpers.of(torch.randn(1, 3), torch.randn(2, 3), 3, centred=True, name="fc1")
    with pytest.raises(NumericsError, match="fc1: one calibration row has no spread .*, so one image is too few; raise"):
        contribution_moments(consumer)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize(("rows", "per"), [(80, 1), (80, 3), (9, 3), (7, 2)])
def test_joint_fidelity_is_what_the_best_linear_map_of_the_kept_features_rebuilds(centred, rows, per):
    for kept in ([0, 2, 3, 5], [1], [0, 1, 2, 3, 4, 5], []):
        consumer, data = helpers.make(per=per, rows=rows, centred=centred)
        features = feature_index(torch.tensor(kept, dtype=torch.int64), per).tolist()
        expected = reference.joint_share(data, consumer.weight, features, centred=centred) if kept else 0.0
        got = joint_fidelity(consumer, torch.tensor(kept, dtype=torch.int64))
        assert got == pytest.approx(expected, abs=2e-5)


def test_joint_fidelity_never_falls_when_a_component_is_added_and_bounds_every_repair():
    consumer, _ = helpers.make(per=2)
    before = 0.0
    for count in range(1, 7):
        kept = torch.arange(count)
        joint = joint_fidelity(consumer, kept)
        assert joint >= before - 1e-9
        assert joint >= layer_fidelity(consumer, kept, PerKernel()(consumer, kept)) - 1e-9
        before = joint
    assert before == pytest.approx(1)


def test_a_number_of_a_consumer_is_computed_once_for_each_choice_of_components_and_forgotten_with_it():
    (consumer, _), calls = helpers.make(), []

    @remembered
    def number(one, kept):
        calls.append(kept.tolist())
        return float(kept.sum())

    assert number(consumer, torch.tensor([0, 2])) == number(consumer, torch.tensor([0, 2])) == 2.0
    assert number(consumer, torch.tensor([0, 1])) == 1.0
    assert number(replace(consumer, name="another"), torch.tensor([0, 1])) == 1.0
    assert calls == [[0, 2], [0, 1], [0, 1]]
