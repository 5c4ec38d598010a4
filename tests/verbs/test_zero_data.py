"""Real networks without any data: what is made of them keeps more accuracy than images of another kind."""

import json
import statistics

import numpy as np
import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.data import arrays, inversion
from modhifi_cli.data.making import Making
from modhifi_cli.models import cifar_resnet

pytestmark = pytest.mark.real
NETWORK = ["model=resnet20_cifar", "evaluation=[top1]", "console=plain", "preset=fast", "target=components"]


def top1(here, test_data, *words: str) -> float:
    weights = f"model.weights={test_data}/weights/cifar10_resnet20.safetensors"
    scale = ["evaluation_data=arrays", f"evaluation_data.path={test_data}/cifar10/test.npz"]
    scale += ["evaluation_data.num_samples=1000", "sparsity=0.2", f"output_dir={here / str(len(list(here.iterdir())))}"]
    assert main(["prune", *NETWORK, weights, *scale, *words]) == 0
    (results,) = sorted(here.glob("*/prune/*/*/results.json"), key=lambda path: path.stat().st_mtime)[-1:]
    measured = json.loads(results.read_text())["measurements"]
    return next(one["value"] for one in measured if one["model"] == "pruned")


def test_inverted_images_keep_more_than_gaussian_noise(tmp_path, test_data, monkeypatch):
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).normal(115, 60, (64, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    np.save(tmp_path / "noise.npy", noise)
    inverted = ["data=inversion", "data.num_samples=64", "data.together=64", "data.steps=40"]
    ours = top1(tmp_path, test_data, *inverted)
    theirs = top1(tmp_path, test_data, "data=arrays", f"data.path={tmp_path}/noise.npy", "check_data=false")
    assert ours > theirs + 10


@torch.no_grad()
def covariances(model, images) -> list[torch.Tensor]:
    """Of the channels that every convolution of the network reads, one after the other."""
    found: list[torch.Tensor] = []

    def hear(layer, inputs):
        found.append(torch.cov(inputs[0].movedim(1, 0).flatten(1).double()))

    handles = [m.register_forward_pre_hook(hear) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    try:
        model(next(images.batches(len(images)))[0])
    finally:
        for handle in handles:
            handle.remove()
    return found


def test_images_that_no_class_pulls_at_are_more_like_photographs_to_every_stage(test_data):
    network = cifar_resnet.load(name="resnet20_cifar", weights=f"{test_data}/weights/cifar10_resnet20.safetensors")
    common = {"preprocess": network.preprocess, "labelled": False}
    wanted = covariances(network.model, arrays.load(path=f"{test_data}/cifar10/test.npz", num_samples=512, **common))

    def off(weight) -> float:
        few = {"num_samples": 64, "together": 64, "steps": 30, "cache": None}
        made = inversion.load(making=Making(network.model), class_weight=weight, **few, **common)
        pairs = zip(covariances(network.model, made), wanted, strict=True)
        return statistics.median(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)

    plain, pulled = off("auto"), off(0.01)
    assert plain < 0.9 * pulled, (plain, pulled)
