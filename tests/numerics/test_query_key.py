"""Fewer features of queries and keys: the closed form is the least error of the logits, and the spectrum says it."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics.query_key import query_key_spectrum, reduce_query_key


def rows(seed=0, tokens=300, features=8):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, features, features, generator=generator, dtype=torch.float64)
    drawn = torch.randn(2, tokens, features, generator=generator, dtype=torch.float64) + 0.5
    return drawn[0] @ mixing[0], drawn[1] @ mixing[1]


def moments(queries, keys):
    return queries.mT @ queries / len(queries), keys.mT @ keys / len(keys)


def lost(queries, keys, first, second):
    """Mean squared error of the logits over all pairs of rows, as a share of their energy."""
    logits = queries @ keys.mT
    return float((logits - queries @ first @ second.mT @ keys.mT).square().sum() / logits.square().sum())


@pytest.mark.parametrize("kept", [1, 3, 5, 8])
def test_the_error_is_what_the_logits_lose_and_no_other_basis_loses_less(kept):
    queries, keys = rows()
    found = reduce_query_key(*moments(queries, keys), kept)
    assert found.queries.shape == found.keys.shape == (8, kept)
    assert lost(queries, keys, found.queries, found.keys) == pytest.approx(found.error, abs=1e-12)
    # Eckart and Young: no product of this rank is nearer to the logits.
    left, sizes, right = torch.linalg.svd(queries @ keys.mT, full_matrices=False)
    least = float(sizes[kept:8].square().sum() / sizes.square().sum())
    assert found.error == pytest.approx(least, abs=1e-12)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        step = 1e-3 * torch.randn(8, kept, generator=generator, dtype=torch.float64)
        assert lost(queries, keys, found.queries + step, found.keys) > found.error - 1e-12


def test_the_spectrum_is_the_energy_of_the_logits_part_by_part():
    pairs = [rows(seed) for seed in (0, 1)]
    both = [torch.stack(one) for one in zip(*(moments(*pair) for pair in pairs), strict=True)]
    spectrum = query_key_spectrum(*both)
    for energies, (queries, keys) in zip(spectrum, pairs, strict=True):
        assert float(energies.sum()) == pytest.approx(float((queries @ keys.mT).square().mean()), rel=1e-10)
        assert bool((energies.diff() <= 0).all())


def test_a_head_whose_queries_lie_in_fewer_features_loses_nothing_without_the_others():
    queries, keys = rows()
    queries[:, 4:] = 0
    found = reduce_query_key(*moments(queries, keys), 4)
    assert found.error < 1e-12
    assert lost(queries, keys, found.queries, found.keys) < 1e-12


@pytest.mark.parametrize("kept", [0, 9])
def test_a_number_of_features_that_is_not_there_is_refused(kept):
    with pytest.raises(NumericsError, match=r"attn: between 1 and 8 query/key features can be kept"):
        reduce_query_key(torch.eye(8), torch.eye(8), kept, name="attn")


def test_moments_that_are_not_finite_are_refused():
    with pytest.raises(NumericsError, match="blocks.0: moments of queries and keys must be finite"):
        query_key_spectrum(torch.full((1, 4, 4), float("nan")), torch.eye(4)[None], name="blocks.0")
