"""ModHiFi-P on small networks: what a run promises whatever the network, and every error it can cause."""

import copy
import functools

import pytest
import torch
from torch import nn

from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.plan import Plan, Summary
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.law import randomise_
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.numerics.allocation import Uniform
from modhifi_cli.numerics.compensation import Joint, NoCompensation, PerKernel
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import Magnitude, Random, Singleton
from modhifi_cli.numerics.selection import TopK, Union
from modhifi_cli.records import Edit
from tests import reference
from tests.graph import networks


class Images:
    """Unlabelled images in memory; asking for labels is impossible."""

    def __init__(self, images):
        self.images, self.protocol = images, {}

    def __len__(self):
        return len(self.images)

    def batches(self, batch_size):
        for batch in self.images.split(batch_size):
            yield batch, None


def setting(name, count=24):
    model, _ = networks.small(name)
    randomise_(model)
    torch.manual_seed(1)
    return model, Images(torch.randn(count, 3, 16, 16))


RECIPE = ("scoring", "selection", "compensation", "allocation", "schedule", "classifier")
BUDGET = ("sparsity", "target", "round_to")


def pruning(model, images, *, done=(), seed=0, **settings):
    """The generator of a run, from settings by name."""
    recipe = Recipe(**{key: settings.pop(key) for key in RECIPE if key in settings}, seed=seed)
    budget = Budget(**{key: settings.pop(key) for key in BUDGET if key in settings})
    yield from prune_(ImageWalk(model, images, seed=seed, **settings), recipe, budget, done=done)


def run(model, images, *, iterations=1, **settings):
    settings = {
        "sparsity": 0.4, "target": "params", "scoring": Singleton(), "selection": Union(), "compensation": PerKernel(),
        "allocation": Uniform(), "schedule": functools.partial(geometric, iterations=iterations), "batch_size": 8,
        **settings,
    }  # fmt: skip
    events = list(pruning(model, images, **settings))
    return [e for e in events if isinstance(e, Edit)], events


def test_a_layer_that_runs_twice_is_repaired_as_least_squares_over_all_its_rows():
    model, images = setting("repeated")
    dense = copy.deepcopy(model)
    edits, _ = run(
        model, images, target="components", sparsity=0.25, exclude=["last"], scoring=Magnitude(), selection=TopK(),
        compensation=Joint(ridge=1e-3),
    )  # fmt: skip
    rows = []
    with torch.no_grad(), inputs_seen(dense, {"fc2": lambda seen: rows.append(seen.flatten(0, -2).double())}):
        dense(images.images)
    rows, weight = torch.cat(rows), dense.fc2.weight.detach().double()
    kept = edits[0].kept.tolist()
    expected = reference.joint_weight(rows, weight, kept, ridge=1e-3, centred=True)
    assert torch.allclose(model.fc2.weight.detach().double(), expected, rtol=0, atol=1e-4)
    assert len(kept) == 18


def test_a_convolution_that_runs_twice_is_repaired_as_least_squares_over_all_its_rows():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.again = torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 4, 3, padding=1)
            self.head = torch.nn.Linear(4, 5)

        def forward(self, images):
            maps = torch.relu(self.stem(images))
            both = [self.again(maps).mean((2, 3)), self.again(maps[:, :, ::2, ::2]).mean((2, 3))]
            return self.head(both[0] * both[1])

    torch.manual_seed(0)
    model, images = Twice().eval(), Images(torch.randn(24, 3, 8, 8))
    dense = copy.deepcopy(model)
    edits, _ = run(
        model, images, target="components", sparsity=0.25, exclude=["head"], scoring=Magnitude(),
        selection=TopK(), compensation=Joint(ridge=1e-3),
    )  # fmt: skip
    (edit,) = [each for each in edits if each.name == "stem"]
    rows = []

    def unfolded(seen):
        rows.append(torch.nn.functional.unfold(seen.double(), 3, padding=1).transpose(1, 2).flatten(0, 1))

    with torch.no_grad(), inputs_seen(dense, {"again": unfolded}):
        dense(images.images)
    weight = dense.again.weight.detach().double().flatten(1)
    features = [9 * one + tap for one in edit.kept.tolist() for tap in range(9)]
    expected = reference.joint_weight(torch.cat(rows), weight, features, ridge=1e-3, centred=True)
    assert torch.allclose(model.again.weight.detach().double().flatten(1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", networks.SMALL)
def test_a_run_narrows_every_kind_of_network_and_its_edits_replay_to_equal_weights(name):
    model, images = setting(name)
    dense = copy.deepcopy(model)
    edits, events = run(model, images)
    summary = events[-1]
    assert isinstance(events[0], Plan) and isinstance(summary, Summary)
    assert abs(summary.achieved["params"] - 0.4) <= 0.1 and (
        abs(summary.achieved["params"] - 0.4) <= 0.01 or summary.warnings
    )
    assert torch.isfinite(model(images.images)).all()
    for edit in edits:
        apply_edit_(dense, edit)
    assert weights_hash(dense) == weights_hash(model)


INNER = (
    networks.LinearHeads, networks.Portioned, networks.Scaled, networks.Radix, networks.Tokens, networks.Upsampled,
)  # fmt: skip


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("compensation", [PerKernel(), Joint(ridge=1e-3)])
def test_what_follows_channels_is_repaired_and_replayed_with_them(inner, compensation):
    torch.manual_seed(0)
    model, images = networks.Between(inner()).eval(), Images(torch.randn(24, 3, 16, 16))
    randomise_(model)
    dense = copy.deepcopy(model)
    edits, events = run(model, images, sparsity=0.3, compensation=compensation)
    assert edits and isinstance(events[-1], Summary)
    again = copy.deepcopy(dense)
    for edit in edits:
        apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)
    plain = copy.deepcopy(dense)
    run(plain, images, sparsity=0.3, compensation=NoCompensation())
    with torch.no_grad():
        wanted = dense(images.images)
        errors = [float((one(images.images) - wanted).square().mean()) for one in (model, plain)]
    assert errors[0] < errors[1]  # repaired is nearer to the dense network than merely cut


def test_keeping_all_components_returns_the_same_logits():
    model, images = setting("option_a")
    before = model(images.images)
    edits, _ = run(model, images, sparsity=0.0)
    assert not edits
    assert torch.equal(model(images.images), before)


@pytest.mark.parametrize("target", ["params", "flops", "components"])
def test_each_target_is_reached_as_predicted(target):
    torch.manual_seed(0)
    model = networks.cifar_resnet.build(depth=14, widths=(12, 24, 36))
    _, events = run(model, Images(torch.randn(16, 3, 16, 16)), sparsity=0.3, target=target)
    assert events[-1].achieved == pytest.approx(events[0].predicted)
    assert events[-1].achieved[target] == pytest.approx(0.3, abs=0.01)
    assert not events[-1].warnings


def test_a_target_missed_by_more_than_a_point_is_said():
    model, images = setting("option_a")
    _, events = run(model, images, sparsity=0.05, round_to=4, target="components")
    assert "sparsity=0.05 of components was asked for" in events[-1].warnings[0]


def test_widths_are_multiples_of_round_to():
    torch.manual_seed(0)
    model = networks.cifar_resnet.build(depth=8, widths=(16, 32, 48))
    run(model, Images(torch.randn(8, 3, 16, 16)), sparsity=0.5, round_to=8)
    assert all(m.out_channels % 8 == 0 for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("name", ["option_a", "projected", "grouped"])
@pytest.mark.parametrize("iterations", [1, 2])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(name, iterations):
    model, images = setting(name)
    dense = copy.deepcopy(model)
    edits, _ = run(model, images, iterations=iterations)
    for stop in (1, len(edits) // 2, len(edits)):
        again = copy.deepcopy(dense)
        rest, _ = run(again, images, iterations=iterations, done=edits[:stop])
        assert len(rest) == len(edits) - stop
        assert weights_hash(again) == weights_hash(model)


def test_a_run_resumes_over_a_part_that_was_left_alone_and_says_so_again():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU(), torch.nn.Conv2d(12, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 12, 3),
        torch.nn.BatchNorm2d(12), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(12, 4),
    ).eval()  # fmt: skip
    model[2].bias.data.fill_(-100.0)  # dead on every image
    dense, images = copy.deepcopy(model), Images(torch.randn(24, 3, 12, 12))
    edits, events = run(model, images)
    empty = [number for number, edit in enumerate(edits) if "left_alone" in edit.facts]
    assert empty and edits[empty[0]].removed.numel() == 0 and len(edits) > len(empty)
    for stop in range(1, len(edits) + 1):
        again = copy.deepcopy(dense)
        rest, later = run(again, images, done=edits[:stop])
        assert len(rest) == len(edits) - stop and weights_hash(again) == weights_hash(model)
        assert later[-1].warnings == events[-1].warnings and "left alone after all: 4: " in str(later[-1].warnings)


def test_edits_of_other_settings_are_not_taken_up():
    model, images = setting("option_a")
    edits, _ = run(copy.deepcopy(model), images)
    with pytest.raises(DataError, match="does not fit these settings"):
        run(copy.deepcopy(model), images, sparsity=0.6, done=edits)
    with pytest.raises(DataError, match="edits more than these settings make"):
        run(copy.deepcopy(model), images, sparsity=0.0, done=edits)


def test_same_seed_same_kept_set_and_another_seed_another():
    model, images = setting("option_a")
    kept = [
        [edit.kept.tolist() for edit in run(copy.deepcopy(model), images, scoring=Random(), seed=seed)[0]]
        for seed in (0, 0, 1)
    ]
    assert kept[0] == kept[1] != kept[2]


@pytest.mark.parametrize("name", ["option_a", "projected", "concatenated"])
def test_neither_the_batch_split_nor_carrying_changes_what_is_kept(name):
    model, images = setting(name)
    reference, _ = run(copy.deepcopy(model), images)
    for settings in ({"batch_size": 5}, {"gathering": Gathering(carry_gigabytes=0.0)}):
        other = copy.deepcopy(model)
        edits, _ = run(other, images, **settings)
        assert [edit.kept.tolist() for edit in edits] == [edit.kept.tolist() for edit in reference]
        for mine, theirs in zip(edits, reference, strict=True):
            for one, two in zip(mine.modules, theirs.modules, strict=True):
                for key, tensor in one.tensors.items():
                    assert torch.allclose(tensor, two.tensors[key], rtol=1e-3, atol=1e-4), (one.module, key)


@pytest.mark.parametrize("name", ["option_a", "projected", "concatenated"])
def test_batchnorm_statistics_are_those_of_one_training_forward_over_everything(name):
    model, images = setting(name)
    edits, _ = run(model, images)
    renewed = {m.module for edit in edits for m in edit.modules if "running_mean" in m.tensors}
    assert renewed
    reference = copy.deepcopy(model).double()
    inputs = {}

    def look(norm_name):
        def hook(module, arguments):
            inputs[norm_name] = arguments[0].detach()

        return hook

    for norm_name in renewed:  # those alone normalise by the batch, as training does
        norm = reference.get_submodule(norm_name).train()
        norm.register_forward_pre_hook(look(norm_name))
    reference(images.images.double())
    for norm_name in renewed:
        norm = model.get_submodule(norm_name)
        maps = inputs[norm_name]
        assert torch.allclose(norm.running_mean.double(), maps.mean((0, 2, 3)), rtol=1e-3, atol=1e-4), norm_name
        variance = maps.var((0, 2, 3), unbiased=False)
        assert torch.allclose(norm.running_var.double(), variance, rtol=1e-3, atol=1e-4), norm_name


def test_norms_in_front_of_every_edit_keep_their_statistics():
    model, images = setting("option_a")
    before = model.bn1.running_mean.clone()
    edits, _ = run(model, images, sparsity=0.7)
    stream = next(edit for edit in edits if edit.name == "conv1")
    assert torch.equal(model.bn1.running_mean, before[stream.kept])


def test_without_repair_the_kept_weights_are_those_of_the_dense_network():
    model, images = setting("projected")
    dense = copy.deepcopy(model)
    edits, _ = run(model, images, compensation=NoCompensation(), batchnorm="stored")
    for edit in edits:
        for module_edit in edit.modules:
            dense_edit = copy.copy(module_edit)
            object.__setattr__(dense_edit, "tensors", {})
            apply_edit_(dense, Edit(edit.name, 0, (dense_edit,), edit.kept, edit.removed))
    for name, tensor in dense.state_dict().items():
        assert torch.allclose(tensor, model.state_dict()[name]), name


def test_with_stored_statistics_repair_restores_the_mean_of_a_lone_consumer():
    model, images = setting("grouped")
    seen = []
    model.layers[1].register_forward_hook(lambda m, x, y: seen.append(y.mean((0, 2, 3))))
    norm, conv = model.layers[4], model.layers[3]
    assert conv.groups == 4 and norm.running_mean is not None
    before = model.layers[6](model.layers[5](norm(conv(torch.relu(model.layers[1](model.layers[0](images.images)))))))
    run(model, images, batchnorm="stored", exclude=["layers.8", "layers.13"])
    maps = images.images
    for layer in model.layers[:7]:
        maps = layer(maps)
    # layers.6 has a bias and no BatchNorm behind it: M8's rule b ← b + W μ − W' μ keeps its mean output
    assert torch.allclose(maps.mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-3)


def test_repair_rebuilds_more_of_the_layer_than_slicing():
    model, images = setting("projected", count=64)
    settings = {"scoring": Magnitude(order=2), "batchnorm": "reestimate"}
    repaired, _ = run(copy.deepcopy(model), images, **settings)
    first = repaired[0].facts["fidelity"]
    class Measured(NoCompensation):
        needs_statistics = True

    sliced, _ = run(copy.deepcopy(model), images, **settings | {"compensation": Measured()})
    assert sliced[0].kept.tolist() == repaired[0].kept.tolist()
    assert all(first[name] >= sliced[0].facts["fidelity"][name] - 1e-9 for name in first)
    assert sum(first.values()) > sum(sliced[0].facts["fidelity"].values())


def test_row_subsampling_changes_fidelity_by_little():
    model, images = setting("projected", count=64)
    exact, _ = run(copy.deepcopy(model), images, scoring=Magnitude(order=2))
    drawn, _ = run(copy.deepcopy(model), images, scoring=Magnitude(order=2),
                   gathering=Gathering(positions_per_image=32))  # fmt: skip
    for name, value in exact[0].facts["fidelity"].items():
        assert drawn[0].facts["fidelity"][name] == pytest.approx(value, abs=0.05)
        assert drawn[0].facts["rows"][name] < exact[0].facts["rows"][name]


def test_baselines_without_repair_need_no_forward_before_the_end():
    model, images = setting("option_a")
    edits, _ = run(model, images, scoring=Magnitude(order=1), compensation=NoCompensation(), batchnorm="stored")
    assert edits and all(edit.facts["rows"] == {name: 0 for name in edit.facts["rows"]} for edit in edits)


def test_excluded_modules_keep_their_tensors():
    model, images = setting("option_a")
    before = {name: tensor.clone() for name, tensor in model.layer2.state_dict().items()}
    run(model, images, exclude=["layer2"], sparsity=0.2, batchnorm="stored")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.layer2.state_dict().items())


def test_a_target_out_of_reach_says_what_can_be_reached():
    model, images = setting("option_a")
    with pytest.raises(ConfigError, match=r"sparsity=0\.9 cannot be reached: .* give at most 0\.\d+"):
        run(model, images, sparsity=0.9, exclude=["layer2", "layer3"])
    with pytest.raises(ConfigError, match="every group of channels is excluded or refused"):
        run(model, images, sparsity=0.5, exclude=["conv1", "layer1", "layer2", "layer3"])


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_outside_the_unit_interval_is_refused(share):
    model, images = setting("option_a")
    with pytest.raises(ConfigError, match=r"must lie in \[0, 1\)"):
        run(model, images, sparsity=share)


def test_nan_weights_name_the_tensor():
    model, images = setting("option_a")
    with torch.no_grad():
        model.layer2[0].conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"weights of 'layer2\.0\.conv2\.weight' hold NaN"):
        run(model, images)


def test_nan_activations_name_the_layer():
    model, images = setting("option_a")
    images.images[3, 0, 0, 0] = float("inf")
    with pytest.raises(NumericsError, match=r"layer1\.0\.conv2: every input value must be finite"):
        run(model, images)
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in model.modules())


def test_an_exact_solve_with_too_few_rows_says_how_many_are_needed():
    model, images = setting("flattened", count=4)
    with pytest.raises(NumericsError, match=r"hidden: an exact solve needs at least \d+ calibration rows, got 4"):
        run(model, images, compensation=PerKernel(ridge=0.0))


def test_a_network_without_groups_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 5))
    with pytest.raises(UnsupportedModelError, match="no group of channels that can be pruned"):
        run(model, Images(torch.randn(4, 3, 16, 16)))


def test_no_images_is_an_error():
    model, _ = setting("option_a")
    with pytest.raises(DataError, match="holds no image"):
        run(model, Images(torch.randn(0, 3, 16, 16)))


@pytest.mark.parametrize("name", ["option_a", "flattened"])
def test_a_refitted_classifier_comes_nearer_to_the_dense_logits_and_resumes(name):
    model, images = setting(name, count=64)
    dense = copy.deepcopy(model)
    plain = copy.deepcopy(model)
    run(plain, images)
    edits, _ = run(model, images, classifier="refit")
    assert edits[-1].name == "classifier" and edits[-1].facts["error_after"] <= edits[-1].facts["error_before"]
    wanted = dense(images.images)

    def distance(other):
        return float((other(images.images) - wanted).square().sum().detach())

    assert distance(model) <= distance(plain)
    for stop in (len(edits) - 1, len(edits)):
        again = copy.deepcopy(dense)
        run(again, images, classifier="refit", done=edits[:stop])
        assert weights_hash(again) == weights_hash(model)


@pytest.mark.parametrize("linear", [True, False])
def test_auto_refits_a_linear_classifier_and_names_another_one_among_what_is_left_alone(linear):
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), *([nn.Linear(8, 5)] if linear else [])]
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), *tail)
    edits, events = run(model.eval(), Images(torch.randn(24, 3, 8, 8)), classifier="auto")
    (plan,) = [event for event in events if isinstance(event, Plan)]
    reasons = [refusal.reason for refusal in plan.refused if refusal.name == "classifier"]
    assert ("classifier" in [edit.name for edit in edits]) is linear
    told = "kept as it is: the logits of Sequential do not come straight out of a linear layer with a bias"
    assert reasons == ([] if linear else [told])


def test_a_network_without_a_linear_classifier_cannot_be_refitted():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="classifier=refit: the logits of Sequential do not come straight"):
        run(model.eval(), Images(torch.randn(8, 3, 16, 16)), classifier="refit")


@pytest.mark.parametrize(
    ("setting_", "message"),
    [
        ({"target": "memory"}, "target must be one of params, flops, components, got 'memory'"),
        ({"batchnorm": "train"}, "batchnorm must be 'reestimate' or 'stored', got 'train'"),
        ({"classifier": "train"}, "classifier must be 'keep', 'refit' or 'auto', got 'train'"),
        ({"round_to": 0}, "round_to must be a whole number from 1, or auto; got 0"),
    ],
)
def test_settings_out_of_range_are_named(setting_, message):
    model, images = setting("option_a", count=4)
    with pytest.raises(ConfigError, match=message):
        run(model, images, **setting_)
