"""Rows: the one unfold, its order, and rows at chosen positions."""

import pytest
import torch
from torch import nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.numerics.rows import Window, draw_positions, rows_at, rows_of, unfold_rows
from tests import reference

GEOMETRIES = [
    dict(kernel_size=(1, 1)),
    dict(kernel_size=(1, 1), stride=(2, 2)),
    dict(kernel_size=(3, 3), padding=(1, 1)),
    dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
    dict(kernel_size=(3, 3), padding=(2, 2), dilation=(2, 2)),
    dict(kernel_size=(3, 2), stride=(1, 2), padding=(0, 1)),
    dict(kernel_size=(5, 5), padding=(2, 2)),
]


def _by_loops(maps, kernel_size, **settings):
    return reference.patches(maps, kernel_size, **settings)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows_are_the_patches_in_component_major_order(geometry):
    maps = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(0))
    rows = unfold_rows(maps, Window.of(**geometry))
    torch.testing.assert_close(rows.double(), _by_loops(maps, **geometry))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows_times_flat_weight_is_the_convolution(geometry):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(2, 3, 6, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 3, *geometry["kernel_size"], generator=generator, dtype=torch.float64)
    settings = {key: value for key, value in geometry.items() if key != "kernel_size"}
    output = torch.nn.functional.conv2d(maps, weight, **settings)
    rows = unfold_rows(maps, Window.of(**geometry)) @ weight.flatten(1).T
    torch.testing.assert_close(rows, output.permute(0, 2, 3, 1).reshape(-1, 4))


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_rows_at_positions_are_those_rows(geometry):
    generator = torch.Generator().manual_seed(2)
    maps = torch.randn(3, 2, 7, 6, generator=generator)
    down, across = Window.of(**geometry).output_size(7, 6)
    positions = draw_positions(3, down * across, 4, generator=generator)
    rows = unfold_rows(maps, Window.of(**geometry)).view(3, down * across, -1)
    expected = torch.stack([image[chosen] for image, chosen in zip(rows, positions, strict=True)]).flatten(0, 1)
    assert torch.equal(rows_at(maps, positions, Window.of(**geometry)), expected)


def test_positions_are_distinct_and_do_not_depend_on_the_batch_split():
    whole = draw_positions(5, 9, 4, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    parts = [draw_positions(count, 9, 4, generator=generator) for count in (2, 3)]
    assert torch.equal(whole, torch.cat(parts))
    assert all(len(set(image.tolist())) == 4 for image in whole)
    assert draw_positions(2, 3, 10, generator=generator).shape == (2, 3)


def test_linear_rows_keep_the_last_axis():
    inputs = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(unfold_rows(inputs), inputs.view(6, 4))
    assert torch.equal(rows_of(nn.Linear(4, 2), inputs), inputs.view(6, 4))


def test_rows_of_a_convolution_follow_its_geometry():
    maps = torch.randn(2, 3, 5, 6)
    assert torch.equal(rows_of(nn.Conv2d(3, 4, 3, stride=2, padding=1), maps), unfold_rows(maps, Window.of(3, 2, 1)))


def test_same_padding_is_understood_and_a_lopsided_one_refused():
    assert Window.of(3, padding="same", dilation=2).padding == (2, 2)
    assert Window.of(3, padding="valid").padding == (0, 0)
    with pytest.raises(UnsupportedModelError, match=r"padding='same' needs an odd extent.*exclude"):
        Window.of(4, padding="same")
