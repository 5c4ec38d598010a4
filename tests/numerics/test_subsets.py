"""Fidelity of nested subsets against least squares on explicit contributions, one subset after the other."""

import pytest
import torch

from modhifi_cli.numerics.contributions import similarity
from modhifi_cli.numerics.fidelity import joint_fidelity, subset_fidelity
from modhifi_cli.numerics.subsets import leading_fidelity, leading_joint_fidelity, random_orders
from tests import reference
from tests.numerics import helpers


@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("centred", [True, False])
def test_every_leading_part_has_the_fidelity_of_brute_force(per, centred):
    consumer, rows = helpers.make(components=6, per=per, centred=centred)
    orders = random_orders(6, 5, generator=torch.Generator().manual_seed(1))
    found = leading_fidelity(similarity(consumer), orders)
    parts = reference.contributions(rows.float().double(), consumer.weight, 6, centred=centred)
    for output in range(len(consumer.weight)):
        for number, order in enumerate(orders.tolist()):
            for size in range(1, 7):
                expected = reference.fidelity_of(parts[output], order[:size])
                assert abs(float(found[output, number, size - 1]) - expected) < 1e-5  # moments of float32 rows


def test_each_output_may_have_orders_of_its_own():
    consumer, _ = helpers.make(outputs=3, components=5)
    gram = similarity(consumer)
    orders = random_orders(5, 12, generator=torch.Generator().manual_seed(2)).view(3, 4, 5)
    found = leading_fidelity(gram, orders)
    for output in range(3):
        for number in range(4):
            for size in range(1, 6):
                expected = subset_fidelity(gram[output], orders[output, number, :size])
                torch.testing.assert_close(found[output, number, size - 1], expected, rtol=0, atol=1e-8)


def test_all_components_rebuild_everything_and_more_is_never_less():
    consumer, _ = helpers.make(components=9, per=2)
    orders = random_orders(9, 20, generator=torch.Generator().manual_seed(3))
    found = leading_fidelity(similarity(consumer), orders)
    torch.testing.assert_close(found[..., -1], torch.ones_like(found[..., -1]), rtol=0, atol=1e-8)
    assert bool((found.diff(dim=-1) >= 0).all())


def test_twins_and_dead_components_do_not_break_the_factor():
    consumer, rows = helpers.make(components=5)
    data = rows.float().clone()
    data[:, 3] = data[:, 1]
    data[:, 4] = 0
    weight = consumer.weight.clone()
    weight[:, 3] = weight[:, 1]
    twin = helpers.of(data, weight, 5)
    gram = similarity(twin)
    orders = random_orders(5, 30, generator=torch.Generator().manual_seed(4))
    found = leading_fidelity(gram, orders)
    for number, order in enumerate(orders):
        for size in range(1, 6):
            expected = subset_fidelity(gram, order[:size])
            torch.testing.assert_close(
                found[:, number, size - 1], expected, rtol=0, atol=1e-6
            )  # float32 sums tell twins apart


def test_an_output_without_energy_scores_zero():
    consumer, rows = helpers.make(outputs=2, components=4)
    weight = consumer.weight.clone()
    weight[1] = 0
    dead = helpers.of(rows.float(), weight, 4)
    found = leading_fidelity(similarity(dead), torch.arange(4)[None])
    assert bool((found[1] == 0).all()) and float(found[0, 0, -1]) > 0.999


@pytest.mark.parametrize("per", [1, 3])
def test_joint_leading_parts_agree_with_the_joint_least_squares(per):
    consumer, _ = helpers.make(components=5, per=per, rows=200)
    orders = random_orders(5, 4, generator=torch.Generator().manual_seed(5))
    rebuilt, energy = leading_joint_fidelity(consumer, orders)
    for number, order in enumerate(orders):
        for size in range(1, 6):
            expected = joint_fidelity(consumer, order[:size].sort().values)
            assert abs(float(rebuilt[:, number, size - 1].sum() / energy.sum()) - expected) < 1e-7


def test_with_one_feature_a_component_joint_and_subset_fidelity_are_one():
    consumer, _ = helpers.make(outputs=3, components=7, per=1)
    orders = random_orders(7, 6, generator=torch.Generator().manual_seed(6))
    rebuilt, energy = leading_joint_fidelity(consumer, orders)
    expected = leading_fidelity(similarity(consumer), orders)
    torch.testing.assert_close(rebuilt / energy[:, None, None], expected, rtol=0, atol=1e-8)


def test_random_orders_are_permutations_from_the_seed():
    draw = lambda: random_orders(8, 3, generator=torch.Generator().manual_seed(7))  # noqa: E731
    assert torch.equal(draw(), draw())
    assert torch.equal(draw().sort(1).values, torch.arange(8).expand(3, 8))
