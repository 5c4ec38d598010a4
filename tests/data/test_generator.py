import pytest

from modhifi_cli.data import generator
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

CODE = """
import numpy as np
from PIL import Image

number = 3

def arrays(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3)).astype(np.uint8)

def pictures(count, seed):
    return [Image.fromarray(image) for image in arrays(count, seed)]

def floats(count, seed):
    return arrays(count, seed) / 255

def fewer(count, seed):
    return arrays(count - 1, seed)

def large(count, seed):
    return 2.0 * arrays(count, seed)

def uneven(count, seed):
    return [np.zeros((n + 1, 4, 3), np.uint8) for n in range(count)]

def broken(count, seed):
    raise RuntimeError("no weights")
"""


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine_generator.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)


def load(name, **settings):
    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.25,) * 3)
    settings = {"num_samples": 4, "labelled": False} | settings
    return generator.load(function=f"mine_generator:{name}", preprocess=preprocess, **settings)


def test_arrays_pictures_and_floats_give_the_same_images():
    ((first, labels),) = load("arrays").batches(4)
    assert first.shape == (4, 3, 8, 8) and labels is None
    ((second, _),) = load("pictures").batches(4)
    assert first.equal(second)
    ((third, _),) = load("floats").batches(4)
    assert (first - third).abs().max() < 0.1, "floats are resized without rounding to grey levels"
    assert not first.equal(next(load("arrays", seed=1).batches(4))[0])


WRONG = {
    "no such module": ("nowhere:f", ConfigError, "data.function=nowhere:f: it cannot be found"),
    "no such name": ("mine_generator:f", ConfigError, "data.function=mine_generator:f: it cannot be found"),
    "no name": ("mine_generator", ConfigError, "expected module:name, such as mine:sample, got 'mine_generator'"),
    "no function": ("mine_generator:number", ConfigError, "expected a function, got int"),
    "too few": ("mine_generator:fewer", DataError, r"expected 4 images .* got uint8 \[3, 6, 6, 3\]"),
    "too large": ("mine_generator:large", DataError, "uint8 or floats in 0..1, got float64"),
    "uneven": ("mine_generator:uneven", DataError, "cannot be put into one array"),
    "a failure": ("mine_generator:broken", DataError, "it failed with RuntimeError: no weights"),
}


@pytest.mark.parametrize(("function", "kind", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(function, kind, words):
    with pytest.raises(kind, match=words):
        generator.load(function=function, preprocess=Preprocess((8, 8), (0.5,), (0.5,)), labelled=False, num_samples=4)
