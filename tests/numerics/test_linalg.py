"""Positive solves and block-triangular Grams."""

import pytest
import torch

from modhifi_cli.numerics import linalg
from modhifi_cli.numerics.linalg import (
    add_gram_,
    feature_index,
    mirror_upper_,
    partial_cholesky,
    solve_positive,
    solve_scaled,
    solve_shared,
)
from tests import reference


def test_a_batch_with_sound_and_singular_systems_is_solved_each_its_own_way():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    root[1, :, 3] = root[1, :, 0]
    root[2] = 0
    matrices = root.transpose(1, 2) @ root
    targets = (matrices @ torch.randn(3, 6, 1, generator=generator, dtype=torch.float64))[..., 0]
    solved = solve_positive(matrices, targets)
    for matrix, target, got in zip(matrices, targets, solved, strict=True):
        torch.testing.assert_close(got, reference.least_squares(matrix, target), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("features", [3, 256, 300])
def test_grams_are_complete_after_mirroring(features):
    columns = torch.randn(features, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = torch.zeros(features, features, dtype=torch.float64)
    add_gram_(total, columns)
    torch.testing.assert_close(mirror_upper_(total), columns @ columns.T)


def test_features_of_components_are_consecutive():
    assert feature_index(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]


def _decaying(size, seed):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * 0.8 ** torch.arange(size)) @ basis.T, generator


@pytest.mark.parametrize("rank", [0, 3, 40])
@pytest.mark.parametrize("chunk", [1, 2**28], ids=["many_chunks", "one_chunk"])
def test_systems_that_share_a_matrix_are_solved_like_each_alone(monkeypatch, rank, chunk):
    monkeypatch.setattr(linalg, "_PRECONDITIONER_RANK", rank)
    monkeypatch.setattr(linalg, "_CHUNK_BYTES", chunk)
    matrix, generator = _decaying(40, 2)
    scales = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    scales[1] = 0
    scales[:, 7] = 0
    targets = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    targets[3] = 0
    ridge = torch.full((5,), 1e-3, dtype=torch.float64)
    solved, converged = solve_scaled(matrix, scales, ridge, targets)
    assert converged.all()
    for scale, target, got in zip(scales, targets, solved, strict=True):
        system = matrix * scale * scale[:, None] + 1e-3 * torch.eye(40, dtype=torch.float64)
        torch.testing.assert_close(got, torch.linalg.solve(system, target), rtol=1e-5, atol=1e-6)


def test_systems_that_did_not_converge_are_told(monkeypatch):
    monkeypatch.setattr(linalg, "_PRECONDITIONER_RANK", 1)
    monkeypatch.setattr(linalg, "_ITERATIONS", 2)
    matrix, generator = _decaying(40, 3)
    targets = torch.randn(2, 40, generator=generator, dtype=torch.float64)
    targets[1] = 0
    ones = torch.ones(2, 40, dtype=torch.float64)
    assert solve_scaled(matrix, ones, 1e-6 * ones[:, 0], targets)[1].tolist() == [False, True]


@pytest.mark.parametrize("rank", [4, 12])
def test_a_partial_cholesky_factor_stays_below_the_matrix(rank):
    matrix, _ = _decaying(12, 4)
    factor, rest = partial_cholesky(matrix, rank)
    left = matrix - factor @ factor.T
    torch.testing.assert_close(left.diagonal(), rest, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh(left).min() > -1e-12


@pytest.mark.parametrize("rank", [6, 4], ids=["definite", "singular"])
def test_a_shared_solve_is_least_norm_least_squares_for_every_target(rank):
    generator = torch.Generator().manual_seed(1)
    half = torch.randn(rank, 6, generator=generator, dtype=torch.float64)
    targets = torch.randn(5, rank, generator=generator, dtype=torch.float64) @ half
    expected = torch.stack([reference.least_squares(half.T @ half, target) for target in targets])
    torch.testing.assert_close(solve_shared(half.T @ half, targets), expected, rtol=1e-7, atol=1e-7)
