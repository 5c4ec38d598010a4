"""Backward elimination against solving every candidate set anew, exhaustive search, and top-k."""

import itertools
from dataclasses import replace

import pytest
import torch

from modhifi_cli.errors import ConfigError, NumericsError
from modhifi_cli.numerics import elimination as module
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.fidelity import joint_fidelity
from modhifi_cli.numerics.moments import reorder
from modhifi_cli.numerics.scoring import Singleton
from modhifi_cli.numerics.selection import Greedy, TopK
from tests import reference
from tests.numerics import helpers


def uncorrelated(seed, *, components=7, outputs=3):
    """A consumer whose input features are exactly orthogonal and centred, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(40, components, generator=generator, dtype=torch.float64)
    data = torch.linalg.qr(data - data.mean(0)).Q * (0.5 + torch.rand(components, generator=generator))
    weight = torch.randn(outputs, components, generator=generator, dtype=torch.float64)
    return helpers.of(data.float(), weight, components)


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("wide", [False, True], ids=["inverse", "rows"])
@pytest.mark.parametrize("panel", [1, 5, 96])
def test_greedy_is_solving_every_candidate_set_anew(monkeypatch, centred, per, rows, wide, panel):
    if wide:
        monkeypatch.setattr(module, "_WIDEST_INVERSE", 0)
    monkeypatch.setattr(module, "_PANEL", panel)
    consumer, data = helpers.make(per=per, rows=rows, centred=centred, outputs=9)
    got = elimination([consumer], keep=1, ridge=1e-2)
    order, errors = reference.backward_elimination([(data, consumer.weight, 6, 6, centred)], 1, 1e-2)
    assert got.order.tolist() == order
    torch.testing.assert_close(got.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-4, atol=1e-5)


def test_several_consumers_share_one_order_and_components_behind_the_group_stay():
    first, rows = helpers.make(seed=1, in_group=5, per=2, components=6)
    second, others = helpers.make(seed=2, in_group=5, components=8, outputs=3, centred=False)
    got = elimination([first, second], keep=2, ridge=1e-3)
    cases = [(rows, first.weight, 6, 5, True), (others, second.weight, 8, 5, False)]
    order, errors = reference.backward_elimination(cases, 2, 1e-3)
    assert got.order.tolist() == order
    torch.testing.assert_close(got.errors, torch.tensor(errors, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    assert got.kept(2).tolist() == sorted(set(range(5)) - set(order))
    assert Greedy(ridge=1e-3)(None, [first, second], keep=3).tolist() == sorted(set(range(5)) - set(order[:2]))


@pytest.mark.parametrize("block", [2, 3, 50])
@pytest.mark.parametrize("wide", [False, True], ids=["inverse", "rows"])
def test_errors_inside_a_block_are_those_of_removing_its_components_in_order(monkeypatch, block, wide):
    consumer, _ = helpers.make(per=2, components=8, rows=12 if wide else 80)
    if wide:
        monkeypatch.setattr(module, "_WIDEST_INVERSE", 0)
    got = elimination([consumer], keep=1, block=block, ridge=1e-3)
    assert sorted([*got.order.tolist(), *got.kept(1).tolist()]) == list(range(8))
    for removed in range(1, 8):
        # Only these may go, so one at a time must come to the same error.
        chosen = sorted(got.order[:removed].tolist())
        front = torch.tensor([*chosen, *(i for i in range(8) if i not in chosen)])
        features = (front[:, None] * 2 + torch.arange(2)).flatten()
        moved = replace(
            consumer,
            weight=consumer.weight[:, features],
            statistics=reorder(consumer.statistics, features),
            in_group=removed,
        )
        alone = elimination_of_all(moved, ridge=1e-3)
        assert float(got.errors[removed]) == pytest.approx(alone, rel=1e-7)
    assert (got.errors.diff() >= 0).all()




def elimination_of_all(consumer, *, ridge):
    """Error of removing the whole group, which `elimination` itself never does."""
    state = module._State(consumer, ridge, 1)
    return sum(float(state.remove_(torch.tensor([i]))) for i in range(consumer.in_group))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_is_exhaustive_search_where_contributions_are_uncorrelated(seed):
    consumer = uncorrelated(seed)
    for keep in range(1, 7):
        kept = Greedy(ridge=1e-9)(None, [consumer], keep=keep)
        every = [torch.tensor(chosen) for chosen in itertools.combinations(range(7), keep)]
        best = max(every, key=lambda chosen: joint_fidelity(consumer, chosen))
        assert kept.tolist() == best.tolist()


@pytest.mark.parametrize("per", [1, 2])
def test_greedy_never_loses_to_top_k_in_joint_fidelity(per):
    gains, alone = [], []
    for seed, keep in itertools.product(range(12), (2, 4, 8)):
        consumer, _ = helpers.make(components=12, per=per, rows=200, seed=seed, in_group=11)
        scores = Singleton()([consumer])
        top = joint_fidelity(consumer, torch.cat([TopK()(scores, [consumer], keep=keep), torch.tensor([11])]))
        for rule, found in ((Greedy(), gains), (Greedy(against_scores=False), alone)):
            kept = torch.cat([rule(scores, [consumer], keep=keep), torch.tensor([11])])
            found.append(joint_fidelity(consumer, kept) - top)
    assert min(gains) >= 0
    # Elimination alone is better on the whole, not always: going backwards it cannot see what is best for very few.
    assert min(alone) < 0 < sum(alone) / len(alone)


def test_the_error_curve_is_what_the_kept_set_loses_jointly():
    consumer, _ = helpers.make(components=12, rows=200)
    got = elimination([consumer], ridge=1e-8)
    for keep in range(1, 13):
        assert float(got.errors[12 - keep]) == pytest.approx(1 - joint_fidelity(consumer, got.kept(keep)), abs=1e-5)


def test_duplicates_go_first_and_cost_nothing_but_only_one_of_each_pair():
    data = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    data = torch.cat([data, data[:, :2]], 1)
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    got = elimination([helpers.of(data, weight, 7)], ridge=1e-6)
    first = set(got.order[:2].tolist())
    assert len(first & {0, 5}) == 1 and len(first & {1, 6}) == 1
    assert float(got.errors[2]) < 1e-4 < float(got.errors[3])


def test_elimination_leaves_its_consumers_alone_and_repeats():
    for rows in (80, 5):
        consumer, _ = helpers.make(rows=rows, components=9)
        weight = consumer.weight.clone()
        moments = [t.clone() for t in (consumer.statistics.second_moment, consumer.statistics.samples) if t is not None]
        one, two = elimination([consumer]), elimination([consumer])
        assert torch.equal(one.order, two.order) and torch.equal(one.errors, two.errors)
        assert torch.equal(consumer.weight, weight)
        after = [t for t in (consumer.statistics.second_moment, consumer.statistics.samples) if t is not None]
        assert all(torch.equal(a, b) for a, b in zip(moments, after, strict=True))


def test_mixed_rows_and_outputs_of_a_wide_layer_come_near_the_exact_order(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sizes = 0.1 + torch.rand(40, generator=generator)
    data = torch.randn(100, 120, generator=generator) * sizes.repeat_interleave(3)
    weight = torch.randn(90, 120, generator=generator, dtype=torch.float64)
    consumer = helpers.of(data, weight, 40)
    exact = elimination([consumer], keep=20, ridge=0.1)
    monkeypatch.setattr(module, "_WIDEST_INVERSE", 0)
    monkeypatch.setattr(module, "_MOST_ROWS", 60)
    monkeypatch.setattr(module, "_MOST_OUTPUTS", 60)
    mixed = elimination([consumer], keep=20, ridge=0.1)
    assert len(set(exact.kept(20).tolist()) & set(mixed.kept(20).tolist())) >= 15


def test_a_dead_layer_is_an_error_that_names_it():
    consumer = helpers.of(torch.randn(9, 3), torch.zeros(2, 3), 3, name="fc1")
    with pytest.raises(NumericsError, match=r"fc1: at least one output must have energy"):
        elimination([consumer])


def test_a_ridge_too_small_for_singular_moments_says_what_to_raise():
    data = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).repeat(1, 2)
    consumer = helpers.of(data, torch.randn(2, 6), 6, name="fc1")
    with pytest.raises(NumericsError, match=r"fc1: backward elimination needs moments .* raise selection\.ridge"):
        elimination([consumer], ridge=1e-30)


@pytest.mark.parametrize("keep", [0, 7])
def test_keeping_none_or_more_than_all_is_a_defect(keep):
    consumer, _ = helpers.make()
    with pytest.raises(ValueError, match="keep must lie in 1 … 6"):
        elimination([consumer], keep=keep)
    with pytest.raises(ValueError, match="keep must lie in 3 … 6"):
        elimination([consumer], keep=3).kept(keep)


@pytest.mark.parametrize("block", [0, -1, 1.5, "many", True])
def test_a_bad_block_is_refused(block):
    with pytest.raises(ConfigError, match=r"selection\.block must be 'auto' or a whole number of at least 1, got"):
        Greedy(block=block)


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_bad_ridge_is_refused(ridge):
    with pytest.raises(ConfigError, match=r"selection\.ridge must be a number above 0, got"):
        Greedy(ridge=ridge)


def test_the_automatic_block_grows_with_the_features_of_the_widest_consumer(monkeypatch):
    consumer, _ = helpers.make(components=9, per=2)
    assert torch.equal(elimination([consumer]).order, elimination([consumer], block=1).order)
    monkeypatch.setattr(module, "_ONE_AT_A_TIME", 6)
    assert torch.equal(elimination([consumer]).order, elimination([consumer], block=3).order)
