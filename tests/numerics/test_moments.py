"""Streaming moments against explicit patches: exact for every geometry, whatever the batches."""

import pytest
import torch

from modhifi_cli.errors import NumericsError
from modhifi_cli.numerics import moments as module
from modhifi_cli.numerics.moments import ConvMoments, RowMoments, merge, reorder, second_moment
from modhifi_cli.numerics.rows import Window
from tests import reference

# float32 products against float64: a few units in the last place of sums of a few hundred terms of size one.
CLOSE = dict(rtol=2e-5, atol=2e-6)

GEOMETRIES = [
    ((1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1), (2, 2), (0, 0), (1, 1)),
    ((1, 1), (1, 1), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (1, 1), (1, 1)),
    ((5, 5), (1, 1), (2, 2), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 3), (1, 1), (2, 2), (2, 2)),
    ((3, 3), (1, 1), (0, 0), (1, 1)),
    ((3, 1), (1, 1), (1, 0), (1, 1)),
]


def _maps(batch, channels, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator) + 0.5


def _check(statistics, rows):
    assert statistics.rows == len(rows)
    torch.testing.assert_close(statistics.mean, rows.mean(0), **CLOSE)
    moment = second_moment(statistics, centred=False)
    assert moment.dtype == torch.float64
    torch.testing.assert_close(moment, rows.T @ rows / len(rows), **CLOSE)
    torch.testing.assert_close(moment, moment.T, rtol=0, atol=0)
    centred = rows - rows.mean(0)
    torch.testing.assert_close(second_moment(statistics, centred=True), centred.T @ centred / len(rows), **CLOSE)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_conv_moments_are_those_of_the_patches(geometry):
    maps = _maps(5, 3, 6, 7)
    moments = ConvMoments(3, Window.of(*geometry))
    moments.update(maps[:2])
    moments.update(maps[2:])
    _check(moments.result(), reference.patches(maps, *geometry))


@pytest.mark.parametrize("thin", [128, 0], ids=["weight_gradient", "shifted_products"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 2), (3, 5), (8, 3)], ids=str)
@pytest.mark.parametrize("kernel", [3, 5])
def test_shared_taps_are_exact_at_the_borders_of_small_maps(monkeypatch, thin, size, kernel):
    monkeypatch.setattr(module, "_THIN_CHANNELS", thin)
    maps = _maps(6, 3, *size)
    moments = ConvMoments(3, Window.of(kernel, 1, kernel // 2))
    moments.update(maps)
    assert moments._shared is not None
    rows = torch.nn.functional.unfold(maps.double(), kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    _check(moments.result(), rows)


def test_second_moment_does_not_depend_on_batch_split():
    maps = _maps(12, 4, 5, 5)
    results = []
    for sizes in ([12], [1] * 12, [5, 7]):
        moments = ConvMoments(4, Window.of(3, 1, 1))
        for part in maps.split(sizes):
            moments.update(part)
        results.append(moments.result())
    for other in results[1:]:
        assert other.rows == results[0].rows
        torch.testing.assert_close(other.second_moment, results[0].second_moment, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.mean, results[0].mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("thin", [128, 0], ids=["weight_gradient", "shifted_products"])
def test_second_moment_does_not_depend_on_the_memory_chunk(monkeypatch, thin):
    monkeypatch.setattr(module, "_THIN_CHANNELS", thin)
    channels = 4
    maps = _maps(6, channels, 4, 4)
    whole, strided = ConvMoments(channels, Window.of(3, 1, 1)), ConvMoments(channels, Window.of(3, 2, 1))
    whole.update(maps), strided.update(maps)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    small, small_strided = ConvMoments(channels, Window.of(3, 1, 1)), ConvMoments(channels, Window.of(3, 2, 1))
    small.update(maps), small_strided.update(maps)
    for one, two in ((whole, small), (strided, small_strided)):
        expected, got = (second_moment(each.result(), centred=False) for each in (one, two))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_rows_are_kept_as_samples_until_they_outnumber_the_features():
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(4))
    moments = RowMoments(6)
    moments.update(rows[:4])
    few = moments.result()
    assert few.second_moment is None and few.samples.shape == (4, 6) and few.samples.dtype == torch.float32
    _check(few, rows[:4].double())
    moments.update(rows[4:])
    many = moments.result()
    assert many.samples is None
    _check(many, rows.double())


def test_kept_samples_do_not_see_later_changes_of_the_input():
    rows = torch.ones(2, 6)
    moments = RowMoments(6)
    moments.update(rows)
    rows.zero_()
    assert moments.result().samples.eq(1).all()


def test_wide_grams_are_complete_and_symmetric():
    rows = torch.randn(700, 600, generator=torch.Generator().manual_seed(5))
    moments = RowMoments(600)
    moments.update(rows)
    expected = rows.double().T @ rows.double() / 700
    torch.testing.assert_close(moments.result().second_moment, expected, **CLOSE)


def test_subsampled_positions_give_a_seeded_unbiased_looking_estimate():
    maps = _maps(400, 2, 6, 6)
    exact, runs = ConvMoments(2, Window.of(3, 1, 1)), []
    exact.update(maps)
    for split in (400, 150):
        sampled = ConvMoments(2, Window.of(3, 1, 1), positions_per_image=12, generator=torch.Generator().manual_seed(6))
        for part in maps.split(split):
            sampled.update(part)
        runs.append(sampled.result())
    assert runs[0].rows == 400 * 12
    torch.testing.assert_close(runs[0].second_moment, runs[1].second_moment, rtol=1e-6, atol=1e-6)
    # 4,800 rows of unit-sized values: standard error about 0.02.
    torch.testing.assert_close(runs[0].second_moment, exact.result().second_moment, rtol=0, atol=0.1)


@pytest.mark.parametrize("many", [True, False], ids=["second_moment", "samples"])
def test_reordering_statistics_is_reordering_features(many):
    rows = torch.randn(20 if many else 4, 6, generator=torch.Generator().manual_seed(7))
    moments = RowMoments(6)
    moments.update(rows)
    order = torch.tensor([4, 0, 5, 2])
    _check(reorder(moments.result(), order), rows.double()[:, order])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kernel", [1, 3])
def test_values_that_are_not_finite_name_the_layer(value, kernel):
    maps = _maps(2, 3, 4, 4)
    maps[1, 2, 0, 3] = value
    moments = ConvMoments(3, Window.of(kernel, 1, kernel // 2), name="layer1.0.conv2")
    with pytest.raises(NumericsError, match=r"layer1\.0\.conv2: every input value must be finite, got NaN or inf"):
        moments.update(maps)


def test_no_rows_is_an_error_that_names_the_layer():
    for moments in (ConvMoments(3, Window.of(3, 1, 1), name="conv"), RowMoments(3, name="conv")):
        with pytest.raises(NumericsError, match=r"conv: moments need at least one calibration row, got none"):
            moments.result()


def test_positions_are_drawn_by_a_seeded_generator():
    with pytest.raises(ValueError, match="stem: positions_per_image needs a seeded generator"):
        ConvMoments(3, Window.of(3, 1, 1), positions_per_image=2, name="stem")


def test_statistics_that_hold_their_rows_have_no_sum():
    moments = RowMoments(8)
    moments.update(torch.randn(3, 8))
    with pytest.raises(ValueError, match="these statistics hold their rows and not the sum of their products"):
        _ = moments.result().summed


@pytest.mark.parametrize("rows", [(3, 4), (3, 30), (40, 30)])
def test_merged_moments_are_those_of_all_rows(rows):
    torch.manual_seed(0)
    parts = [torch.randn(count, 8) for count in rows]
    accumulators = [RowMoments(8) for _ in range(3)]
    for accumulator, part in zip(accumulators, [*parts, torch.cat(parts)], strict=True):
        accumulator.update(part)
    one, other, both = (accumulator.result() for accumulator in accumulators)
    merged = merge(one, other)
    assert merged.rows == both.rows
    assert torch.allclose(merged.mean, both.mean)
    assert torch.allclose(second_moment(merged, centred=True), second_moment(both, centred=True), atol=1e-6)


@pytest.mark.parametrize("ratio", [1e3, 1e5])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_the_covariance_of_maps_far_from_zero_is_that_of_two_passes(geometry, ratio):
    draw = torch.randn(40, 3, 6, 7, generator=torch.Generator().manual_seed(1))
    maps = draw + ratio * torch.tensor([1.0, -1.0, 0.0])[:, None, None]  # one channel is near
    moments = ConvMoments(3, Window.of(*geometry))
    for part in maps.split(16):
        moments.update(part)
    rows = reference.patches(maps, *geometry)  # float64
    spread = rows.std(0, correction=0)
    centred = rows - rows.mean(0)
    expected = centred.T @ centred / len(rows) / torch.outer(spread, spread)
    found = second_moment(moments.result(), centred=True) / torch.outer(spread, spread)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 if ratio == 1e3 else 2e-4)
    torch.testing.assert_close(moments.result().mean, rows.mean(0), rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("count", [12, 500], ids=["kept rows", "summed"])
def test_the_covariance_of_rows_far_from_zero_is_that_of_two_passes(count):
    rows = torch.randn(count, 30, generator=torch.Generator().manual_seed(2)) + 2e3
    one, other, whole = RowMoments(30), RowMoments(30), RowMoments(30)
    for moments, part in zip((one, other), rows.split(count // 2), strict=True):
        for each in (moments, whole):
            each.update(part)
    centred = rows.double() - rows.double().mean(0)
    expected = centred.T @ centred / count
    for found in (whole.result(), merge(one.result(), other.result())):
        torch.testing.assert_close(second_moment(found, centred=True), expected, rtol=1e-5, atol=1e-5)


def test_whether_channels_fill_whole_blocks_says_nothing_of_the_sums():
    # 16 channels are a processor's block and are summed in the layout they come in, of 16 and one more each pixel's lie
    # together.
    maps = _maps(3, 17, 6, 5)
    sums = []
    for channels in (16, 17):
        moments = ConvMoments(channels, Window.of(3, 1, 1))
        moments.update(maps[:, :channels])
        sums.append(moments.result().second_moment.view(channels, 9, channels, 9)[:16, :, :16])
    torch.testing.assert_close(*sums, rtol=1e-5, atol=1e-6)


def test_features_near_zero_are_summed_as_they_come():
    rows = torch.rand(50, 3, generator=torch.Generator().manual_seed(4))
    assert not module.far_mean(rows).any()  # mean/spread of a ReLU or a picture is 1 to 2
