"""The local search: its errors and gains against elimination and refits, and that it never makes a set worse."""

import pytest
import torch

from modhifi_cli.errors import ConfigError
from modhifi_cli.numerics import exchange as module
from modhifi_cli.numerics.elimination import elimination
from modhifi_cli.numerics.exchange import exchange
from modhifi_cli.numerics.fidelity import joint_fidelity
from modhifi_cli.numerics.selection import Greedy
from tests.numerics import helpers


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("per", [1, 2])
def test_errors_and_gains_are_those_of_refitting(per, centred):
    consumer, _ = helpers.make(components=8, per=per, in_group=7, centred=centred)
    other, _ = helpers.make(components=7, outputs=3, seed=5)
    kept = torch.tensor([0, 2, 5])

    def lost(chosen):
        whole = torch.cat([chosen, torch.tensor([7])])
        return 2 - joint_fidelity(consumer, whole) - joint_fidelity(other, chosen)

    error, gains = module._look([consumer, other], kept, 1e-9)
    assert error == pytest.approx(lost(kept), abs=1e-6)
    for added in (1, 3, 4, 6):
        more = torch.cat([kept, torch.tensor([added])]).sort().values
        assert float(gains[added]) == pytest.approx(lost(kept) - lost(more), abs=1e-6)
    assert gains[kept].eq(-torch.inf).all()


@pytest.mark.parametrize("per", [1, 2])
def test_the_search_lowers_the_error_of_bad_sets_and_raises_that_of_none(per):
    for seed in range(6):
        consumer, _ = helpers.make(components=16, per=per, rows=300, seed=seed)
        bad = torch.arange(8)
        found = exchange([consumer], bad, rounds=40, ridge=1e-8)
        assert len(found.kept) == 8 and found.kept.tolist() == sorted(set(found.kept.tolist()))
        assert list(found.errors) == sorted(found.errors, reverse=True)
        assert joint_fidelity(consumer, found.kept) > joint_fidelity(consumer, bad)
        assert 1 - found.errors[-1] == pytest.approx(joint_fidelity(consumer, found.kept), abs=1e-5)
        greedy = elimination([consumer], keep=8).kept(8)
        better = exchange([consumer], greedy, rounds=20).kept
        assert joint_fidelity(consumer, better) >= joint_fidelity(consumer, greedy) - 1e-6


def test_greedy_with_swaps_finds_what_it_cannot_see_backwards():
    gains = []
    for seed in range(12):
        consumer, _ = helpers.make(components=12, rows=200, seed=seed)
        plain, swapped = (
            joint_fidelity(consumer, Greedy(swaps=rounds)(None, [consumer], keep=3)) for rounds in (0, 20)
        )
        gains.append(swapped - plain)
    assert min(gains) >= -1e-6 and max(gains) > 0.001


def test_no_rounds_everything_kept_and_wide_layers_are_left_as_they_are(monkeypatch):
    consumer, _ = helpers.make()
    kept = torch.tensor([0, 1, 3])
    assert torch.equal(exchange([consumer], kept, rounds=0).kept, kept)
    assert torch.equal(exchange([consumer], torch.arange(6), rounds=5).kept, torch.arange(6))
    monkeypatch.setattr(module, "_WIDEST", 2)
    assert torch.equal(exchange([consumer], kept, rounds=9).kept, kept)


@pytest.mark.parametrize("swaps", [-1, 0.5, True])
def test_a_bad_number_of_swaps_is_refused(swaps):
    with pytest.raises(ConfigError, match=r"selection\.swaps must be a whole number of at least 0, got"):
        Greedy(swaps=swaps)
