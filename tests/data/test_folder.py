"""Image folders: any nesting without labels; class folders or a JSON file with them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modhifi_cli.data import folder
from modhifi_cli.data.classes import Known
from modhifi_cli.data.sources import ArrayImages, FileImages
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.records import Preprocess

RGB = Preprocess((6, 6), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def write(root, *names) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(name)).integers(0, 256, (7, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / name)


def load(root, **settings):
    return folder.load(path=str(root), **{"preprocess": RGB, "labelled": False, **settings})


def test_images_are_found_at_any_depth_and_hidden_ones_left_out(tmp_path):
    write(tmp_path, "a.png", "deep/er/b.JPG", "deep/c.bmp", ".hidden/d.png", "._e.png")
    (tmp_path / "notes.txt").write_text("not an image")
    source = load(tmp_path)
    assert len(source) == 3
    batches = list(source.batches(2))
    assert [tuple(inputs.shape) for inputs, _ in batches] == [(2, 3, 6, 6), (1, 3, 6, 6)]
    assert all(labels is None for _, labels in batches)


def test_files_decoded_on_the_way_give_the_inputs_of_files_decoded_at_the_start(tmp_path, monkeypatch):
    write(tmp_path, *(f"{'x' * index}/image.png" for index in range(1, 6)))
    at_start = load(tmp_path, labelled=True)
    monkeypatch.setattr(folder, "_IN_MEMORY_BYTES", 0)
    on_the_way = load(tmp_path, labelled=True)
    assert isinstance(at_start, ArrayImages) and isinstance(on_the_way, FileImages)
    for (first, first_labels), (second, second_labels) in zip(at_start.batches(2), on_the_way.batches(2), strict=True):
        assert torch.equal(first, second) and torch.equal(first_labels, second_labels)
    assert on_the_way.protocol["sha256_of"] == "names and sizes"


def test_class_folders_are_classes_in_sorted_order_at_any_depth(tmp_path):
    write(tmp_path, "cat/1.png", "cat/more/2.png", "ant/1.png", "dog/1.png")
    assert load(tmp_path, labelled=True).labels.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("entry", [5, {"class_index": 5, "name": "a dog"}])
def test_a_labels_file_goes_before_class_folders(tmp_path, entry):
    write(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": entry, "sub/b.png": 2}))
    assert load(tmp_path, labelled=True).labels.tolist() == [5, 2]


def test_unlabelled_sources_never_open_the_labels_file(tmp_path):
    write(tmp_path, "a.png")
    (tmp_path / "labels.json").write_text("{ this is not JSON")
    assert len(load(tmp_path)) == 1
    with pytest.raises(DataError, match="labels.json: the labels cannot be read"):
        load(tmp_path, labelled=True)


def test_a_part_of_imagenets_classes_needs_its_order_said(tmp_path):
    write(tmp_path, "n01443537/a.png", "n01530575/b.png")
    with pytest.raises(DataError, match="holds 2 of ImageNet's 1,000 class folders.*class_order=imagenet"):
        load(tmp_path, labelled=True)
    assert load(tmp_path, labelled=True, class_order="imagenet").labels.tolist() == [1, 10]
    assert load(tmp_path, labelled=True, class_order="sorted").labels.tolist() == [0, 1]
    assert len(load(tmp_path)) == 2


def test_a_folder_that_is_no_imagenet_class_is_told(tmp_path):
    write(tmp_path, "n01443537/a.png", "cats/b.png")
    with pytest.raises(DataError, match="the folder cats is not the WordNet id of an ImageNet class"):
        load(tmp_path, labelled=True, class_order="imagenet")


def test_a_folder_without_images_is_told(tmp_path):
    with pytest.raises(DataError, match="data.path: .* has no images at any depth"):
        load(tmp_path)
    with pytest.raises(DataError, match="data.path: no folder at .*nowhere"):
        load(tmp_path / "nowhere")


def test_a_corrupt_image_is_named(tmp_path, monkeypatch):
    write(tmp_path, "good.png", "bad.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    message = r"bad\.png: the image cannot be decoded .* skip_corrupt=true"
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    monkeypatch.setattr(folder, "_IN_MEMORY_BYTES", 0)
    with pytest.raises(DataError, match=message):
        list(load(tmp_path).batches(2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupt_images_are_skipped_on_demand_counted_and_replaced(tmp_path, monkeypatch, in_memory):
    if not in_memory:
        monkeypatch.setattr(folder, "_IN_MEMORY_BYTES", 0)
    names = [f"{'ab'[index % 2]}/{index}.png" for index in range(8)]
    write(tmp_path, *names)
    for name in names[:3]:
        (tmp_path / name).write_bytes(b"")
    source = load(tmp_path, skip_corrupt=True, labelled=True)
    assert len(source) == 5 and source.protocol["skipped"] == 3
    assert torch.cat([labels for _, labels in source.batches(2)]).tolist() == [0, 0, 1, 1, 1]
    drawn = load(tmp_path, skip_corrupt=True, num_samples=5)
    assert len(drawn) == 5 and 0 < drawn.protocol["skipped"] <= 3
    with pytest.raises(DataError, match=r"only 5 images can be decoded \(3 cannot, .* 6 were asked for"):
        load(tmp_path, skip_corrupt=True, num_samples=6)


def test_an_image_without_a_label_is_told(tmp_path):
    write(tmp_path, "cat/1.png", "loose.png")
    with pytest.raises(DataError, match="loose.png lies in no class folder and there is no labels.json"):
        load(tmp_path, labelled=True)
    (tmp_path / "labels.json").write_text(json.dumps({"cat/1.png": 0}))
    with pytest.raises(DataError, match="expected a class index from 0 for loose.png, got None"):
        load(tmp_path, labelled=True)


@pytest.mark.parametrize("entry", [-1, "dog", 1.5, {"name": "dog"}])
def test_a_label_that_is_no_class_index_is_told(tmp_path, entry):
    write(tmp_path, "a.png")
    (tmp_path / "labels.json").write_text(json.dumps({"a.png": entry}))
    with pytest.raises(DataError, match="expected a class index from 0 for a.png, got"):
        load(tmp_path, labelled=True)


def test_an_unknown_class_order_is_told(tmp_path):
    with pytest.raises(ConfigError, match="data.class_order: unknown order 'sort', did you mean 'sorted'"):
        load(tmp_path, class_order="sort")


def test_more_images_than_there_are_is_told(tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(DataError, match="num_samples=2 asked for, but there are 1 images"):
        load(tmp_path, num_samples=2)


def labels_of(root, *, classes=None, logits=None, **settings):
    """Class folder → label, and the protocol."""
    source = load(root, labelled=True, known=Known(classes, lambda: logits), **settings)
    return dict(zip((name.name for name in sorted(root.iterdir()) if any(name.iterdir())), source.labels.tolist())), source.protocol


def test_class_folders_are_matched_to_class_names_whatever_their_order(tmp_path):
    write(tmp_path, "red/a.png", "green/a.png", "blue/a.png")
    found, protocol = labels_of(tmp_path, classes=("red", "green", "blue"))
    assert found == {"blue": 2, "green": 1, "red": 0}
    assert protocol["class_folders"] == {"taken_by": "the network's class names", "blue": 2, "green": 1, "red": 0}
    assert protocol["labels"] == "class folders taken by the network's class names: red = 0, green = 1, blue = 2"


def test_names_are_matched_without_their_writing_and_by_any_of_several_words(tmp_path):
    write(tmp_path, "Great_White-Shark/a.png", "tinca tinca/a.png")
    classes = ("tench, Tinca tinca", "great white shark, man-eater", "crane", "crane")
    assert labels_of(tmp_path, classes=classes)[0] == {"Great_White-Shark": 1, "tinca tinca": 0}
    write(tmp_path, "crane/a.png")
    assert labels_of(tmp_path, classes=classes)[0]["crane"] in (2, 3)  # written exactly so, the last of equal names


def test_a_missing_class_folder_does_not_shift_the_others(tmp_path):
    write(tmp_path, "b/1.png", "d/1.png")
    assert labels_of(tmp_path, classes=("a", "b", "c", "d"))[0] == {"b": 1, "d": 3}
    with pytest.raises(DataError, match="holds 2 class folders .b, d. for a network with 4 logits and no class names"):
        labels_of(tmp_path, logits=4)
    (tmp_path / "a").mkdir()
    (tmp_path / "c").mkdir()  # empty, but they say which are missing
    assert labels_of(tmp_path, logits=4)[0] == {"b": 1, "d": 3}


def test_folders_that_are_numbers_are_the_numbers_of_logits(tmp_path):
    write(tmp_path, *(f"{number}/a.png" for number in (0, 2, 10, 11)))
    assert labels_of(tmp_path, logits=12)[0] == {"0": 0, "10": 10, "11": 11, "2": 2}
    assert labels_of(tmp_path, logits=12, class_order="sorted")[0] == {"0": 0, "2": 1, "10": 2, "11": 3}
    assert labels_of(tmp_path, logits=12, class_order="text")[0] == {"0": 0, "10": 1, "11": 2, "2": 3}
    with pytest.raises(DataError, match="the folder 11 is no class of a network with classes 0 to 10; name folders by"):
        labels_of(tmp_path, logits=11)
    write(tmp_path, "02/a.png")
    with pytest.raises(DataError, match="two folders stand for one number, such as 1 and 01; merge them"):
        labels_of(tmp_path, logits=12)


def test_wordnet_ids_are_matched_where_the_network_has_imagenets_classes(tmp_path):
    from timm.data import ImageNetInfo

    write(tmp_path, "n01443537/a.png", "n01530575/b.png")
    names = ImageNetInfo("imagenet-1k").label_descriptions()
    assert labels_of(tmp_path, classes=names)[0] == {"n01443537": 1, "n01530575": 10}


def test_folders_that_are_no_classes_of_the_network_are_told(tmp_path):
    write(tmp_path, "red/a.png", "Katze/a.png")
    with pytest.raises(DataError, match="the folder Katze is no class of the network; rename or remove it, set model.cl"):
        labels_of(tmp_path, classes=("red", "cat"))
    with pytest.raises(DataError, match="no folder is a class of the network by name .Katze, red; its classes are a, b."):
        labels_of(tmp_path, classes=("a", "b"))


def test_a_sort_order_is_the_last_resort_and_is_said(tmp_path):
    write(tmp_path, "b/1.png", "a/1.png")
    found, protocol = labels_of(tmp_path, logits=2)
    assert found == {"a": 0, "b": 1}
    assert "sort order, since the network names no classes (set model.classes if that is wrong)" in protocol["labels"]


def test_a_folder_of_which_most_images_fail_gets_the_reason(tmp_path):
    write(tmp_path, "good.png")
    for number in range(3):
        Image.fromarray(np.full((7, 9), 1000.0, dtype=np.float32)).save(tmp_path / f"{number}.tif")
    with pytest.raises(DataError, match="3 of 4 images cannot be used.*has floating pixels from 1000 to 1000, whose scale"):
        load(tmp_path, skip_corrupt=True)


def test_turned_images_are_counted(tmp_path):
    write(tmp_path, "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((7, 9, 3), np.uint8)).save(tmp_path / "b.jpg", exif=exif)
    assert load(tmp_path).protocol["turned"] == 1
