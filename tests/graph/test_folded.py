"""Computed weights become plain ones, and the answers stay."""

import warnings

import pytest
import torch
from torch import nn

import modhifi_cli
from modhifi_cli.graph.folded import copied, fold_

RULES = {
    "weight norm, hooks": (nn.utils.weight_norm, "weight norm"),
    "weight norm": (nn.utils.parametrizations.weight_norm, "weight norm"),
    "spectral norm, hooks": (nn.utils.spectral_norm, "spectral norm"),
    "spectral norm": (nn.utils.parametrizations.spectral_norm, "spectral norm"),
    "orthogonal": (nn.utils.parametrizations.orthogonal, "_Orthogonal"),
    "masks": (lambda layer: nn.utils.prune.l1_unstructured(layer, "weight", 0.4), "pruning masks"),
}


def network(rule) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layers = [rule(nn.Conv2d(3, 12, 3)), nn.ReLU(), rule(nn.Conv2d(12, 12, 3)), nn.ReLU(), nn.Flatten(),
                  rule(nn.Linear(192, 4))]  # fmt: skip
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize("name", RULES)
def test_folding_keeps_the_answers_and_leaves_plain_weights(name):
    rule, kind = RULES[name]
    model, images = network(rule), torch.randn(4, 3, 8, 8)
    before = model(images)  # with a graph: the hooks' weights are no leaves now
    folded = copied(model)
    assert fold_(folded) == (f"{kind} of 3 layers is folded into the weights (0, 2, 5)",)
    torch.testing.assert_close(folded(images), before)
    assert set(folded.state_dict()) == {f"{place}.{leaf}" for place in (0, 2, 5) for leaf in ("weight", "bias")}
    torch.testing.assert_close(model(images), before)  # the user's own stays as it was
    assert fold_(nn.Linear(3, 3)) == ()


@pytest.mark.parametrize("name", RULES)
def test_a_network_with_computed_weights_prunes_and_says_that_they_are_folded(name):
    rule, kind = RULES[name]
    model = network(rule)
    model(torch.randn(2, 3, 8, 8))
    narrow, result = modhifi_cli.prune(model, torch.randn(48, 3, 8, 8), sparsity=0.3, preset="fast")
    assert f"{kind} of 3 layers is folded into the weights (0, 2, 5)" in result.warnings
    assert narrow[0].weight.is_leaf and result.achieved["params"] == pytest.approx(0.3, abs=0.1)
