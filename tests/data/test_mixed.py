import functools

import pytest
import torch

from modhifi_cli.data import generated, mixed, procedural, text
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError
from modhifi_cli.records import Preprocess, TextInput
from tests.decoders import tiny

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


class Letters:
    """A tokenizer of one token a letter."""

    def __call__(self, document, **options):
        return {"input_ids": [ord(letter) % 64 for letter in document]}


def texts(folder, *, lengths=(8, 8), sequences="auto", seed=0, weights=(3, 1)):
    """A mixture of two files, one of `a` and one of `b`."""
    entries = []
    for letter, length, weight in zip("ab", lengths, weights):
        path = folder / f"{letter}.txt"
        path.write_text(letter * 2000)
        build = functools.partial(text.load, path=str(path), length=length)
        entries.append({"name": "text", "weight": weight, "source": build})
    reads = TextInput(tokenizer=Letters(), vocabulary=64, max_length=64, bos=0)
    making = Making(tiny("llama"))
    return mixed.load(
        preprocess=reads, labelled=False, making=making, sources=entries, sequences=sequences, seed=seed
    )


def test_texts_are_mixed_by_weight_in_a_seeded_order(tmp_path):
    source = texts(tmp_path, sequences=40)
    owners = [int(window[0]) for window in source.windows]
    assert len(texts(tmp_path)) == text.SEQUENCES
    assert owners.count(ord("a") % 64) == 30 and owners.count(ord("b") % 64) == 10
    assert owners[:30] != sorted(owners)[:30] and owners == [int(w[0]) for w in texts(tmp_path, sequences=40).windows]
    assert owners != [int(window[0]) for window in texts(tmp_path, sequences=40, seed=1).windows]
    tokens, labels = next(source.batches(40))
    assert tokens.shape == (40, 8) and torch.equal(labels[:, 1:], tokens[:, 1:]) and bool((labels[:, 0] == -100).all())
    assert source.protocol["path"] == "30 of a.txt + 10 of b.txt"


def test_a_networks_own_text_can_be_a_part(tmp_path):
    model = tiny("llama")
    entries = [{"name": "generated", "source": functools.partial(generated.load, length=8, cache=None)}]
    reads = TextInput(tokenizer=None, vocabulary=64, max_length=64, bos=0)
    mixture = mixed.load(
        preprocess=reads, labelled=False, making=Making(model), sources=entries, sequences=3, seed=0
    )
    own = entries[0]["source"](preprocess=reads, labelled=False, making=Making(model), sequences=3)
    assert sorted(map(tuple, map(torch.Tensor.tolist, mixture.windows))) == sorted(
        map(tuple, map(torch.Tensor.tolist, own.windows))
    )


def test_what_cannot_be_mixed_as_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="must have one length, and those of the sources have 8, 16 tokens"):
        texts(tmp_path, lengths=(8, 16), sequences=10)
    with pytest.raises(ConfigError, match="data.sequences=1 is less than one sequence of each of 2 sources"):
        texts(tmp_path, sequences=1)
    with pytest.raises(ConfigError, match="data.sequences: expected a whole number above 0, or auto, got 2.5"):
        texts(tmp_path, sequences=2.5)
    making = Making(torch.nn.Identity())
    with pytest.raises(ConfigError, match="this network reads images, and text is no source of any"):
        entries = [{"name": "text", "source": text.load}]
        mixed.load(preprocess=PREPROCESS, labelled=False, making=making, sources=entries)
    with pytest.raises(ConfigError, match="this network reads text, and dead_leaves is no source of any"):
        reads = TextInput(tokenizer=None, vocabulary=64, max_length=64, bos=0)
        mixed.load(preprocess=reads, labelled=False, making=making, sources=sources(1))
