"""The digits of the embedded default, and CIFAR as torchvision keeps it."""

import pickle

import numpy as np
import pytest
import torch

from modhifi_cli.data import cifar, digits
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

GREY = Preprocess((8, 8), (0.3,), (0.4,))
RGB = Preprocess((32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def test_calibration_digits_are_never_held_out_digits():
    train, test = (digits.read(split)[0] for split in ("train", "test"))
    assert len(train) == 1347 and len(test) == 450
    # scikit-learn's set holds no picture twice.
    assert not {image.tobytes() for image in train} & {image.tobytes() for image in test}


def test_digits_without_labels_are_the_training_ones_and_with_labels_the_held_out_ones():
    calibration = digits.load(preprocess=GREY, labelled=False)
    evaluation = digits.load(preprocess=GREY, labelled=True)
    assert len(calibration) == 1347 and all(labels is None for _, labels in calibration.batches(500))
    inputs, labels = next(evaluation.batches(450))
    assert inputs.shape == (450, 1, 8, 8) and labels.unique().tolist() == list(range(10))


def test_digits_have_no_path_and_two_splits():
    with pytest.raises(ConfigError, match="data.path: the digits come inside scikit-learn and have no path"):
        digits.load(preprocess=GREY, labelled=False, path="/somewhere")
    with pytest.raises(ConfigError, match="data.split: unknown split 'tset', did you mean 'test'"):
        digits.load(preprocess=GREY, labelled=False, split="tset")
    with pytest.raises(DataError, match=r"digits \(test\): num_samples=451 asked for, but there are 450"):
        digits.load(preprocess=GREY, labelled=True, num_samples=451)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch):
    """Ten random images in torchvision's layout; its own hashes are not asked for."""
    from torchvision.datasets import CIFAR10

    images = np.random.default_rng(0).integers(0, 256, (10, 3, 32, 32), dtype=np.uint8)
    labels = list(range(10))
    target = tmp_path / CIFAR10.base_folder
    target.mkdir()
    (target / "test_batch").write_bytes(pickle.dumps({"data": images.reshape(10, -1), "labels": labels}))
    (target / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(label) for label in labels]}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda self: None)
    return tmp_path, images


def test_cifar_gives_its_images_and_only_on_demand_their_labels(small_cifar):
    path, images = small_cifar
    source = cifar.load(
        name="cifar10", path=str(path), preprocess=RGB, labelled=True, split="test", num_samples=6, seed=2
    )
    inputs, labels = next(source.batches(6))
    expected = (torch.from_numpy(images[labels.numpy()]) / 255 - torch.tensor(RGB.mean).view(3, 1, 1)) / torch.tensor(
        RGB.std
    ).view(3, 1, 1)
    assert torch.allclose(inputs, expected, atol=1e-6)
    unlabelled = cifar.load(name="cifar10", path=str(path), preprocess=RGB, labelled=False, split="test")
    assert all(labels is None for _, labels in unlabelled.batches(4))


def test_missing_cifar_files_are_told_with_the_way_to_get_them(tmp_path):
    with pytest.raises(DataError, match="files of cifar100 are missing or damaged under .*data.download=true"):
        cifar.load(name="cifar100", path=str(tmp_path), preprocess=RGB, labelled=False)


def test_unknown_cifar_choices_are_told(tmp_path):
    with pytest.raises(ConfigError, match="unknown set 'cifar20', did you mean 'cifar10'"):
        cifar.load(name="cifar20", path=str(tmp_path), preprocess=RGB, labelled=False)
    with pytest.raises(ConfigError, match="unknown split 'trian', did you mean 'train'"):
        cifar.load(name="cifar10", path=str(tmp_path), preprocess=RGB, labelled=False, split="trian")
