"""Real networks without any data: what is made of them keeps more accuracy than images of another kind."""

import json

import numpy as np
import pytest

from modhifi_cli.cli import main

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
