"""DisCEdit-SP and TVSPrune inside a run: what they look at, what they keep, and whose labels they use."""

import copy
import functools
import math

import pytest
import torch

from modhifi_cli.engine.plan import Plan
from modhifi_cli.errors import DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.numerics.allocation import Uniform
from modhifi_cli.numerics.compensation import Joint, NoCompensation
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import DisCEditSP, Magnitude, TVSPrune
from modhifi_cli.numerics.selection import TopK, Union
from modhifi_cli.records import Edit
from tests.engine.test_prune import pruning
from tests.graph import networks


class Images:
    """Images in memory, with labels or without."""

    def __init__(self, images, labels=None):
        self.images, self.labels, self.protocol = images, labels, {}

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for start in range(0, len(self.images), batch_size):
            part = slice(start, start + batch_size)
            yield self.images[part], None if self.labels is None else self.labels[part]


class Forbidden(Images):
    """Images whose labels must not be looked at."""

    def batches(self, batch_size):
        for start in range(0, len(self.images), batch_size):
            yield self.images[start : start + batch_size], _Untouchable()


class _Untouchable:
    def __getattribute__(self, name):
        raise AssertionError("labels were looked at")


def setting(name, randomise_, *, count=36, classes=3):
    model, _ = networks.small(name)
    randomise_(model)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    labels = torch.arange(count) % classes
    return model, Images(images + 0.4 * labels[:, None, None, None] * images[:1], labels)


def run(model, images, scoring, **settings):
    settings = {
        "sparsity": 0.4, "target": "params", "selection": TopK(), "compensation": NoCompensation(),
        "allocation": Uniform(), "schedule": functools.partial(geometric, iterations=1), "batch_size": 8, **settings,
    }  # fmt: skip
    events = list(pruning(model, images, scoring=scoring, **settings))
    return [event for event in events if isinstance(event, Edit)], events


def input_of(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.inference_mode():
        model(images)
    handle.remove()
    return seen[0]


def bound_of(summaries, labels, scoring):
    """The scores' definition for one feature, image after image, in plain Python."""
    scores = []
    for column in summaries.T.tolist():
        best = 0.0
        classes = sorted(set(labels.tolist()))
        sides = []
        for cls in classes:
            own = [value for value, label in zip(column, labels.tolist(), strict=True) if label == cls]
            rest = [value for value, label in zip(column, labels.tolist(), strict=True) if label != cls]
            sides.append((own, rest))
        pairs = sides if isinstance(scoring, DisCEditSP) else [(a, b) for a, _ in sides for b, _ in sides if a != b]
        for p, q in pairs:
            (mean_p, var_p), (mean_q, var_q) = (
                (sum(side) / len(side), sum((v - sum(side) / len(side)) ** 2 for v in side) / len(side))
                for side in (p, q)
            )
            if isinstance(scoring, DisCEditSP):
                m = abs(mean_p - mean_q) / ((math.sqrt(var_p) + math.sqrt(var_q)) or 1)  # a dead unit differs nowhere
                best = max(best, m * m / (1 + m * m))
            else:
                best = max(best, 1 - math.exp(-((mean_p - mean_q) ** 2) / ((var_p + var_q) or 1) / 4))
        scores.append(best)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("score", [DisCEditSP, TVSPrune])
@pytest.mark.parametrize("name", sorted(networks.SMALL.keys() - {"repeated"}))
def test_every_group_is_scored_by_the_sums_of_its_maps_and_keeps_the_largest(name, score, randomise_):
    model, images = setting(name, randomise_)
    asked = []

    class Watched(score):
        def __call__(self, consumers, producers, *, generator, places):
            scores = super().__call__(consumers, producers, generator=generator, places=places)
            expected = []
            for place in places:
                maps = input_of(model, place.name, images.images)
                if name == "flattened" and maps.ndim == 2:  # a component is a whole map of the flattened layer
                    maps = maps.unflatten(1, (-1, maps.shape[1] // place.summaries.shape[1]))
                sums = maps.flatten(2).sum(2) if maps.ndim > 2 else maps
                if name == "grouped" and sums.shape[1] % place.summaries.shape[1] == 0:  # whole convolution groups
                    sums = sums.unflatten(1, (place.summaries.shape[1], -1)).sum(2)
                if sums.shape == place.summaries.shape:
                    torch.testing.assert_close(place.summaries, sums, rtol=1e-4, atol=1e-4)
                else:  # the place is shared with other components, as behind a concatenation
                    apart = (place.summaries.T[:, None] - sums.T[None]).abs().amax(2).amin(1)
                    assert apart.max() < 1e-3
                expected.append(bound_of(place.summaries, images.labels, score()))
            torch.testing.assert_close(scores.votes[0][0], torch.stack(expected).amax(0), rtol=1e-6, atol=1e-9)
            asked.append((scores.votes[0][0], [place.name for place in places]))
            return scores

    edits, events = run(model, images, Watched())
    cut = [edit for edit in edits if edit.removed.numel()]
    assert len(asked) == len(cut) > 0
    for edit, (votes, _) in zip(cut, asked, strict=True):
        assert votes[edit.kept].min() >= votes[edit.removed].max()
        assert edit.facts["labels"] == "36 images of 3 of 5 classes, labels of the source" or name == "option_a"
    (plan,) = [event for event in events if isinstance(event, Plan)]
    assert plan.labels.endswith("labels of the source")


def test_a_layer_that_has_several_maps_of_an_image_is_refused(randomise_):
    model, images = setting("repeated", randomise_)
    with pytest.raises(UnsupportedModelError, match=r"one map of each image, and fc\d runs more than once .* exclude="):
        run(model, images, DisCEditSP())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("option_a", {"layer1.0.conv1": ["layer1.0.bn1"], "layer2.0.conv2": ["layer3.0.conv1"]}),
        ("projected", {"stem": ["inner", "project", "down"], "inner": ["inner_norm"]}),
        ("concatenated", {"first": ["norm"]}),
    ],
)
def test_inner_channels_are_looked_at_before_their_batchnorm_and_streams_where_they_are_read(
    name, expected, randomise_
):
    model, images = setting(name, randomise_)
    asked = []

    class Watched(DisCEditSP):
        def __call__(self, consumers, producers, *, generator, places):
            asked.append([place.name for place in places])
            return super().__call__(consumers, producers, generator=generator, places=places)

    edits, _ = run(model, images, Watched())
    names = {edit.name: places for edit, places in zip(edits, asked, strict=False)}
    assert {group: names[group] for group in expected} == expected


@pytest.mark.parametrize("scoring", [DisCEditSP(witness="quadratic", bound="ensemble"), TVSPrune(witness="exp_norm")])
def test_runs_repeat_replay_and_do_not_depend_on_the_batches(scoring, randomise_):
    model, images = setting("projected", randomise_)
    dense, again = copy.deepcopy(model), copy.deepcopy(model)
    edits, _ = run(model, images, scoring)
    others, _ = run(again, images, scoring, batch_size=5)
    assert [edit.kept.tolist() for edit in edits] == [edit.kept.tolist() for edit in others]
    for edit in edits:
        apply_edit_(dense, edit)
    assert weights_hash(dense) == weights_hash(model)


def test_union_keeps_what_top_k_keeps(randomise_):
    model, images = setting("projected", randomise_)
    other = copy.deepcopy(model)
    edits, _ = run(model, images, DisCEditSP())
    others, _ = run(other, images, DisCEditSP(), selection=Union())
    assert [edit.kept.tolist() for edit in edits] == [edit.kept.tolist() for edit in others]


def test_a_repair_finds_the_moments_of_the_same_walk(randomise_):
    model, images = setting("projected", randomise_)
    edits, _ = run(model, images, DisCEditSP(), compensation=Joint(ridge=1e-3))
    assert all(0 <= value <= 1 for edit in edits for value in edit.facts.get("fidelity", {}).values())
    assert any(edit.facts.get("fidelity") for edit in edits)


def test_unlabelled_images_are_labelled_by_the_dense_network(randomise_):
    model, images = setting("projected", randomise_, count=60)
    with torch.no_grad():  # spread the predictions of a random network over the classes
        logits = model(images.images)
        classifier = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        classifier.bias.sub_(logits.mean(0))
        predicted = model(images.images).argmax(1)
    assert (torch.bincount(predicted) >= 2).sum() >= 2
    told = copy.deepcopy(model)
    edits, _ = run(model, Images(images.images), DisCEditSP(least_images=2))
    expected, _ = run(told, Images(images.images, predicted), DisCEditSP(least_images=2))
    assert [edit.kept.tolist() for edit in edits] == [edit.kept.tolist() for edit in expected]
    assert edits[0].facts["labels"].endswith("the dense network's own predictions")


def test_other_scores_never_look_at_labels(randomise_):
    model, images = setting("projected", randomise_)
    edits, events = run(model, Forbidden(images.images), Magnitude())
    assert edits and "labels" not in edits[0].facts
    assert next(event for event in events if isinstance(event, Plan)).labels == ""
    with pytest.raises(AssertionError, match="labels were looked at"):
        run(model, Forbidden(images.images), DisCEditSP())


def test_too_few_images_of_each_class_and_foreign_labels_are_refused(randomise_):
    model, images = setting("projected", randomise_)
    with pytest.raises(NumericsError, match="only 0 of 5 classes have at least 13 images .36 images in all."):
        run(model, images, DisCEditSP(least_images=13))
    model, images = setting("projected", randomise_, classes=6)
    with pytest.raises(DataError, match="expected labels 0 to 4 for the network's 5 logits, got 5"):
        run(model, images, TVSPrune())


def test_a_layer_that_reads_images_in_parts_is_refused_in_one_sentence():
    from tests.card.networks import labelled_images
    from tests.graph import transformers

    images, labels = (torch.cat(part) for part in zip(*labelled_images("swin", 20), strict=True))
    with pytest.raises(UnsupportedModelError, match="expected one map for each of 20 images, got 320, since this layer"):
        run(transformers.build("swin"), Images(images, labels), DisCEditSP(least_images=1))
