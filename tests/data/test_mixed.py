import functools

import pytest
import torch

from modhifi_cli.data import mixed, procedural
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError
from modhifi_cli.records import Preprocess

PREPROCESS = Preprocess((6, 6), (0.5,), (0.25,))


def sources(*weights):
    kinds = ("dead_leaves", "fractal", "mixture")
    return [
        {"name": kind, "weight": weight, "source": functools.partial(procedural.load, kind=kind)}
        for kind, weight in zip(kinds, weights)
    ]


def load(*weights, **settings):
    making = Making(torch.nn.Identity())
    return mixed.load(preprocess=PREPROCESS, labelled=False, making=making, sources=sources(*weights), **settings)


@pytest.mark.parametrize(
    ("weights", "counts"), [((1, 1), (5, 5)), ((3, 1), (8, 2)), ((1, 1, 1), (4, 3, 3)), ((1e6, 1), (9, 1))]
)
def test_every_source_gives_its_share_and_at_least_one_image(weights, counts):
    source = load(*weights, num_samples=10)
    assert [part["num_samples"] for part in source.protocol["parts"]] == list(counts)
    assert len(source) == 10 and sum(len(batch) for batch, _ in source.batches(3)) == 10


def test_the_order_is_stirred_seeded_and_the_same_on_every_walk_whatever_the_batches():
    source = load(1, 1, num_samples=20)
    whole = next(source.batches(20))[0]
    assert torch.equal(torch.cat([batch for batch, _ in source.batches(7)]), whole)
    apart = torch.cat(
        [
            part["source"](preprocess=PREPROCESS, labelled=False, num_samples=10).batches(10).__next__()[0]
            for part in sources(1, 1)
        ]
    )
    order = [int((apart.flatten(1) == image.flatten()).all(1).nonzero()) for image in whole]
    assert sorted(order) == list(range(20)) and order != list(range(20))
    assert not torch.equal(whole, next(load(1, 1, num_samples=20, seed=1).batches(20))[0])


def test_wrong_weights_are_refused():
    with pytest.raises(ConfigError, match="data.sources: the weight of dead_leaves must be a number above 0, got 0."):
        load(0, 1)
    with pytest.raises(ConfigError, match="data.num_samples=1 is less than one image of each of 2 sources"):
        load(1, 1, num_samples=1)
