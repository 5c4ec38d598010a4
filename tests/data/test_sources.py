"""From pixels to network inputs, and the draw of samples."""

import numpy as np
import pytest
import torch
from PIL import Image

from modhifi_cli.data.sources import ArrayImages, choose, decode, normalise, prepare_pixels, samples_wanted
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

RGB = Preprocess((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def picture(height: int, width: int, channels: int = 3, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_a_draw_is_seeded_without_replacement_and_a_smaller_one_begins_a_larger_one():
    first, again, other, longer = (
        choose(100, count, seed=seed, place="here") for count, seed in ((30, 0), (30, 0), (30, 1), (60, 0))
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(set(longer)) == 60 and np.array_equal(longer[:30], first)


def test_all_samples_keep_their_own_order():
    assert choose(5, None, seed=3, place="here").tolist() == [0, 1, 2, 3, 4]


def test_more_samples_than_there_are_is_told():
    with pytest.raises(DataError, match="here: num_samples=6 asked for, but there are 5 images; set num_samples to 5"):
        choose(5, 6, seed=0, place="here")


@pytest.mark.parametrize("count", [0, -3, 2.5, "many", True])
def test_a_count_that_is_none_is_told(count):
    with pytest.raises(ConfigError, match="num_samples: expected a whole number above 0, auto, or null"):
        choose(5, count, seed=0, place="here")


def test_normalisation_is_x_over_255_minus_mean_over_std():
    pixels = picture(8, 8)[None]
    inputs = normalise(pixels, RGB)
    expected = (pixels[0, 2, 5, 1] / 255 - 0.5) / 0.3
    assert inputs.shape == (1, 3, 8, 8) and inputs.dtype == torch.float32 and inputs.is_contiguous()
    assert inputs[0, 1, 2, 5].item() == pytest.approx(expected, abs=1e-6)


def test_normalisation_leaves_the_pixels_alone():
    pixels = np.full((1, 8, 8, 3), 0.5, dtype=np.float32)
    normalise(pixels, RGB)
    assert (pixels == 0.5).all()


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (24, 24), (10, 12)])
def test_resize_and_crop_are_torchvisions(tmp_path, shape):
    from torchvision.transforms._presets import ImageClassification
    from torchvision.transforms.functional import InterpolationMode

    preprocess = Preprocess((24, 24), RGB.mean, RGB.std, 27, "bilinear")
    file = tmp_path / "image.png"
    Image.fromarray(picture(*shape)).save(file)
    theirs = ImageClassification(
        crop_size=24, resize_size=27, mean=RGB.mean, std=RGB.std, interpolation=InterpolationMode.BILINEAR
    )
    expected = theirs(Image.open(file))
    assert torch.allclose(normalise(decode(file, preprocess)[None], preprocess)[0], expected, atol=1e-6)


def test_arrays_and_files_of_the_same_picture_give_the_same_input(tmp_path):
    preprocess = Preprocess((16, 16), RGB.mean, RGB.std, 18, "bicubic")
    pixels = picture(30, 41)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    assert np.array_equal(prepare_pixels(pixels[None], preprocess)[0], decode(tmp_path / "image.png", preprocess))


@pytest.mark.parametrize("resize", [None, 18, 12])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_float_pixels_are_resized_nearly_as_bytes(resize, interpolation):
    preprocess = Preprocess((16, 16), RGB.mean, RGB.std, resize, interpolation)
    smooth = np.asarray(Image.fromarray(picture(5, 6)).resize((30, 30), Image.Resampling.BICUBIC))
    from_bytes = prepare_pixels(smooth[None], preprocess).astype(np.float32) / 255
    from_floats = prepare_pixels((smooth / 255).astype(np.float32)[None], preprocess)
    assert from_floats.shape == from_bytes.shape == (1, 16, 16, 3)
    # Bytes are rounded after each of the two passes of a resize.
    assert np.abs(from_floats - from_bytes).max() < (1e-6 if interpolation == "nearest" else 1.5 / 255)


def test_grey_pictures_fit_colour_networks_and_the_reverse():
    grey = Preprocess((8, 8), (0.5,), (0.5,))
    assert prepare_pixels(picture(8, 8, 1)[None], RGB).shape == (1, 8, 8, 3)
    assert prepare_pixels(picture(8, 8, 3)[None], grey).shape == (1, 8, 8, 1)
    floats = (picture(8, 8, 3)[None] / 255).astype(np.float32)
    assert np.abs(prepare_pixels(floats, grey) - prepare_pixels(picture(8, 8, 3)[None], grey) / 255).max() < 0.005


def test_batches_cover_everything_in_order_and_repeat():
    source = ArrayImages(np.stack([picture(8, 8, seed=s) for s in range(7)]), np.arange(7), RGB, {})
    for _ in range(2):
        batches = list(source.batches(3))
        assert [len(inputs) for inputs, _ in batches] == [3, 3, 1]
        assert torch.cat([labels for _, labels in batches]).tolist() == list(range(7))
        assert torch.equal(torch.cat([inputs for inputs, _ in batches]), next(source.batches(7))[0])


def test_auto_takes_the_papers_number_or_all_there_are():
    assert samples_wanted(2001, "auto") == 2000
    assert samples_wanted(2000, "auto") is None and samples_wanted(3, "auto") is None
    assert samples_wanted(3, 7) == 7 and samples_wanted(3, None) is None


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_to_eight_not_cut_off(tmp_path, name):
    pixels = picture(8, 8)[..., 0]
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / name)
    assert np.array_equal(decode(tmp_path / name, RGB)[..., 1], pixels)


def test_whole_numbers_of_a_wider_type_keep_the_scale_that_they_use(tmp_path):
    pixels = picture(8, 8)[..., 0]
    for factor, name in ((1, "eight.tif"), (257, "sixteen.tif")):
        Image.fromarray(pixels.astype(np.int32) * factor).save(tmp_path / name)
        assert np.array_equal(decode(tmp_path / name, RGB)[..., 0], pixels)
    Image.fromarray(pixels.astype(np.int32) * 10**6).save(tmp_path / "far.tif")
    with pytest.raises(DataError, match="far.tif: has 32-bit pixels from .*, whose scale is not known; save it with 8"):
        decode(tmp_path / "far.tif", RGB)


def test_floating_pixels_are_taken_in_zero_to_one_and_refused_elsewhere(tmp_path):
    pixels = picture(8, 8)[..., 0]
    Image.fromarray((pixels / 255).astype(np.float32)).save(tmp_path / "unit.tif")
    assert np.array_equal(decode(tmp_path / "unit.tif", RGB)[..., 2], pixels)
    Image.fromarray(pixels.astype(np.float32)).save(tmp_path / "far.tif")
    with pytest.raises(DataError, match="far.tif: has floating pixels from .*, whose scale is not known"):
        decode(tmp_path / "far.tif", RGB)


@pytest.mark.parametrize("orientation, turn", [(1, lambda p: p), (6, lambda p: np.rot90(p, -1)), (3, lambda p: p[::-1, ::-1])])
def test_a_cameras_orientation_is_applied(tmp_path, orientation, turn):
    pixels = picture(8, 8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decode(tmp_path / "a.png", RGB), turn(pixels))
