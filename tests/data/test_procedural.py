import numpy as np
import pytest

from modhifi_cli.data import procedural
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

COLOUR = Preprocess((24, 36), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("kind", procedural.KINDS)
def test_images_have_the_size_and_about_the_statistics_that_the_network_wants(kind):
    images = procedural.draw(60, COLOUR, kind=kind, seed=0)
    assert images.shape == (60, 24, 36, 3) and images.dtype == np.uint8
    means, deviations = (images / 255).mean((0, 1, 2)), (images / 255).std((0, 1, 2))
    assert np.abs(means - COLOUR.mean).max() < 0.06
    assert np.abs(deviations - COLOUR.std).max() < 0.05


def test_grey_networks_get_one_channel():
    source = procedural.load(preprocess=Preprocess((8, 8), (0.3,), (0.3,)), labelled=False, num_samples=3)
    ((images, labels),) = source.batches(3)
    assert images.shape == (3, 1, 8, 8) and labels is None


def test_fewer_images_are_the_beginning_of_more_and_another_seed_gives_others():
    few, more = (procedural.draw(n, COLOUR, kind="mixture", seed=3) for n in (3, 8))
    assert np.array_equal(few, more[:3])
    assert np.array_equal(procedural.draw(2, COLOUR, kind="mixture", seed=3, first=5), more[5:7])
    assert not np.array_equal(few, procedural.draw(3, COLOUR, kind="mixture", seed=4))


def test_fractal_spectra_fall_as_natural_ones_do():
    square = Preprocess((64, 64), (0.45,), (0.23,))
    images = procedural.draw(40, square, kind="fractal", seed=0)[..., 0] / 255.0
    power = np.abs(np.fft.fft2(images - images.mean((1, 2), keepdims=True))).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(64) * 64, np.fft.fftfreq(64) * 64))
    band = (frequency > 2) & (frequency < 16)
    slope = np.polyfit(np.log(frequency[band]), np.log(power[band]), 1)[0]
    assert -1.6 < slope < -0.8


def test_leaves_have_edges_that_fractal_images_lack():
    def largest_steps(kind):
        images = procedural.draw(20, Preprocess((32, 32), (0.45,), (0.23,)), kind=kind, seed=0)[..., 0] / 255.0
        steps = np.abs(np.diff(images, axis=2))
        return float((steps**4).mean() / (steps**2).mean() ** 2)  # kurtosis: 3 for Gaussian images

    assert largest_steps("dead_leaves") > 1.5 * largest_steps("fractal")


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="data.kind: unknown kind 'leafs'"):
        procedural.load(preprocess=COLOUR, labelled=False, kind="leafs")
    with pytest.raises(ConfigError, match="data.num_samples: expected a whole number above 0, or auto, got 0"):
        procedural.load(preprocess=COLOUR, labelled=False, num_samples=0)
    with pytest.raises(DataError, match="data.labels=given: procedural images have no labels of their own"):
        procedural.load(preprocess=COLOUR, labelled=True, labels="given", num_samples=1)


def test_pixels_exposure_and_contrast_vary_as_in_photographs():
    """Against 512 CIFAR-10 images: power from a whole to half a period falls by 3.1 decades, exposures deviate by 0.13."""
    images = procedural.draw(80, Preprocess((32, 32), (0.45,), (0.24,)), kind="mixture", seed=0)[..., 0] / 255.0
    centred = images - images.mean((1, 2), keepdims=True)
    power = (np.abs(np.fft.fft2(centred * np.outer(np.hanning(32), np.hanning(32)))) ** 2).mean(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(32) * 32, np.fft.fftfreq(32) * 32))
    bands = [power[(frequency >= low) & (frequency < high)].mean() for low, high in ((1, 2), (12, 17))]
    assert 2.5 < np.log10(bands[0] / bands[1]) < 3.5
    assert 0.09 < images.mean((1, 2)).std() < 0.17
    assert 0.03 < images.std((1, 2)).std() < 0.08
