"""Positive solves and block-triangular Grams."""

import pytest
import torch

from modhifi_cli.numerics.linalg import add_gram_, feature_index, mirror_upper_, solve_positive
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
