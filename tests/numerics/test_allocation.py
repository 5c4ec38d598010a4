"""Widths under a budget: reached, rounded, bounded, and uneven where that costs less."""

import itertools
import random

import pytest

from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics.allocation import Global, Uniform
from modhifi_cli.numerics.schedule import geometric


def chain(sizes):
    """Removed share of a chain of layers whose cost is the product of neighbouring widths, as in a network."""

    def cost(widths):
        ends = [3, *widths, 10]
        return sum(one * two for one, two in itertools.pairwise(ends))

    return lambda widths: 1 - cost(widths) / cost(sizes)


SIZES = [40, 64, 16, 80]


def curves(sizes, powers):
    return [[(removed / size) ** power for removed in range(size)] for size, power in zip(sizes, powers, strict=True)]


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.62, 0.8])
@pytest.mark.parametrize("allocate", [Uniform(), Global(floor=0.05)])
def test_the_budget_is_met_within_a_point(allocate, sparsity):
    share = chain(SIZES)
    widths = allocate(SIZES, SIZES, share, sparsity=sparsity, steps=[1] * 4, curves=curves(SIZES, [1, 2, 3, 2]))
    assert share(widths) == pytest.approx(sparsity, abs=0.01)


@pytest.mark.parametrize("allocate", [Uniform(), Global()])
def test_widths_are_multiples_and_never_grow(allocate):
    sizes, present = [64, 64, 64], [64, 48, 40]
    widths = allocate(sizes, present, chain(sizes), sparsity=0.7, steps=[8] * 3, curves=curves(present, [2, 2, 2]))
    assert all(width % 8 == 0 and 8 <= width <= now for width, now in zip(widths, present, strict=True))


def test_uniform_takes_the_same_share_everywhere():
    widths = Uniform()(SIZES, SIZES, chain(SIZES), sparsity=0.5, steps=[1] * 4)
    shares = [width / size for width, size in zip(widths, SIZES, strict=True)]
    assert max(shares) - min(shares) < 0.1


def test_global_has_less_summed_error_than_uniform_at_the_same_budget():
    share, error = chain(SIZES), curves(SIZES, [1, 4, 2, 3])

    def total(widths):
        return sum(error[g][SIZES[g] - width] for g, width in enumerate(widths))

    for sparsity in (0.2, 0.4, 0.6):
        even = Uniform()(SIZES, SIZES, share, sparsity=sparsity, steps=[1] * 4)
        uneven = Global(floor=0.05)(SIZES, SIZES, share, sparsity=sparsity, steps=[1] * 4, curves=error)
        assert abs(share(uneven) - share(even)) < 0.01
        assert total(uneven) < total(even)


@pytest.mark.parametrize(("seed", "sparsity"), [*itertools.product(range(8), (0.25, 0.4, 0.6))])
def test_no_exchange_of_steps_between_two_groups_costs_less(seed, sparsity):
    draw = random.Random(seed)
    sizes, steps = [16, 16, 16, 32, 32, 32, 64, 64], [8, 8, 8, 8, 8, 4, 8, 8]
    error = [list(itertools.accumulate([0.0, *(draw.random() for _ in range(size - 1))])) for size in sizes]
    share = chain(sizes)

    def total(widths):
        return sum(curve[size - width] for curve, size, width in zip(error, sizes, widths, strict=True))

    widths = Global()(sizes, sizes, share, sparsity=sparsity, steps=steps, curves=error)
    assert abs(share(widths) - sparsity) < 0.06
    for wider, narrower in itertools.permutations(range(8), 2):
        other = list(widths)
        other[wider] = min(other[wider] + steps[wider], sizes[wider])
        other[narrower] = max(other[narrower] - steps[narrower], steps[narrower])
        fits = min(sparsity, share(widths)) <= share(other) <= max(sparsity, share(widths))
        assert not fits or total(other) >= total(widths) - 1e-9


def test_global_spares_the_group_that_cannot_lose_anything():
    flat, steep = [0.0] * 20, [0.0] + [1.0] * 19
    share = lambda widths: 1 - sum(widths) / 40  # noqa: E731 - one line, used once
    assert Global(floor=0.05)([20, 20], [20, 20], share, sparsity=0.4, steps=[1, 1], curves=[flat, steep]) == [4, 20]


def test_global_sees_a_flat_stretch_behind_a_step():
    step_then_flat = [0.0, 0.2] + [0.2] * 18
    rising = [0.06 * removed for removed in range(20)]
    share = lambda widths: 1 - sum(widths) / 40  # noqa: E731 - one line, used once
    widths = Global(floor=0.05)([20, 20], [20, 20], share, sparsity=0.3, steps=[1, 1], curves=[step_then_flat, rising])
    assert widths[0] < widths[1]


@pytest.mark.parametrize("allocate", [Uniform(floor=0.5), Global(floor=0.5)])
def test_an_unreachable_share_says_what_can_be_reached(allocate):
    with pytest.raises(ConfigError, match=r"sparsity=0\.9 cannot be reached: .* at most 0\.71"):
        allocate(SIZES, SIZES, chain(SIZES), sparsity=0.9, steps=[1] * 4, curves=curves(SIZES, [1, 1, 1, 1]))


@pytest.mark.parametrize("allocate", [Uniform(), Global()])
def test_nothing_to_remove_changes_nothing(allocate):
    assert allocate(SIZES, SIZES, chain(SIZES), sparsity=0.0, steps=[8] * 4, curves=curves(SIZES, [1] * 4)) == SIZES


def test_a_geometric_schedule_removes_the_same_share_of_what_is_left():
    shares = geometric(0.6, iterations=4)
    left = [1.0, *(1 - share for share in shares)]
    ratios = [after / before for before, after in itertools.pairwise(left)]
    assert shares[-1] == 0.6 and max(ratios) - min(ratios) < 1e-12
    assert geometric(0.3, iterations=1) == (0.3,)


def test_a_schedule_needs_an_iteration():
    with pytest.raises(ConfigError, match="schedule.iterations must be at least 1, got 0"):
        geometric(0.3, iterations=0)


@pytest.mark.parametrize("allocate", [Uniform(), Global()])
def test_every_group_has_a_step_of_its_own(allocate):
    sizes, steps = [16, 64, 128], [2, 8, 16]
    share = chain(sizes)
    widths = allocate(sizes, sizes, share, sparsity=0.5, steps=steps, curves=curves(sizes, [2, 2, 2]))
    assert all(width % step == 0 for width, step in zip(widths, steps, strict=True))
    assert share(widths) == pytest.approx(0.5, abs=0.03)


def test_a_width_that_is_no_multiple_moves_to_one():
    widths = Uniform()([20, 20], [20, 20], chain([20, 20]), sparsity=0.05, steps=[8, 8])
    assert all(width in (20, 16, 8) for width in widths)
