"""Contribution moments and similarity matrices against materialised contributions, from both forms of statistics."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics import contributions as module
from modhifi_cli.numerics.contributions import contribution_moments, similarity
from tests import reference
from tests.numerics import helpers

CASES = pytest.mark.parametrize(
    "case",
    [dict(per=per, rows=rows, centred=centred) for per in (1, 3) for rows in (80, 5) for centred in (True, False)],
    ids=str,
)


@CASES
def test_contribution_moments_are_means_over_explicit_contributions(case):
    consumer, rows = helpers.make(**case)
    assert (consumer.statistics.samples is not None) == (case["rows"] == 5)
    parts = reference.contributions(rows, consumer.weight, consumer.components, centred=case["centred"])
    output = parts.sum(2, keepdim=True)
    moments = contribution_moments(consumer)
    torch.testing.assert_close(moments.r, (output * parts).mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.d, parts.square().mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.e, output.square().mean((1, 2)), rtol=1e-5, atol=1e-5)


@CASES
@pytest.mark.parametrize("kept", [None, [1, 2, 5]], ids=["all", "kept"])
@pytest.mark.parametrize("tight", [False, True], ids=["one_chunk", "many_chunks"])
def test_similarity_is_the_gram_of_explicit_contributions(monkeypatch, case, kept, tight):
    if tight:
        monkeypatch.setattr(module, "_CHUNK_BYTES", 8)
        monkeypatch.setattr(module, "_CACHED_VALUES", 1)
    consumer, rows = helpers.make(**case)
    parts = reference.contributions(rows, consumer.weight, consumer.components, centred=case["centred"])
    expected = torch.einsum("cri,crj->cij", parts, parts) / len(rows)
    if kept is not None:
        expected = expected[:, kept][:, :, kept]
        kept = torch.tensor(kept)
    torch.testing.assert_close(similarity(consumer, kept=kept), expected, rtol=1e-5, atol=1e-5)
    some = similarity(consumer, outputs=torch.tensor([3, 1]), kept=kept)
    torch.testing.assert_close(some, expected[[3, 1]], rtol=1e-5, atol=1e-5)
    one = similarity(consumer, outputs=slice(1, 2), kept=kept)
    torch.testing.assert_close(one, expected[1:2], rtol=1e-5, atol=1e-5)


def test_contribution_moments_in_small_chunks_are_the_same(monkeypatch):
    consumer, _ = helpers.make(per=3, rows=5)
    whole = contribution_moments(consumer)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 8)
    small = contribution_moments(consumer)
    for field in ("r", "d", "e"):
        torch.testing.assert_close(getattr(small, field), getattr(whole, field))


def test_weights_that_are_not_finite_name_the_layer():
    consumer, _ = helpers.make(name="layer2.0.conv1")
    consumer.weight[1, 1] = float("nan")
    with pytest.raises(NumericsError, match=r"layer2\.0\.conv1: every weight must be finite, got NaN or infinity"):
        contribution_moments(consumer)
