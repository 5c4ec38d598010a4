"""Compensation laws: least squares on explicit rows, never worse than slicing, duplicates, dead outputs."""

from dataclasses import replace

import pytest
import torch

from modhifi_cli.errors import ConfigError, NumericsError
from modhifi_cli.numerics import compensation as module
from modhifi_cli.numerics import contributions, linalg
from modhifi_cli.numerics.compensation import Joint, NoCompensation, PerKernel, downhill, restored_constant
from modhifi_cli.numerics.fidelity import layer_fidelity
from modhifi_cli.numerics.linalg import feature_index
from modhifi_cli.numerics.regression import Regression
from tests import reference
from tests.numerics import helpers

KEPT = torch.tensor([0, 2, 3, 5])


@pytest.mark.parametrize("towards", ["weights", "zero"])
@pytest.mark.parametrize("ridge", [1e-4, 0.3])
@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
def test_scales_are_ridge_least_squares_on_explicit_contributions(monkeypatch, towards, ridge, per, rows, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    consumer, data = helpers.make(per=per, rows=rows)
    weight = PerKernel(ridge=ridge, towards=towards)(consumer, KEPT)
    features = feature_index(KEPT, per)
    parts = reference.contributions(data, consumer.weight, 6, centred=True)
    anchor = 1.0 if towards == "weights" else 0.0
    for output in range(4):
        scales = reference.compensated_scales(parts[output], KEPT.tolist(), ridge=ridge, towards=anchor)
        expected = consumer.weight[output, features] * scales.repeat_interleave(per)
        torch.testing.assert_close(weight[output], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1e-2, 1.0, 100.0])
def test_compensation_towards_the_weights_is_never_worse_than_slicing(monkeypatch, ridge, rows, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    for seed in range(3):
        consumer, _ = helpers.make(rows=rows, seed=seed)
        compensated = PerKernel(ridge=ridge)(consumer, KEPT)
        assert layer_fidelity(consumer, KEPT, compensated) >= layer_fidelity(consumer, KEPT) - 1e-9


def test_exact_compensation_reaches_the_subset_fidelity_of_every_output():
    consumer, data = helpers.make(per=2)
    weight = PerKernel(ridge=0)(consumer, KEPT)
    parts = reference.contributions(data, consumer.weight, 6, centred=True)
    for output in range(4):
        fitted = reference.contributions(data[:, feature_index(KEPT, 2)], weight[output : output + 1], 4, centred=True)
        target = parts[output].sum(1)
        fidelity = 1 - (target - fitted[0].sum(1)).square().mean() / target.square().mean()
        assert float(fidelity) == pytest.approx(reference.fidelity_of(parts[output], KEPT.tolist()), abs=1e-5)


@pytest.mark.parametrize("ridge", [0.0, 1e-4])
def test_duplicate_channels_do_not_break_the_solve(ridge):
    data = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    data = torch.cat([data, data[:, :1], data[:, 1:2]], 1)  # components 5 and 6 repeat 0 and 1
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    consumer = helpers.of(data, weight, 7)
    kept = torch.tensor([0, 2, 3, 4, 5, 6])
    compensated = PerKernel(ridge=ridge)(consumer, kept)
    assert torch.isfinite(compensated).all()
    # Component 1 is gone but its twin is left, so nothing is lost but what the ridge holds back.
    assert layer_fidelity(consumer, kept, compensated) == pytest.approx(1, abs=1e-5 + 10 * ridge)


def test_keeping_everything_returns_the_weight():
    for per in (1, 3):
        consumer, _ = helpers.make(per=per)
        torch.testing.assert_close(PerKernel()(consumer, torch.arange(6)), consumer.weight, rtol=1e-9, atol=1e-9)


def test_one_output_chunk_or_many_is_the_same(monkeypatch):
    consumer, _ = helpers.make(outputs=5, per=3)
    whole = PerKernel()(consumer, KEPT)
    monkeypatch.setattr(contributions, "_CHUNK_BYTES", 8 * 16 * 2)
    torch.testing.assert_close(PerKernel()(consumer, KEPT), whole)


def test_iterative_outputs_that_do_not_converge_are_solved_directly(monkeypatch):
    consumer, _ = helpers.make()
    direct = PerKernel()(consumer, KEPT)
    monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    monkeypatch.setattr(linalg, "_ITERATIONS", 1)
    monkeypatch.setattr(linalg, "_PRECONDITIONER_RANK", 1)
    torch.testing.assert_close(PerKernel()(consumer, KEPT), direct)


@pytest.mark.parametrize("iterative", [False, True], ids=["direct", "iterative"])
def test_dead_outputs_and_outputs_without_kept_weights_keep_their_sliced_weight(monkeypatch, iterative):
    if iterative:
        monkeypatch.setattr(module, "_ITERATIVE_FROM", 1)
    consumer, data = helpers.make()
    weight = consumer.weight.clone()
    weight[1] = 0
    weight[2, KEPT] = 0
    consumer = helpers.of(data, weight, 6)
    compensated = PerKernel()(consumer, KEPT)
    assert compensated[1].eq(0).all() and compensated[2].eq(0).all()
    assert compensated[0].ne(weight[0, KEPT]).all()


@pytest.mark.parametrize("per", [1, 3])
def test_no_compensation_is_slicing(per):
    consumer, _ = helpers.make(per=per)
    expected = consumer.weight.view(4, 6, per)[:, KEPT].flatten(1)
    assert torch.equal(NoCompensation()(consumer, KEPT), expected)


@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
def test_the_restored_constant_makes_the_mean_output_equal(rows):
    consumer, data = helpers.make(per=2, rows=rows)
    weight = PerKernel()(consumer, KEPT)
    before = (data @ consumer.weight.T).mean(0)
    after = (data[:, feature_index(KEPT, 2)] @ weight.T).mean(0)
    torch.testing.assert_close(after + restored_constant(consumer, KEPT, weight), before, rtol=1e-5, atol=1e-5)


def test_too_few_rows_for_an_exact_solve_says_how_many_are_needed():
    consumer, _ = helpers.make(per=3, rows=5, name="layer4.1.conv2")
    message = (
        r"layer4\.1\.conv2: an exact solve needs at least 12 calibration rows, got 5\. "
        r"Raise data\.num_samples or set compensation\.ridge above 0\."
    )
    with pytest.raises(NumericsError, match=message):
        PerKernel(ridge=0)(consumer, KEPT)


@pytest.mark.parametrize("ridge", [-1.0, float("nan")])
def test_a_bad_ridge_is_refused(ridge):
    with pytest.raises(ConfigError, match=r"compensation\.ridge must be a number of at least 0, got"):
        PerKernel(ridge=ridge)


def test_a_bad_direction_is_refused():
    with pytest.raises(ConfigError, match=r"compensation\.towards must be 'weights' or 'zero', got 'one'"):
        PerKernel(towards="one")


def test_a_dead_layer_is_an_error_that_names_it():
    consumer = helpers.of(torch.randn(9, 3), torch.zeros(2, 3), 3, name="fc1")
    with pytest.raises(NumericsError, match=r"fc1: at least one output must have energy"):
        PerKernel()(consumer, torch.tensor([0, 1]))


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2, 0.3])
@pytest.mark.parametrize("per", [1, 3])
@pytest.mark.parametrize("rows", [80, 5, 3], ids=["second_moment", "samples", "samples_in_a_basis"])
def test_joint_weights_are_ridge_least_squares_on_the_rows(centred, ridge, per, rows):
    consumer, data = helpers.make(per=per, rows=rows, centred=centred)
    features = feature_index(KEPT, per).tolist()
    expected = reference.joint_weight(data, consumer.weight, features, ridge=ridge, centred=centred)
    # Moments come from float32 products, and a small ridge magnifies their rounding.
    tolerance = 2e-5 if ridge > 1e-3 else 2e-3
    solution = Joint(ridge=ridge).solve(consumer, KEPT)
    torch.testing.assert_close(solution.weight, expected, rtol=tolerance, atol=tolerance)
    assert solution.ridge == ridge
    assert torch.equal(Joint(ridge=ridge)(consumer, KEPT), solution.weight)


@pytest.mark.parametrize("rows", [80, 5, 3])
@pytest.mark.parametrize("ridge", [1e-8, 1e-4, 1e-2, 1.0, 100.0])
def test_joint_compensation_is_never_worse_than_slicing(rows, ridge):
    for seed in range(3):
        consumer, _ = helpers.make(rows=rows, seed=seed)
        compensated = Joint(ridge=ridge)(consumer, KEPT)
        assert layer_fidelity(consumer, KEPT, compensated) >= layer_fidelity(consumer, KEPT) - 1e-9


@pytest.mark.parametrize("rows", [80, 5])
def test_an_endless_ridge_is_plain_slicing(rows):
    consumer, _ = helpers.make(per=3, rows=rows)
    torch.testing.assert_close(Joint(ridge=1e12)(consumer, KEPT), NoCompensation()(consumer, KEPT))


def test_exact_joint_equals_exact_per_kernel_for_one_feature_and_is_not_worse_for_several():
    for seed in range(4):
        consumer, _ = helpers.make(seed=seed)
        joint, scales = Joint(ridge=0)(consumer, KEPT), PerKernel(ridge=0)(consumer, KEPT)
        torch.testing.assert_close(joint, scales, rtol=1e-7, atol=1e-7)
        wide, _ = helpers.make(per=3, seed=seed)
        joint, scales = Joint(ridge=0)(wide, KEPT), PerKernel(ridge=0)(wide, KEPT)
        assert layer_fidelity(wide, KEPT, joint) > layer_fidelity(wide, KEPT, scales)


def test_joint_keeps_what_does_not_change():
    consumer, data = helpers.make(per=3)
    assert torch.equal(Joint()(consumer, torch.arange(6)), consumer.weight)
    weight = consumer.weight.clone()
    weight[1] = 0
    dead = helpers.of(data, weight, 6)
    assert Joint(ridge=1e-3)(dead, KEPT)[1].eq(0).all()


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
def test_duplicate_channels_do_not_break_the_joint_solve(ridge):
    data = torch.randn(60, 5, generator=torch.Generator().manual_seed(3))
    data = torch.cat([data, data[:, :1], data[:, 1:2]], 1)
    weight = torch.randn(3, 7, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    consumer = helpers.of(data, weight, 7)
    kept = torch.tensor([0, 2, 3, 4, 5, 6])
    compensated = Joint(ridge=ridge)(consumer, kept)
    assert torch.isfinite(compensated).all()
    assert layer_fidelity(consumer, kept, compensated) == pytest.approx(1, abs=1e-5)


def with_held_out(*, rows, held, per, centred, seed=0):
    """A consumer whose last `held` rows are held out, the fit rows and the held-out rows."""
    consumer, data = helpers.make(per=per, rows=rows, centred=centred, seed=seed)
    consumer = helpers.of(data.float(), consumer.weight, 6, centred=centred)
    statistics = helpers.of(data[-held:].float(), consumer.weight, 6).statistics
    return replace(consumer, held_out=statistics), data[:-held].float(), data[-held:].float()


@pytest.mark.parametrize("centred", [True, False], ids=["centred", "raw"])
@pytest.mark.parametrize(
    ("rows", "held", "per"),
    [(90, 30, 1), (40, 5, 1), (40, 12, 3), (16, 4, 3), (10, 3, 3)],
    ids=["both_moments", "held_samples", "few", "all_samples", "samples_in_a_basis"],
)
def test_auto_takes_the_ridge_that_is_best_on_held_out_rows_and_solves_on_all(centred, rows, held, per):
    joint = Joint()
    features = feature_index(KEPT, per).tolist()
    for seed in range(3):
        consumer, fit, out = with_held_out(rows=rows, held=held, per=per, centred=centred, seed=seed)
        solution = joint.solve(consumer, KEPT)
        assert solution.ridge == reference.held_out_ridge(
            fit, out, consumer.weight, features, joint.grid, centred=centred
        )
        every = Joint(ridge=solution.ridge)(consumer, KEPT)
        torch.testing.assert_close(solution.weight, every, rtol=1e-9, atol=1e-9)


def test_auto_takes_a_larger_ridge_from_fewer_rows():
    few, many = [], []
    for seed in range(6):
        few.append(Joint().solve(with_held_out(rows=20, held=6, per=3, centred=True, seed=seed)[0], KEPT).ridge)
        many.append(Joint().solve(with_held_out(rows=900, held=90, per=3, centred=True, seed=seed)[0], KEPT).ridge)
    assert sum(few) > sum(many)


def test_auto_without_held_out_rows_is_a_fixed_ridge():
    consumer, _ = helpers.make()
    assert consumer.held_out is None
    assert Joint().solve(consumer, KEPT).ridge == 1e-2


def test_only_the_automatic_ridge_wants_held_out_rows():
    assert Joint().wants_held_out and Joint().needs_statistics
    assert not Joint(ridge=1e-3).wants_held_out
    assert not PerKernel().wants_held_out and not NoCompensation().wants_held_out


def test_held_out_rows_that_are_not_a_part_are_a_defect():
    consumer, _ = helpers.make()
    with pytest.raises(ValueError, match="held-out rows must be some of the 80 rows, got 80"):
        Joint()(replace(consumer, held_out=consumer.statistics), KEPT)


def test_too_few_rows_for_an_exact_joint_solve_says_how_many_are_needed():
    consumer, _ = helpers.make(per=3, rows=5, name="layer4.1.conv2")
    message = r"layer4\.1\.conv2: an exact solve needs at least 12 calibration rows, got 5\. Raise data\.num_samples"
    with pytest.raises(NumericsError, match=message):
        Joint(ridge=0)(consumer, KEPT)


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), "best", True])
def test_a_bad_joint_ridge_is_refused(ridge):
    with pytest.raises(ConfigError, match=r"compensation\.ridge must be 'auto' or a number of at least 0, got"):
        Joint(ridge=ridge)


@pytest.mark.parametrize("grid", [(), (0.0, 1.0), (float("inf"),)])
def test_a_bad_ridge_grid_is_refused(grid):
    with pytest.raises(ConfigError, match=r"compensation\.grid must hold at least one ridge, all above 0, got"):
        Joint(grid=grid)


def test_joint_refuses_weights_that_are_not_finite():
    consumer, _ = helpers.make(name="fc1")
    weight = consumer.weight.clone()
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"fc1: every weight must be finite"):
        Joint()(replace(consumer, weight=weight), KEPT)


@pytest.mark.parametrize("rows", [80, 5], ids=["second_moment", "samples"])
@pytest.mark.parametrize("centred", [True, False])
def test_a_ridge_towards_zero_is_plain_least_squares_for_the_whole_output(rows, centred):
    consumer, data = helpers.make(per=2, rows=rows, centred=centred)
    features = feature_index(KEPT, 2)
    solved = Joint(ridge=0.1, towards="zero")(consumer, KEPT)
    x = (data - data.mean(0) if centred else data).double()
    root = (0.1 * x[:, features].square().sum(0).mean()).sqrt() * torch.eye(len(features), dtype=torch.float64)
    matrix = torch.cat([x[:, features], root])
    target = torch.cat([x @ consumer.weight.double().T, torch.zeros(len(features), 4, dtype=torch.float64)])
    expected = torch.linalg.lstsq(matrix, target).solution.T
    torch.testing.assert_close(solved, expected, rtol=1e-4, atol=1e-4)


def test_a_ridge_towards_zero_knows_its_own_output_alone():
    with pytest.raises(ConfigError, match="towards=zero is for compensation.reference=current"):
        Joint(towards="zero", reference="dense")
    with pytest.raises(ConfigError, match="compensation.towards must be 'weights' or 'zero', got 'one'"):
        Joint(towards="one")


@pytest.mark.parametrize("lowest", range(10))
def test_going_downhill_finds_the_lowest_ridge_of_ten_without_trying_all(lowest):
    grid, asked = Joint().grid, []

    def loss(ridge):
        asked.append(ridge)
        return abs(sorted(grid).index(ridge) - lowest) + 1.0

    assert downhill(grid, loss) == (sorted(grid)[lowest], 1.0)
    assert len(asked) == len(set(asked)) <= 3 + abs(lowest - 4)


def test_of_equal_losses_the_larger_ridge_is_taken_and_a_loss_that_is_no_number_is_passed_over():
    assert downhill((1e-3, 1e-2, 1e-1), lambda ridge: 2.0) == (1e-1, 2.0)
    assert downhill((1e-3, 1e-2, 1e-1), lambda ridge: 2.0 if ridge < 1e-1 else float("nan")) == (1e-2, 2.0)
    assert downhill((1.0,), lambda ridge: 3.0) == (1.0, 3.0)


def test_ridges_of_many_outputs_are_compared_by_mixtures_and_judged_by_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)

    def regression(rows):
        x = torch.randn(rows, 24, generator=generator, dtype=torch.float64)
        t = x @ slope.T + 3 * torch.randn(rows, 200, generator=generator, dtype=torch.float64)
        return Regression(rows, x.T @ x / rows, t.T @ x / rows, x.mean(0), t.mean(0), 24)

    slope = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    fitted, held_out = regression(60), regression(20)
    weighed = {
        name: (60 * getattr(fitted, name) + 20 * getattr(held_out, name)) / 80
        for name in ("gram", "cross", "inputs", "targets")
    }
    every = Regression(80, **weighed, features=24)
    mixed = Joint().fit(every, held_out, centred=False)
    unjudged = Joint().fit(every, held_out, centred=False, judge=False)
    monkeypatch.setattr(module, "_MOST_OUTPUTS", 200)
    whole = Joint().fit(every, held_out, centred=False)
    assert mixed[1] == unjudged[1] and unjudged[2] is None and torch.equal(mixed[0], unjudged[0])
    assert mixed[2] == pytest.approx(held_out.loss(fitted.solve(mixed[1]))), "what is gained is told of all outputs"
    assert whole[2] <= mixed[2] < 0.98 * whole[2], "the ridge is the best one or as good"
