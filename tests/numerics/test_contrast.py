"""The closed form of unlearning against least squares on stacked rows, and what it promises for every β."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.contrast import Aim, Asked, Group, aim_at, choose_ridge, contrast
from modhifi_cli.numerics.moments import RowMoments
from modhifi_cli.records import Statistics

FEATURES, OUTPUTS = 7, 4


def moments(rows) -> Statistics:
    accumulator = RowMoments(rows.shape[1])
    accumulator.update(rows)
    return accumulator.result()


def mean_aim(weight, bias, retain: Statistics, forget: Statistics) -> Aim:
    """The default: every forget row to the mean output of the retain rows, one position."""
    outputs = (weight @ retain.mean + bias)[:, None]
    group = Group(1.0, forget.mean[:, None], torch.zeros(OUTPUTS, 1).double())
    return aim_at(weight, bias, forget, [group], retain_outputs=outputs, forget_outputs=torch.full_like(outputs, 9.0))


@pytest.fixture
def layer():
    torch.manual_seed(0)
    retain, forget = torch.randn(60, FEATURES) + 0.3, torch.randn(25, FEATURES) * 0.7 - 0.5
    return torch.randn(OUTPUTS, FEATURES).double(), torch.randn(OUTPUTS).double(), retain, forget


def stacked(weight, bias, retain, forget, targets, *, beta, ridge, constant):
    """The minimiser of the three terms by lstsq on stacked rows: change of (W, b), ``[outputs, features + 1]``."""
    energy = float(retain.double().square().mean())

    def widened(rows):
        return torch.cat([rows.double(), torch.ones(len(rows), 1) * float(constant)], 1)

    anchor = torch.eye(FEATURES, FEATURES + 1).double() * (ridge * energy) ** 0.5
    whole = torch.cat([weight, bias[:, None]], 1)
    outputs = torch.cat([forget.double(), torch.ones(len(forget), 1)], 1) @ whole.T
    matrix = torch.cat([widened(retain) / len(retain) ** 0.5, widened(forget) * (beta / len(forget)) ** 0.5, anchor])
    target = torch.cat(
        [
            torch.zeros(len(retain), OUTPUTS),
            (targets - outputs) * (beta / len(forget)) ** 0.5,
            torch.zeros(FEATURES, OUTPUTS),
        ]
    )
    return torch.linalg.lstsq(matrix, target, driver="gelsd").solution.T


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("beta", [0.1, 3.0])
@pytest.mark.parametrize("ridge", [0.0, 0.2])
def test_the_closed_form_is_the_least_squares_solution_on_stacked_rows(layer, constant, beta, ridge):
    weight, bias, retain, forget = layer
    targets = torch.randn(len(forget), OUTPUTS).double()
    aim = Aim(targets.T @ forget.double() / len(forget), targets.mean(0))
    found = contrast(
        weight, bias, Asked(moments(retain), moments(forget), aim), beta=beta, ridge=ridge, constant=constant
    )
    change = stacked(weight, bias, retain, forget, targets, beta=beta, ridge=ridge, constant=constant)
    assert torch.allclose(found.weight - weight, change[:, :-1], atol=1e-6)
    assert torch.allclose(found.constant, change[:, -1], atol=1e-6)
    assert constant or not found.constant.any()


def test_no_weight_on_the_forget_rows_changes_nothing_exactly(layer):
    weight, bias, retain, forget = layer
    r, f = moments(retain), moments(forget)
    found = contrast(weight, bias, Asked(r, f, mean_aim(weight, bias, r, f)), beta=0.0, ridge=1e-3)
    assert torch.equal(found.weight, weight)
    assert not found.constant.any()
    assert found.moved == 0 and found.lost == 0


def test_more_weight_moves_the_forget_rows_further_and_costs_more(layer):
    weight, bias, retain, forget = layer
    r, f = moments(retain), moments(forget)
    aim = mean_aim(weight, bias, r, f)
    found = [contrast(weight, bias, Asked(r, f, aim), beta=beta, ridge=1e-3) for beta in (0.1, 1, 10, 1e6)]
    assert [c.moved for c in found] == sorted(c.moved for c in found)
    assert [c.lost for c in found] == sorted(c.lost for c in found)
    assert found[-1].moved == pytest.approx(1, abs=1e-3)


def test_the_default_aim_is_the_mean_output_of_the_retain_rows(layer):
    weight, bias, retain, forget = layer
    aim = mean_aim(weight, bias, moments(retain), moments(forget))
    mean = (retain.double() @ weight.T + bias).mean(0)
    assert torch.allclose(aim.mean, mean, atol=1e-6)
    assert torch.allclose(aim.cross, mean[:, None] * forget.double().mean(0), atol=1e-6)


def test_an_aim_from_mean_maps_is_that_of_every_row_written_out(layer):
    weight, bias, _, _ = layer
    # 6 forget samples of 3 positions in two groups; the targets differ from position to position.
    samples = torch.randn(6, 3, FEATURES).double()
    group = torch.tensor([0, 0, 1, 1, 1, 1])
    retain_outputs, forget_outputs = torch.randn(2, OUTPUTS, 3).double()
    kinds = torch.randn(2, OUTPUTS, 3).double()
    nearest, spread = 0.3, 0.6
    outputs = samples @ weight.T + bias
    targets = spread * (outputs - forget_outputs.T) + (1 - nearest) * retain_outputs.T + nearest * kinds.mT[group]
    rows = samples.flatten(0, 1)
    groups = [Group(float((group == k).double().mean()), samples[group == k].mean(0).T, kinds[k]) for k in (0, 1)]
    aim = aim_at(
        weight, bias, moments(rows), groups, retain_outputs=retain_outputs, forget_outputs=forget_outputs,
        nearest=nearest, spread=spread,
    )  # fmt: skip
    assert torch.allclose(aim.mean, targets.flatten(0, 1).mean(0), atol=1e-6)
    assert torch.allclose(aim.cross, targets.flatten(0, 1).T @ rows / len(rows), atol=1e-6)


@pytest.mark.parametrize("term", ["beta", "ridge"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_a_weight_below_zero_or_not_finite_is_refused(layer, term, value):
    weight, bias, retain, forget = layer
    r, f = moments(retain), moments(forget)
    settings = {"beta": 1.0, "ridge": 0.1, term: value}
    with pytest.raises(NumericsError, match=f"conv9: {term} must be a finite number from 0"):
        contrast(weight, bias, Asked(r, f, mean_aim(weight, bias, r, f)), name="conv9", **settings)


def test_a_weight_that_is_not_finite_is_named(layer):
    weight, bias, retain, forget = layer
    r, f = moments(retain), moments(forget)
    weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="conv9: the weight must be finite"):
        contrast(weight, bias, Asked(r, f, mean_aim(weight, bias, r, f)), beta=1, ridge=0, name="conv9")


def asked(retain, wanted, forget, moved) -> Asked:
    """Rows with what is wanted there."""
    aims = [Aim(t.T.double() @ x.double() / len(x), t.double().mean(0)) for x, t in ((forget, moved), (retain, wanted))]
    return Asked(moments(retain), moments(forget), *aims)


@pytest.mark.parametrize("worth", [None, torch.tensor([1.0, 0.0, 2.0, 0.5])])
def test_the_ridge_is_the_largest_that_serves_other_rows_about_as_well_as_any(layer, worth):
    """Against the errors themselves, row by row."""
    weight, bias, *_ = layer
    torch.manual_seed(1)
    true = torch.randn(OUTPUTS, FEATURES)

    def rows(count):
        x, f = torch.randn(count, FEATURES), torch.randn(count, FEATURES) - 1
        return x, x @ true.T + 3 * torch.randn(count, OUTPUTS), f, f @ true.T + 3 * torch.randn(count, OUTPUTS)

    few, others = rows(9), rows(40)
    beta, ridges = 0.7, (1e-3, 0.03, 0.3, 3.0, 30.0)

    def error(change):
        total = 0.0
        for share, x, t in ((1.0, *others[:2]), (beta, *others[2:])):
            given = x.double() @ (weight + change[0]).T + bias + change[1]
            square = (given - t.double()).square().mean(0)
            total += share * float(square.sum() if worth is None else (square * worth.double().square()).sum())
        return total

    nothing = error((0, 0))
    gains = {}
    for ridge in ridges:
        found = contrast(weight, bias, asked(*few), beta=beta, ridge=ridge)
        gains[ridge] = nothing - error((found.weight - weight, found.constant))
    expected = max(ridge for ridge in ridges if gains[ridge] >= 0.95 * max(gains.values()))
    assert ridges[0] < expected
    assert choose_ridge(weight, bias, (asked(*few), asked(*others)), beta=beta, ridges=ridges, worth=worth) == expected


def test_where_nothing_serves_other_rows_the_largest_ridge_is_chosen(layer):
    weight, bias, retain, forget = layer

    def wanted(sign):
        return asked(retain, sign * torch.ones(60, OUTPUTS) * 50, forget, sign * torch.ones(25, OUTPUTS) * 50)

    assert choose_ridge(weight, bias, (wanted(1), wanted(-1)), beta=1.0, ridges=(0.1, 1.0, 10.0)) == 10.0
