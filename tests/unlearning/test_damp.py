"""DAMP-like unlearning on small networks: what every layer keeps, what it forgets, and every error it can cause."""

import copy

import pytest
import torch

from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.segments import inputs_seen
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.models import cifar_resnet
from modhifi_cli.numerics.rows import Window, unfold_rows
from modhifi_cli.unlearning.damp import DampLike
from tests.unlearning.test_search import Tokens, images, run, trained  # noqa: F401

__all__ = ["trained"]


@pytest.fixture
def resnet(randomise_):
    return randomise_(cifar_resnet.build(depth=8, num_classes=5, widths=(4, 6, 8)))


def class_means(model, name, source):
    """Mean row of every class at a layer's input, by walking over all rows."""
    seen = []
    with torch.no_grad(), inputs_seen(model, {name: lambda x: seen.append(x.double())}):
        model(source.images)
    module, maps = model.get_submodule(name), torch.cat(seen)
    if isinstance(module, torch.nn.Linear):
        rows = maps.reshape(len(maps), -1, maps.shape[-1]).mean(1)
    else:
        rows = unfold_rows(maps, Window.of(3, module.stride, 1))
        rows = rows.view(len(maps), -1, 9 * maps.shape[1]).mean(1)
    return torch.stack([rows[source.labels == cls].mean(0) for cls in range(5)])


@pytest.mark.parametrize("layer", ["layer3.0.conv2", "linear"])
def test_retain_means_pass_a_layer_unchanged_and_the_forget_mean_loses_what_it_has_alone(trained, layer):  # noqa: F811
    dense, source = copy.deepcopy(trained), images()
    edits, _ = run(trained, source, DampLike(alpha=1.0, rise=0.0), layers=[layer])
    (edit,) = [edit for edit in edits if edit.name == layer]
    assert edit.facts["directions"] == 1
    means = class_means(dense, layer, source)
    before = dense.get_submodule(layer).weight.detach().double().flatten(1) @ means.T
    after = edit.modules[0].tensors["weight"].double().flatten(1) @ means.T
    retain = [0, 1, 3, 4]
    if layer != "linear":  # what is in front of the classifier was edited, so it has other inputs
        assert torch.allclose(after[:, retain], before[:, retain], rtol=0, atol=1e-4 * float(before.abs().max()))
        assert (after[:, 2] - before[:, 2]).norm() > 1e-2 * before[:, 2].norm()


def test_strength_grows_with_depth(trained):  # noqa: F811
    edits, _ = run(trained, images(), DampLike(alpha=1.0, depth=4, rise=1.0))
    alphas = [edit.facts["alpha"] for edit in edits]
    assert len(alphas) == 5 and alphas == sorted(alphas) and alphas[-1] == 1.0 and alphas[0] < alphas[-1]
    again, _ = run(trained, images(), DampLike(alpha=0.5, depth=4, rise=0.0))
    assert {edit.facts["alpha"] for edit in again} == {0.5}


def test_it_forgets_and_keeps(trained):  # noqa: F811
    source = images(150)
    before = (trained(source.images).argmax(1) == source.labels).double()
    run(trained, source, DampLike(depth=1), retain_drop=0.1, forget_target=0.1)
    after = (trained(source.images).argmax(1) == source.labels).double()
    forget = source.labels == 2
    assert before[forget].mean() > 0.8 and after[forget].mean() < 0.2
    assert after[~forget].mean() > before[~forget].mean() - 0.1


def test_a_network_of_layernorms_forgets_too(randomise_):
    model = randomise_(Tokens())
    dense = copy.deepcopy(model)
    edits, _ = run(model, images(), DampLike(alpha=1.0, depth=2))
    for edit in edits:
        apply_edit_(dense, edit)
    assert [edit.name for edit in edits] == ["up", "down", "head"]
    assert weights_hash(dense) == weights_hash(model)


def test_the_split_into_batches_does_not_matter(trained):  # noqa: F811
    again = copy.deepcopy(trained)
    run(trained, images(), DampLike(alpha=1.0), batch_size=60)
    run(again, images(), DampLike(alpha=1.0), batch_size=7)
    for ours, theirs in zip(trained.parameters(), again.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.detach().abs().max()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": -1}, "method.alpha must be a number from 0, or auto; got -1"),
        ({"depth": 1.5}, r"method.depth must be a whole number from 0 \(the classifier alone\), or null; got 1.5"),
        ({"rise": "steep"}, "method.rise must be a number from 0; got 'steep'"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DampLike(**settings)
