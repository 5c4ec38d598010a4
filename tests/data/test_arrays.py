"""Array files in every layout that is accepted, and one sentence for each that is not."""

import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch

from modhifi_cli.data import arrays
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

RGB = Preprocess((4, 4), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
GREY = Preprocess((4, 4), (0.5,), (0.5,))
IMAGES = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(9) % 3


def inputs_of(path, **settings) -> torch.Tensor:
    source = arrays.load(path=str(path), **{"preprocess": RGB, "labelled": False, **settings})
    return torch.cat([inputs for inputs, _ in source.batches(4)])


EXPECTED = (torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255 - torch.tensor(RGB.mean).view(3, 1, 1)) / torch.tensor(
    RGB.std
).view(3, 1, 1)


@pytest.mark.parametrize("kind", ["npz", "npz_compressed", "npy", "safetensors", "float_nchw", "cifar5m", "other_key"])
def test_every_layout_gives_the_same_inputs(tmp_path, kind):
    settings = {}
    path = tmp_path / "images.npz"
    if kind == "npz":
        np.savez(path, images=IMAGES)
    elif kind == "npz_compressed":
        np.savez_compressed(path, x=IMAGES)
    elif kind == "npy":
        path = tmp_path / "images.npy"
        np.save(path, IMAGES)
    elif kind == "safetensors":
        path = tmp_path / "images.safetensors"
        safetensors.numpy.save_file({"images": IMAGES, "labels": LABELS}, path)
    elif kind == "float_nchw":
        np.savez(path, data=np.ascontiguousarray((IMAGES / 255).astype(np.float32).transpose(0, 3, 1, 2)))
    elif kind == "cifar5m":
        path = tmp_path
        for part, rows in enumerate((slice(0, 4), slice(4, 9))):
            np.savez(tmp_path / f"part{part}.npz", X=IMAGES[rows], Y=LABELS[rows])
    else:
        np.savez(path, pictures=IMAGES)
        settings = {"images_key": "pictures"}
    assert torch.allclose(inputs_of(path, **settings), EXPECTED, atol=1e-6)


@pytest.mark.parametrize("chunk_bytes", [1, 100, 10**6])
def test_the_drawn_rows_and_labels_belong_together_over_parts_and_chunks(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(arrays, "_CHUNK_BYTES", chunk_bytes)
    for part, rows in enumerate((slice(0, 4), slice(4, 9))):
        np.savez(tmp_path / f"part{part}.npz", X=IMAGES[rows], Y=LABELS[rows])
    source = arrays.load(path=str(tmp_path), preprocess=RGB, labelled=True, num_samples=6, seed=1)
    chosen = arrays.choose(9, 6, seed=1, place="")
    assert np.array_equal(source.images, IMAGES[chosen])
    assert np.array_equal(source.labels, LABELS[chosen])
    assert source.protocol["num_samples"] == 6 and source.protocol["available"] == 9


def test_parts_of_two_sets_are_told_by_their_shapes(tmp_path):
    np.savez(tmp_path / "part0.npz", X=IMAGES, Y=LABELS)
    np.savez(tmp_path / "part1.npz", X=IMAGES[:, :-1], Y=LABELS)
    with pytest.raises(DataError, match=r"part1.npz: images are uint8 \[.*\] here but uint8 \[.*\] in the parts before; give parts"):
        arrays.load(path=str(tmp_path), preprocess=RGB, labelled=False)


def test_the_protocol_hash_tells_draws_apart_and_repeats(tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES)
    hashes = [
        arrays.load(
            path=str(tmp_path / "images.npz"), preprocess=RGB, labelled=False, num_samples=5, seed=seed
        ).protocol["sha256"]
        for seed in (0, 0, 1)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_unlabelled_sources_never_open_labels(tmp_path):
    # Labels as Python objects: opening them would raise.
    np.savez(tmp_path / "images.npz", images=IMAGES, labels=np.array([{}] * 9, dtype=object))
    source = arrays.load(path=str(tmp_path / "images.npz"), preprocess=RGB, labelled=False)
    assert all(labels is None for _, labels in source.batches(4))
    with pytest.raises(DataError, match="labels"):
        arrays.load(path=str(tmp_path / "images.npz"), preprocess=RGB, labelled=True)


def test_npy_takes_its_labels_from_the_file_beside_it(tmp_path):
    np.save(tmp_path / "images.npy", IMAGES)
    np.save(tmp_path / "labels.npy", LABELS)
    with pytest.raises(DataError, match="images.npy: .* one array, so labels need evaluation_data.labels_path"):
        arrays.load(path=str(tmp_path / "images.npy"), preprocess=RGB, labelled=True)
    source = arrays.load(
        path=str(tmp_path / "images.npy"), preprocess=RGB, labelled=True, labels_path=str(tmp_path / "labels.npy")
    )
    assert np.array_equal(source.labels, LABELS)


def test_grey_arrays_need_no_channel_axis(tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES[..., 0])
    assert inputs_of(tmp_path / "images.npz", preprocess=GREY).shape == (9, 1, 4, 4)
    assert inputs_of(tmp_path / "images.npz").shape == (9, 3, 4, 4)


def test_bytes_with_channels_first_are_read_when_told_so(tmp_path):
    np.savez(tmp_path / "images.npz", images=np.ascontiguousarray(IMAGES.transpose(0, 3, 1, 2)))
    with pytest.raises(DataError, match=r"expected 1 or 3 channels in layout NHWC, got 4 .*set data.layout=NCHW"):
        inputs_of(tmp_path / "images.npz")
    assert torch.allclose(inputs_of(tmp_path / "images.npz", layout="NCHW"), EXPECTED, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": IMAGES.astype(np.int64)}, "images must be uint8 in 0..255 or floats in 0..1, got int64"),
        ({"images": IMAGES.reshape(9, -1)}, r"got shape \[9, 48\]; reshape"),
        ({"images": IMAGES[:0]}, "there are no images in it"),
        ({"images": IMAGES.transpose(0, 3, 1, 2) * 1.0}, "float images must lie in 0..1, got 0 to 255; divide by 255"),
        ({"images": np.full((2, 3, 4, 4), np.nan)}, "float images must lie in 0..1, got nan"),
        ({"pictures": IMAGES}, "usual name for images .* it holds pictures; set data.images_key"),
        ({"images": np.asfortranarray(IMAGES)}, "expected a plain C-ordered array, got Fortran order"),
    ],
)
def test_arrays_of_another_form_are_told(tmp_path, content, message):
    np.savez(tmp_path / "images.npz", **content)
    with pytest.raises(DataError, match=message):
        inputs_of(tmp_path / "images.npz")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS[:5], r"expected one label per image, 9 in all, got an array of shape \[5\]"),
        (LABELS * 1.0, "expected whole-number class indices, got float64"),
        (LABELS - 1, "expected class indices from 0, got -1"),
    ],
)
def test_labels_of_another_form_are_told(tmp_path, labels, message):
    np.savez(tmp_path / "images.npz", images=IMAGES, labels=labels)
    with pytest.raises(DataError, match=message):
        arrays.load(path=str(tmp_path / "images.npz"), preprocess=RGB, labelled=True)


def test_missing_labels_are_told(tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES)
    with pytest.raises(DataError, match="usual name for labels.*it holds images; set evaluation_data.labels_key"):
        arrays.load(path=str(tmp_path / "images.npz"), preprocess=RGB, labelled=True)


def test_paths_that_hold_no_arrays_are_told(tmp_path):
    with pytest.raises(DataError, match="data.path: nothing at .*nowhere.npz"):
        inputs_of(tmp_path / "nowhere.npz")
    with pytest.raises(DataError, match="holds no array files .* or use data=folder"):
        inputs_of(tmp_path)
    (tmp_path / "images.csv").write_text("1,2")
    with pytest.raises(DataError, match="images.csv is not an array file, expected one of .npz"):
        inputs_of(tmp_path / "images.csv")


@pytest.mark.parametrize("name", ["images.npz", "images.npy", "images.safetensors"])
def test_damaged_files_are_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=f"{name}: the array file cannot be read .*; copy it again"):
        inputs_of(tmp_path / name)


def test_a_truncated_npz_is_told(tmp_path):
    np.savez_compressed(tmp_path / "images.npz", images=IMAGES)
    content = bytearray((tmp_path / "images.npz").read_bytes())
    content[200:260] = bytes(60)
    (tmp_path / "images.npz").write_bytes(content)
    with pytest.raises(DataError, match="images.npz: the array file cannot be read"):
        inputs_of(tmp_path / "images.npz")


def test_an_unknown_layout_is_told(tmp_path):
    with pytest.raises(ConfigError, match="data.layout: expected auto, NHWC or NCHW, got 'CHW'"):
        inputs_of(tmp_path, layout="CHW")


def test_a_missing_key_that_was_asked_for_is_told(tmp_path):
    np.savez(tmp_path / "images.npz", images=IMAGES)
    with pytest.raises(DataError, match=r"no array named 'pics' \(data.images_key\) in it, it holds images"):
        inputs_of(tmp_path / "images.npz", images_key="pics")


@pytest.mark.real
def test_real_cifar_layout(test_data):
    source = arrays.load(
        path=str(test_data / "cifar10/diffusion_conditional160.npz"),
        preprocess=Preprocess((32, 32), RGB.mean, RGB.std),
        labelled=True,
        num_samples=100,
    )
    assert source.images.shape == (100, 32, 32, 3) and source.labels.max() == 9


def test_an_archive_that_claims_more_rows_than_it_has_bytes_is_refused_before_memory_is_asked_for(tmp_path):
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 32, 32, 3), }".ljust(117) + "\n"
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as file:
        file.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(100))
    with pytest.raises(DataError, match=r"says it holds \(1000000000000, 32, 32, 3\), but it has only \d+ bytes"):
        inputs_of(tmp_path / "huge.npz")
