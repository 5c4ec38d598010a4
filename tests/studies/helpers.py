"""A tiny network in float64 with images, ready for a study, and figures compared with stored data."""

import copy
import json
import math
import os
from pathlib import Path

import torch
from torch import nn

from modhifi_cli.pages.figures import chart_to_json
from modhifi_cli.studies.subject import Subject

STORED = Path(__file__).resolve().parent / "charts"


class Images:
    """Fixed random images, with labels if asked for."""

    def __init__(self, count, seed=0, labelled=False, scale=1.0):
        generator = torch.Generator().manual_seed(seed)
        base = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
        self._images = scale * (base + torch.nn.functional.avg_pool2d(base, 3, 1, 1))
        self._labels = torch.randint(0, 5, (count,), generator=generator) if labelled else None
        self.protocol = {"path": "random images", "num_samples": count, "seed": seed, "sha256": f"{count} {seed}"}

    def __len__(self):
        return len(self._images)

    def batches(self, batch_size):
        for start in range(0, len(self), batch_size):
            labels = None if self._labels is None else self._labels[start : start + batch_size]
            yield self._images[start : start + batch_size], labels


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


def network():
    """stem 3 → 10, one residual block with 12 inner channels, pool, 5 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10), nn.ReLU(), Block(10),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5),
    ).double().eval()  # fmt: skip


def subject(randomise_, *, count=40, labelled=True, model=None, sources=(), **given):
    trained = randomise_(network()) if model is None else model
    images = Images(count)
    return Subject(
        model=trained,
        calibration=images,
        evaluation=Images(30, seed=9, labelled=True) if labelled else None,
        example=next(images.batches(2))[0],
        untrained=network,
        draw=lambda source, seed: Images(count, seed=seed, scale=3.0 if source else 1.0),
        sources=tuple(sources),
        batch_size=16,
        **given,
    )


def finished(steps):
    """The result of a generator of progress, and how many steps it told."""
    told = 0
    while True:
        try:
            next(steps)
            told += 1
        except StopIteration as done:
            return done.value, told


def rows_of(study, about):
    return [row for cell in study.cells(about) for row in finished(study.compute(about, cell))[0]]


def assert_as_stored(charts):
    """Figure data against the stored ones; MODHIFI_STORE_CHARTS=1 writes them anew, to be read before committing."""
    for chart in charts:
        found = json.loads(json.dumps(chart_to_json(chart)))
        path = STORED / f"{chart.name}.json"
        if os.environ.get("MODHIFI_STORE_CHARTS"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        _assert_close(found, json.loads(path.read_text(encoding="utf-8")), chart.name)


def _assert_close(found, stored, place):
    if isinstance(stored, dict):
        assert found.keys() == stored.keys(), place
        for key in stored:
            _assert_close(found[key], stored[key], f"{place}.{key}")
    elif isinstance(stored, list):
        assert len(found) == len(stored), place
        for number, (one, other) in enumerate(zip(found, stored, strict=True)):
            _assert_close(one, other, f"{place}[{number}]")
    elif isinstance(stored, float) and isinstance(found, (int, float)):
        # Activations pass through float32 sums; their last digits depend on the processor.
        assert math.isclose(found, stored, rel_tol=2e-4, abs_tol=1e-5), f"{place}: {found}, stored {stored}"
    else:
        assert found == stored, f"{place}: {found}, stored {stored}"


def unchanged(model, run):
    """Run something and see that the network is as before."""
    before = copy.deepcopy(model.state_dict())
    result = run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    return result
