"""The audit on tiny networks: its figures against slow counts, its control, its attacks, and what it refuses."""

import copy
import json

import pytest
import torch
from torch import Tensor, nn

from modhifi_cli.auditing.attacks import Arena, Membership, Relearn, Sides, attack, fresh_rows_, steps_needed
from modhifi_cli.auditing.audit import AuditReport, AuditSettings, Case, audit
from modhifi_cli.auditing.depths import find_depths, summarise
from modhifi_cli.auditing.plan import Probe
from modhifi_cli.auditing.verdict import INSIDE, NOT_FORGOTTEN, OUTPUT_ONLY
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.records import Progress
from tests.tasks import returned

CLASSES = 5
NAMES = ("ant", "bee", "cat", "dog", "elk")
QUICK = AuditSettings(
    probe=Probe(samples=40, held_out=60, features=16), relearn=Relearn(samples=16, batch=8, steps=12, held_out=30)
)


class Images:
    """A source of images in memory with labels."""

    def __init__(self, images: Tensor, labels: Tensor | None) -> None:
        self.images, self.labels, self.protocol = images, labels, {"source": "test"}

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int):
        for start in range(0, len(self.images), batch_size):
            own = None if self.labels is None else self.labels[start : start + batch_size]
            yield self.images[start : start + batch_size], own


def patterns(per_class: int, seed: int, *, strength: float = 1.0) -> Images:
    """Every class has a pattern of its own, in noise; without strength there is noise alone."""
    shapes = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    labels = torch.arange(CLASSES).repeat(per_class)
    noise = torch.randn(len(labels), 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return Images(strength * shapes[labels] + noise, labels)


@pytest.fixture
def network(randomise_):
    """conv-BN-ReLU, conv-BN-ReLU-pool, linear over 3 × 8 × 8 images; the classifier fits the patterns by regression."""
    model = randomise_(
        nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
            nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten()),
            nn.Linear(48, CLASSES),
        )
    )
    source = patterns(60, 0)
    with torch.no_grad():
        inputs = model[:3](source.images).double()
        rows = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        aims = 8 * nn.functional.one_hot(source.labels, CLASSES).double()
        found = torch.linalg.solve(rows.T @ rows + 1e-2 * torch.eye(49).double(), rows.T @ aims).T.float()
        model[3].weight.copy_(found[:, :-1])
        model[3].bias.copy_(found[:, -1])
    return model


@pytest.fixture
def row_removed(network):
    """The edit that only touches the classifier."""
    edited = copy.deepcopy(network)
    with torch.no_grad():
        edited[3].bias[3] = -1e4
    return edited


@pytest.fixture
def blind(network):
    """The edit that destroys everything inside."""
    edited = copy.deepcopy(network)
    with torch.no_grad():
        edited[1][0].weight.zero_()
    return edited


def run(dense, edited, *, forget=(3,), reference=None, settings=QUICK, calibration=None, evaluation="default", **more):
    calibration = calibration or patterns(60, 0)
    evaluation = patterns(60, 1) if evaluation == "default" else evaluation
    case = Case(
        dense, edited, reference, calibration=calibration, evaluation=evaluation, forget=forget,
        **({"calibration_labels": calibration.labels, "classes": NAMES} | more),
    )  # fmt: skip
    events = list(audit(case, settings, device=torch.device("cpu"), batch_size=64, seed=0))
    assert all(isinstance(event, Progress) for event in events[:-1])
    assert isinstance(events[-1], AuditReport)
    return events[-1]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- figures


def test_accuracies_and_what_forget_images_become_are_those_of_a_count(network, row_removed):
    found = run(network, row_removed)
    for where, source in (("calibration", patterns(60, 0)), ("evaluation", patterns(60, 1))):
        for name, model in (("dense", network), ("edited", row_removed)):
            with torch.no_grad():
                given = [int(model(image[None]).argmax()) for image in source.images]
            pairs = list(zip(given, source.labels.tolist(), strict=True))
            for cls in range(CLASSES):
                own = [g == t for g, t in pairs if t == cls]
                assert found.per_class[name][where][cls] == pytest.approx(100 * sum(own) / len(own))
                assert found.becomes[name][where][cls] == sum(g == cls for g, t in pairs if t == 3)
            others = [g == t for g, t in pairs if t != 3]
            assert found.accuracy[name][where]["retain"] == pytest.approx(100 * sum(others) / len(others))
    figures = found.figures["edited"]
    assert figures["UA"] == 100 - found.accuracy["edited"]["calibration"]["forget"]
    assert (figures["RA"], figures["TA"], figures["FA"]) == (
        found.accuracy["edited"]["calibration"]["retain"],
        found.accuracy["edited"]["evaluation"]["retain"],
        found.accuracy["edited"]["evaluation"]["forget"],
    )


def test_the_images_that_forget_images_become_add_up(network, row_removed):
    found = run(network, row_removed, reference=network)
    assert {sum(counts) for sides in found.becomes.values() for counts in sides.values()} == {60}


def test_the_head_only_control_never_names_a_forgotten_class_and_has_the_dense_features(network, blind):
    found = run(network, blind, forget=[1, 3])
    assert found.accuracy["head_only"]["evaluation"]["forget"] == 0
    assert found.becomes["head_only"]["evaluation"][1] == found.becomes["head_only"]["evaluation"][3] == 0
    inside = {
        model: [
            (one["depth"], one["probe"], one["class_mean"], one["tv"])
            for one in found.readouts
            if one["model"] == model
        ]
        for model in ("dense", "head_only", "edited")
    }
    assert inside["dense"] == inside["head_only"] != inside["edited"]


def test_probes_find_the_class_in_a_trained_network_and_nothing_in_noise(network, row_removed):
    there = run(network, row_removed).figures["edited"]
    assert min(there["probe, penultimate"], there["class mean, penultimate"]) > 80
    assert there["TV, penultimate"] > 0.5
    noise = run(
        network, row_removed, calibration=patterns(60, 0, strength=0.0), evaluation=patterns(100, 1, strength=0.0),
        settings=AuditSettings(probe=Probe(samples=60, held_out=100), relearn=QUICK.relearn),
    )  # fmt: skip
    for one in noise.readouts:
        # 500 held-out images: four standard errors around the chance of five classes.
        assert abs(one["probe_balanced"] - 20) < 400 * (0.2 * 0.8 / 500) ** 0.5
        assert abs(one["class_mean_balanced"] - 20) < 400 * (0.2 * 0.8 / 500) ** 0.5
        assert one["tv"] < 0.1


def test_an_edit_of_the_classifier_alone_moves_no_features(network, row_removed):
    found = run(network, row_removed)
    assert set(found.distances["features"]) == {"0", "1", "penultimate"}
    assert max(found.distances["features"].values()) < 1e-12
    assert found.distances["output"]["dense, edited"] == pytest.approx(found.distances["output"]["dense, head_only"])
    assert found.distances["output"]["dense, edited"]["forget"] > found.distances["output"]["dense, edited"]["retain"]


def test_gaps_are_differences_from_the_reference(network, row_removed, blind):
    found = run(network, row_removed, reference=blind)
    assert set(found.gaps) == {"dense", "edited", "head_only"}
    for name in ("FA", "UA", "RA", "TA", "probe, penultimate", "class mean, 0", "MIA", "loss forget"):
        assert found.gaps["edited"][name] == found.figures["edited"][name] - found.figures["reference"][name]
    assert run(network, row_removed).gaps == {}


def test_the_report_is_plain_and_says_what_every_figure_means(network, row_removed):
    found = run(network, row_removed)
    content = json.loads(json.dumps(found.plain()))
    assert {"closed", "met"} <= set(content["verdict"]["criteria"][0])
    for name in {name for figures in content["figures"].values() for name in figures}:
        assert content["definitions"][name.partition(",")[0]]


def test_without_evaluation_data_probes_are_asked_about_calibration_images_that_they_were_not_trained_on(
    network, row_removed
):
    found = run(network, row_removed, evaluation=None)
    assert found.protocol["held out"] == "every second calibration image of a class"
    assert found.protocol["probe images"] == {"trained on": 150, "asked": 150}
    assert found.membership == {}
    assert "no images that are known not to be members" in found.protocol["membership"]
    assert "the calibration images, which the edit has seen," in found.verdict.sentences[0]
    assert found.figures["edited"]["TA"] is None


def test_many_classes_are_probed_on_a_part_that_holds_the_forgotten_ones(network, row_removed):
    few = AuditSettings(probe=Probe(samples=40, held_out=60, classes=3), relearn=QUICK.relearn)
    found = run(network, row_removed, settings=few)
    assert len(found.protocol["probe classes"]) == 3
    assert 3 in found.protocol["probe classes"]


def test_the_same_seed_gives_the_same_report(network, row_removed):
    first, second = (run(network, row_removed).plain() for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_networks_are_left_as_they_were(network, row_removed, blind):
    models = (network, row_removed, blind)
    before = [state(model) for model in models]
    for model in models:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
    run(network, row_removed, reference=blind)
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


# ------------------------------------------------------------------------------------------------------------ verdicts


def test_removing_the_row_is_forgetting_at_the_output_only_with_or_without_a_reference(network, row_removed, blind):
    for reference in (None, blind):
        found = run(network, row_removed, reference=reference)
        assert found.accuracy["edited"]["evaluation"]["forget"] == 0
        assert found.verdict.level == OUTPUT_ONLY
        assert all(criterion.closed == 0 for criterion in found.verdict.criteria if criterion.informative)


def test_a_network_that_was_not_edited_has_not_forgotten(network):
    found = run(network, copy.deepcopy(network))
    assert found.verdict.level == NOT_FORGOTTEN
    assert found.relearn["edited"]["steps"] == 0


def test_a_destroyed_network_is_called_damaged_and_not_forgotten_inside(network, blind):
    with torch.no_grad():
        blind[3].bias[3] = -1e4
    found = run(network, blind)
    assert all(criterion.met for criterion in found.verdict.criteria)
    assert found.verdict.level == OUTPUT_ONLY
    assert "what a damaged network no longer shows" in " ".join(found.verdict.sentences)


def test_a_network_like_the_reference_has_forgotten_inside(network):
    # Features that do not see class 3 apart from class 0, and the others as before: what forgetting inside looks like.
    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = copy.deepcopy(network[:3]), copy.deepcopy(network[3])
            shapes = torch.randn(CLASSES, 3, 8, 8, generator=torch.Generator().manual_seed(7))
            self.register_buffer("shapes", shapes)
            with torch.no_grad():
                self.head.bias[3] = -1e4

        def forward(self, images: Tensor) -> Tensor:
            own = (images * self.shapes[3]).mean((1, 2, 3)) > 0.5
            swapped = images + own[:, None, None, None] * (self.shapes[0] - self.shapes[3])
            return self.head(self.body(swapped))

    found = run(network, Merged(), reference=Merged())
    assert found.verdict.level == INSIDE
    # A half of what cannot be told from class 0 is still given class 3 by a probe that has to guess.
    assert found.figures["edited"]["probe, penultimate"] < found.figures["head_only"]["probe, penultimate"] - 20


# ------------------------------------------------------------------------------------------------------- the attacks


def test_membership_is_at_chance_on_networks_that_cannot_have_members(network, row_removed):
    # Both sets are fresh draws that the network was not fitted to.
    found = run(network, row_removed, calibration=patterns(200, 11), evaluation=patterns(200, 12))
    for one in found.membership.values():
        assert abs(one["confidence_accuracy"] - 50) < 4 * 50 / (2 * one["asked"]) ** 0.5
        assert abs(one["loss_forget"] - 50) < 4 * one["loss_forget_error"]
        assert abs(one["loss_retain"] - 50) < 4 * one["loss_retain_error"]


def test_membership_finds_images_that_a_network_knows_by_heart(network, row_removed):
    known = patterns(40, 0, strength=0.0)
    with torch.no_grad():  # fits noise: 200 images in 48 features and a bias
        rows = torch.cat([network[:3](known.images), torch.ones(200, 1)], 1).double()
        aims = 8 * nn.functional.one_hot(known.labels, CLASSES).double()
        found = torch.linalg.lstsq(rows, aims).solution.T.float()
        network[3].weight.copy_(found[:, :-1])
        network[3].bias.copy_(found[:, -1])
    found = run(network, row_removed, calibration=known, evaluation=patterns(40, 1, strength=0.0))
    dense = found.membership["dense"]
    assert dense["loss_retain"] > 50 + 4 * dense["loss_retain_error"]
    assert dense["confidence_accuracy"] > 55


def test_a_row_pushed_down_still_shows_membership_by_loss(network, row_removed):
    found = run(network, row_removed).membership
    assert found["edited"]["loss_forget"] == pytest.approx(found["dense"]["loss_forget"], abs=15)
    assert found["head_only"]["loss_forget"] == 50


def test_membership_can_be_left_out(network, row_removed):
    found = run(network, row_removed, settings=AuditSettings(QUICK.probe, QUICK.relearn, Membership("none")))
    assert found.membership == {}
    assert "audit.membership.members=none" in found.protocol["membership"]
    assert "MIA" not in found.figures["edited"]


def sides(source: Images, forget: int = 3) -> Sides:
    own = source.labels == forget
    return Sides(source.images[own], source.labels[own], source.images[~own], source.labels[~own])


def relearn(model, *, fresh, steps=12, aim=(50.0, 50.0), settings=None):
    settings = settings or Relearn(samples=32, batch=8, steps=steps)
    return returned(
        attack(
            model, "3", [3], Arena(sides(patterns(30, 0)), sides(patterns(30, 1)), aim, settings), fresh=fresh, seed=0,
            item="",
        )
    )  # fmt: skip


def test_relearning_leaves_the_network_untouched(network):
    before = state(network)
    grown = [parameter.grad for parameter in network.parameters()]
    relearn(network, fresh=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert [parameter.grad for parameter in network.parameters()] == grown
    assert not network.training


def test_what_is_still_inside_comes_back_and_what_is_not_does_not(network, row_removed, blind):
    assert relearn(row_removed, fresh=True).reached is not None
    assert relearn(blind, fresh=True).reached is None


@pytest.mark.parametrize(("asked", "used"), [(0.01, 0.01), (1.0, 0.1), (10.0, 0.1), (1e6, 1e6)])
def test_steps_too_long_to_bring_the_control_back_are_made_shorter_for_all(network, row_removed, asked, used):
    long = Relearn(samples=16, batch=8, steps=12, held_out=30, learning_rate=asked)
    found = run(network, row_removed, settings=AuditSettings(QUICK.probe, long))
    assert found.protocol["relearn"]["learning rate"] == used
    control, edited = (found.figures[name]["relearn steps"] for name in ("head_only", "edited"))
    assert (control is None) == (asked == 1e6)
    assert control == edited


def test_a_row_pushed_down_does_not_hide_the_class_from_the_attack(network, row_removed):
    curves = [relearn(row_removed, fresh=fresh) for fresh in (True, False)]
    assert curves[1].forget[0] == 0
    assert steps_needed(curves) == relearn(network, fresh=True).reached


def test_answering_the_forgotten_class_to_everything_is_not_coming_back(blind):
    with torch.no_grad():
        blind[3].bias[3] = 1e4
    curve = relearn(blind, fresh=False)
    assert curve.forget[0] == 100
    assert curve.reached is None


def test_the_steps_are_the_mean_over_seeds_of_the_faster_row(network, row_removed):
    curve = relearn(row_removed, fresh=True)
    slower = type(curve)("as saved", 0, (0,), (0.0,), (0.0,), None)
    other = type(curve)("as saved", 1, (0, 9), (0.0, 60.0), (90.0, 90.0), 9)
    assert steps_needed([curve, slower]) == curve.reached
    assert steps_needed([curve, slower, other]) == (curve.reached + 9) / 2
    assert steps_needed([slower]) is None
    assert steps_needed([]) is None


def test_a_fresh_row_has_no_weights_and_the_mean_bias_of_the_others():
    layer = nn.Linear(4, 3)
    kept = layer.weight.detach().clone(), layer.bias.detach().clone()
    fresh_rows_(layer, [1])
    assert not layer.weight[1].any()
    assert float(layer.bias.detach()[1]) == pytest.approx(float((kept[1][0] + kept[1][2]) / 2))
    assert torch.equal(layer.weight[[0, 2]], kept[0][[0, 2]])


# -------------------------------------------------------------------------------------------------------------- depths


def test_depths_are_the_ends_of_resolutions_and_the_penultimate_features(network):
    found = find_depths(network, torch.randn(2, 3, 8, 8), features=48)
    assert [(at.name, at.module, at.grid) for at in found] == [("0", "0", 2), ("1", "1", 2), ("penultimate", "3", 1)]
    assert [at.name for at in find_depths(network, torch.randn(2, 3, 8, 8), depths=1)] == ["penultimate"]


def test_a_transformer_is_read_at_even_distances():
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 4, stride=4)
            self.blocks = nn.Sequential(*(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(6)))
            self.head = nn.Linear(8, 4)

        def forward(self, images: Tensor) -> Tensor:
            tokens = self.embed(images).flatten(2).mT
            for block in self.blocks:
                tokens = tokens + block(tokens)
            return self.head(tokens.mean(1))

    found = find_depths(Tokens().eval(), torch.randn(2, 3, 8, 8))
    assert found[-1].name == "penultimate"
    assert len(found) >= 2


def test_maps_are_averaged_over_a_grid_and_sequences_over_tokens():
    maps = torch.randn(2, 3, 4, 4)
    assert torch.allclose(summarise(maps, 2)[:, 0], maps[:, 0, :2, :2].mean((1, 2)))
    assert torch.allclose(summarise(maps.permute(0, 2, 3, 1), 2), summarise(maps, 2))
    assert torch.allclose(summarise(torch.ones(2, 7, 3)), torch.ones(2, 3))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("forget", "words"),
    [
        ([9], "there is no class 9; the classes are 0 ant, 1 bee, 2 cat, 3 dog, 4 elk"),
        ([], "at least one class must be forgotten, got none"),
        ([0, 1, 2, 3, 4], "all 5 classes shall be forgotten and none would be left"),
    ],
)
def test_classes_that_cannot_be_forgotten_are_named(network, row_removed, forget, words):
    with pytest.raises(ConfigError, match=words):
        run(network, row_removed, forget=forget)


def test_too_few_samples_for_a_probe_are_refused(network, row_removed):
    with pytest.raises(
        DataError, match=r"class 3 \(dog\) has 6 calibration images, a probe needs at least 10; give more"
    ):
        run(network, row_removed, calibration=patterns(6, 0))
    with pytest.raises(DataError, match=r"class 3 \(dog\) has 12 calibration images, .* 20 without evaluation data"):
        run(network, row_removed, calibration=patterns(12, 0), evaluation=None)
    with pytest.raises(DataError, match=r"class 3 \(dog\) has 4 evaluation images, a probe needs at least 10 held-out"):
        run(network, row_removed, evaluation=patterns(4, 1))
    source = patterns(30, 0)
    alone = Images(source.images[source.labels == 3], source.labels[source.labels == 3])
    with pytest.raises(DataError, match="no class but the forgotten has 10 calibration images"):
        run(network, row_removed, calibration=alone)
    with pytest.raises(DataError, match="evaluation images of the forgotten classes only"):
        run(network, row_removed, evaluation=alone)


def test_labels_that_do_not_fit_are_refused(network, row_removed):
    with pytest.raises(DataError, match="a label for every image, got 7 labels for 300 images"):
        run(network, row_removed, calibration_labels=torch.zeros(7, dtype=torch.int64))
    with pytest.raises(DataError, match="expected labels 0 to 4 for the network's 5 classes, got 8"):
        run(network, row_removed, calibration_labels=torch.full((300,), 8))
    with pytest.raises(DataError, match="a label for every image, got images without labels"):
        run(network, row_removed, evaluation=Images(patterns(60, 1).images, None))


def test_a_reference_with_other_classes_is_refused(network, row_removed):
    other = nn.Sequential(*network[:3], nn.Linear(48, 4)).eval()
    with pytest.raises(
        DataError, match="audit.reference has 4 classes and the dense network 5; give a network with the"
    ):
        run(network, row_removed, reference=other)


def test_a_network_without_a_linear_classifier_is_refused(randomise_):
    model = randomise_(nn.Sequential(nn.Conv2d(3, CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    with pytest.raises(UnsupportedModelError, match="do not come straight out of a linear layer"):
        run(model, copy.deepcopy(model))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Probe(samples=5), "audit.probe.samples must be a whole number from 10; got 5"),
        (lambda: Probe(strength=0), "audit.probe.strength must be a number above 0; got 0"),
        (lambda: Relearn(steps=0), "audit.relearn.steps must be a whole number from 1; got 0"),
        (lambda: Relearn(learning_rate=0), "audit.relearn.learning_rate must be a number above 0; got 0"),
        (lambda: Relearn(threshold=1.5), "audit.relearn.threshold must be a number with 0 < threshold <= 1; got 1.5"),
        (lambda: Membership("evaluation"), "audit.membership.members must be calibration or none; got 'evaluation'"),
        (lambda: Membership(samples=2), "audit.membership.samples must be a whole number from 8; got 2"),
    ],
)
def test_settings_out_of_range_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()
