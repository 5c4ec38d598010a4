"""Blocks with a layer scale, and classifiers whose forgotten rows shall answer nothing."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.graph.segments import Segments, outputs_seen
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.unlearning.closings import find_closings
from modhifi_cli.unlearning.collapse import CollapseU
from modhifi_cli.unlearning.contrast import ContrastU
from tests.unlearning.test_search import Tokens, images, run


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-0.5, 1.5, 12))

    def forward(self, tokens):
        return tokens * self.gamma


class Scaled(Tokens):
    """As timm's blocks of DINOv2: tokens + γ · MLP(norm(tokens))."""

    def __init__(self):
        super().__init__()
        self.scale = Scale()
        self.block = nn.Identity()

    def forward(self, inputs):
        tokens = self.embed(inputs).flatten(2).mT
        branch = self.scale(self.down(torch.nn.functional.gelu(self.up(self.norm(tokens)))))
        return self.head(self.last(self.block(tokens + branch)).mean(1))


@pytest.fixture
def scaled(randomise_):
    model = randomise_(Scaled())
    with torch.no_grad():
        model.scale.gamma.copy_(torch.linspace(-0.5, 1.5, 12))
        model.scale.gamma[3] = 0.0
    return model


def test_a_layer_scale_is_found_and_solved_through_where_it_is_not_nothing(scaled):
    example = images().images[:4]
    segments = Segments(scaled, example)
    (closing,) = find_closings(scaled, segments, example, {"up": None, "down": None}, "head").values()
    assert torch.allclose(closing.scale, scaled.scale.gamma.detach(), atol=1e-5)
    given = {}
    names = ("down", closing.place)
    with torch.no_grad(), outputs_seen(scaled, {n: lambda x, n=n: given.update({n: x.clone()}) for n in names}):
        scaled(example)
    own, wanted = given["down"], torch.randn_like(given["down"])
    solved = closing.solved(wanted - closing.beside(own, given), own)
    reached = closing.beside(own, given) + scaled.scale.gamma.detach() * solved
    usable = torch.arange(12) != 3
    assert torch.allclose(reached[..., usable], wanted[..., usable], atol=1e-4)
    assert torch.equal(solved[..., 3], own[..., 3])


def test_collapse_takes_a_network_with_a_layer_scale_and_its_edits_replay(scaled):
    dense = copy.deepcopy(scaled)
    edits, _ = run(scaled, images(), CollapseU(beta=0.5, depth=1))
    assert [edit.name for edit in edits] == ["down", "head"]
    for edit in edits:
        apply_edit_(dense, edit)
    assert weights_hash(dense) == weights_hash(scaled)


def test_the_forgotten_rows_of_a_classifier_answer_the_same_to_all(scaled):
    """With no ridge and more features than needed the row's logits become the retain mean on every fitted image."""
    source = images(150)
    with torch.no_grad():
        before = scaled(source.images)
    level = before[source.labels != 2][:, 2].mean()
    run(scaled, source, ContrastU(beta=1.0, depth=0, ridge=0.0))
    with torch.no_grad():
        after = scaled(source.images)
    assert torch.allclose(after[:, 2], level.expand(150), atol=1e-3 * float(before.abs().max()))
    kept = [0, 1, 3, 4]
    moved = (after - before)[source.labels != 2][:, kept].norm() / before[source.labels != 2][:, kept].norm()
    assert moved < 0.5
