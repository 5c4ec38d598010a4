"""Mirrored images: what they are, that a pair is never parted by what is held out, and that runs take them."""

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.data.mirrored import Mirrored
from modhifi_cli.data.tensors import TensorImages
from modhifi_cli.engine.gathering import held_out_images


def source(count: int, labelled: bool):
    images = torch.arange(count * 6).reshape(count, 1, 2, 3).float()
    return TensorImages(images, torch.arange(count) if labelled else None)


@pytest.mark.parametrize("count", [3, 5, 12, 64])
@pytest.mark.parametrize("batch_size", [1, 3, 10, 64, 300])
def test_every_batch_size_gives_the_same_pairs(count, batch_size):
    both = Mirrored(source(count, labelled=True))
    batches = list(both.batches(batch_size))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert max(len(part) for part, _ in batches) <= batch_size and len(images) == len(both)
    held = held_out_images(torch.arange(len(both)))
    first: dict[int, int] = {}
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        plain = torch.arange(label * 6, label * 6 + 6).reshape(1, 2, 3).float()
        if label in first:
            assert torch.equal(image, plain.flip(-1)) and held[number] == held[first[label]]
        else:
            assert torch.equal(image, plain)
            first[label] = number
    assert len(first) == count and len(both) == 2 * count - count % 5


def test_images_without_labels_stay_without():
    assert all(labels is None for _, labels in Mirrored(source(12, labelled=False)).batches(4))


def test_a_run_with_mirrored_images_keeps_others(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["prune", "data.num_samples=40", "evaluation=[]", "console=plain", "runtime.seed=0"]
    assert main([*words, "mirrored=true"]) == 0 and main([*words, "mirrored=false"]) == 0
    kept = [path.read_bytes() for path in sorted(tmp_path.glob("outputs/prune/embedded/*/edits.safetensors"))]
    assert len(kept) == 2 and kept[0] != kept[1]


def test_a_value_that_is_neither_is_one_sentence(capsys):
    assert main(["prune", "mirrored=maybe"]) == 2
    assert "mirrored must be true or false; got 'maybe'" in " ".join(capsys.readouterr().err.split())
