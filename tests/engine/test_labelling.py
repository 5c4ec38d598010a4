"""Labels of calibration images: whose they are, and what happens when they do not fit the network."""

import numpy as np
import pytest
import torch

from modhifi_cli.data import arrays, digits, folder
from modhifi_cli.engine.labelling import Labels, image_labels
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.records import Preprocess, Progress

RGB = Preprocess(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Images:
    """Images in memory with labels or without, and perhaps knowing how many classes there are."""

    def __init__(self, images, labels=None, classes=None):
        self.images, self.labels, self.protocol, self.classes = images, labels, {}, classes

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for start in range(0, len(self.images), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], None if self.labels is None else self.labels[part]


def images(count=11):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def label(model, source, **settings):
    events = list(image_labels(model, source, batch_size=4, **settings))
    assert all(isinstance(event, Progress) for event in events[:-1])
    assert [event.done for event in events[:-1]][-1] == len(source)
    assert isinstance(events[-1], Labels)
    return events[-1]


def test_auto_takes_the_sources_own_labels_and_else_the_models(tiny_convnet):
    own = torch.arange(11) % 5
    given = label(tiny_convnet, Images(images(), own))
    assert given.origin == "given" and torch.equal(given.values, own) and given.classes == 5
    predicted = label(tiny_convnet, Images(images()))
    assert predicted.origin == "model"
    assert torch.equal(predicted.values, tiny_convnet(images()).argmax(1))
    assert predicted.counts.tolist() == torch.bincount(predicted.values, minlength=5).tolist()
    forced = label(tiny_convnet, Images(images(), own), mode="model", names=list("abcde"))
    assert torch.equal(forced.values, predicted.values) and forced.names == list("abcde")
    assert given.account == "11 images of 5 of 5 classes, labels of the source"
    assert predicted.account.endswith("classes, the dense network's own predictions")


def test_labels_do_not_depend_on_the_batches(tiny_convnet):
    whole = list(image_labels(tiny_convnet, Images(images()), batch_size=11))[-1]
    assert torch.equal(label(tiny_convnet, Images(images())).values, whole.values)


def test_labels_and_logits_have_to_agree_in_number(tiny_convnet):
    with pytest.raises(DataError, match="^data: expected labels 0 to 4 for the network's 5 logits, got 7; give images"):
        label(tiny_convnet, Images(images(), torch.full((11,), 7)))
    with pytest.raises(DataError, match="^data: the labels count 10 classes but the network has 5 logits; give images"):
        label(tiny_convnet, Images(images(), torch.zeros(11, dtype=torch.int64), classes=10))
    fits = label(tiny_convnet, Images(images(), torch.full((11,), 7), classes=10), mode="model")
    assert fits.origin == "model", "who does not want the source's labels is not bothered with them"


def test_what_cannot_be_labelled_is_said_in_one_sentence(tiny_convnet):
    with pytest.raises(DataError, match="^data: labels=given asked for, but the images come without labels; give"):
        label(tiny_convnet, Images(images()), mode="given")
    with pytest.raises(ConfigError, match="^data.labels: expected one of auto, given, model, got 'true'"):
        label(tiny_convnet, Images(images()), mode="true")
    with pytest.raises(DataError, match="^data: expected at least one image to label, got none"):
        label(tiny_convnet, Images(images(0)))
    with pytest.raises(UnsupportedModelError, match=r"need logits of shape \[2, classes\] from the network, got"):
        label(tiny_convnet[:4], Images(images()))
    with torch.no_grad():
        tiny_convnet[0].weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="^the network's logits are NaN or infinite, so images cannot be labelled"):
        label(tiny_convnet, Images(images()))


# ----------------------------------------------------------------------------------------------- sources of calibration


def pixels(count=6):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def labels_of(source):
    return [labels for _, labels in source.batches(100)][0]


def test_arrays_open_labels_only_when_asked_and_only_where_wanted(tmp_path):
    np.savez(tmp_path / "with.npz", images=pixels(), labels=np.arange(6))
    np.savez(tmp_path / "without.npz", images=pixels())
    np.savez(tmp_path / "spoiled.npz", images=pixels(), labels=np.array([object()] * 6))

    def load(name, **settings):
        return arrays.load(path=str(tmp_path / name), preprocess=RGB, **settings)

    assert labels_of(load("with.npz", labelled=True, labels="auto")).tolist() == list(range(6))
    assert labels_of(load("with.npz", labelled=True, labels="given")).tolist() == list(range(6))
    assert labels_of(load("with.npz", labelled=True, labels="model")) is None
    assert labels_of(load("with.npz", labelled=False, labels="given")) is None
    assert labels_of(load("without.npz", labelled=True, labels="auto")) is None
    for never in ({"labelled": False, "labels": "given"}, {"labelled": True, "labels": "model"}):
        assert labels_of(load("spoiled.npz", **never)) is None
    with pytest.raises(DataError, match="without.npz: none of its arrays has a usual name for labels.*data.labels_key"):
        load("without.npz", labelled=True, labels="given")
    with pytest.raises(DataError, match="spoiled.npz .labels.: expected a plain C-ordered array"):
        load("spoiled.npz", labelled=True, labels="auto")
    with pytest.raises(ConfigError, match="^data.labels: expected auto, given or model, got 'modle'; did you mean"):
        load("with.npz", labelled=True, labels="modle")


def test_the_same_images_are_drawn_with_labels_and_without(tmp_path):
    np.savez(tmp_path / "images.npz", images=pixels(40), labels=np.arange(40))
    settings = {"path": str(tmp_path / "images.npz"), "preprocess": RGB, "num_samples": 7, "seed": 3}
    plain = arrays.load(labelled=False, labels="auto", **settings)
    labelled = arrays.load(labelled=True, labels="auto", **settings)
    assert plain.protocol == labelled.protocol
    first = arrays.load(labelled=False, **settings | {"num_samples": None})
    assert (first.images[labels_of(labelled).numpy()] == plain.images).all()


def test_a_folder_without_class_folders_has_no_labels_of_its_own(tmp_path):
    from PIL import Image

    for name in ("flat/a.png", "flat/b.png", "classes/cat/a.png", "classes/dog/b.png", "mixed/a.png", "mixed/cat/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name)

    def load(name, labels="auto"):
        return folder.load(path=str(tmp_path / name), preprocess=RGB, labelled=True, labels=labels)

    assert labels_of(load("flat")) is None
    assert labels_of(load("classes")).tolist() == [0, 1] and load("classes").classes == 2
    assert labels_of(load("classes", "model")) is None
    with pytest.raises(DataError, match="a.png lies in no class folder.*data.labels_path.*data.labels=model"):
        load("mixed")
    with pytest.raises(DataError, match="a.png lies in no class folder.*data.labels_path=FILE.json"):
        load("flat", "given")


def test_labelled_calibration_digits_are_training_digits():
    grey = Preprocess(size=(8, 8), mean=(0.3,), std=(0.4,))
    source = digits.load(preprocess=grey, labelled=True, labels="auto")
    assert len(source) == 1347 and source.classes == 10
    assert labels_of(digits.load(preprocess=grey, labelled=True, labels="model")) is None
