"""Worst-case gains against singular values of dense matrices, against differences that occur, and what has none."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.graph.gains import module_constant, worst_case_gains
from tests.studies.helpers import network


def dense_matrix(module, shape):
    """The module as a matrix over whole maps, column by column."""
    size = torch.Size(shape).numel()
    zero = module(torch.zeros(1, *shape, dtype=torch.float64))
    columns = [
        (module(one.reshape(1, *shape)) - zero).flatten() for one in torch.eye(size, dtype=torch.float64).split(1)
    ]
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 3, stride=2), nn.Conv2d(4, 4, 3, groups=2, dilation=2),
        nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect"), nn.Linear(12, 5),
    ],
    ids=["same", "stride", "groups", "reflect", "linear"],
)  # fmt: skip
def test_constants_are_the_largest_singular_value_of_the_whole_map(module):
    torch.manual_seed(1)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    shape = (12,) if isinstance(module, nn.Linear) else (module.in_channels, 6, 5)
    with torch.no_grad():
        matrix = dense_matrix(module, shape)
    found = module_constant(module, torch.zeros(1, *shape, dtype=torch.float64))
    assert found == pytest.approx(float(torch.linalg.matrix_norm(matrix, 2)), rel=1e-3)


def test_batchnorm_and_overlapping_windows_have_theirs():
    norm = nn.BatchNorm2d(3).eval()
    norm.weight.data = torch.tensor([1.0, -4.0, 2.0])
    norm.running_var = torch.tensor([1.0, 4.0, 0.25])
    assert module_constant(norm, torch.zeros(1, 3, 2, 2)) == pytest.approx(4.0, rel=1e-4)
    assert module_constant(nn.MaxPool2d(2), torch.zeros(1, 3, 4, 4)) == 1
    assert module_constant(nn.MaxPool2d(3, stride=2), torch.zeros(1, 3, 4, 4)) == 2


def test_no_change_of_a_layer_moves_the_logits_further_than_its_gain(randomise_):
    model = randomise_(network())
    example = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    gains = worst_case_gains(copy.deepcopy(model), example)
    assert not gains.unbounded and set(gains.of) == {"0", "3.conv1", "3.conv2", "6"}
    assert gains.of["6"] == 1
    with torch.no_grad():
        dense = model(example)
        for name, gain in gains.of.items():
            for seed in range(5):
                change = []

                def push(module, inputs, output, seed=seed, change=change):
                    generator = torch.Generator().manual_seed(seed)
                    noise = torch.randn(output.shape, generator=generator, dtype=torch.float64)
                    change.append(noise.flatten(1).norm(dim=1))
                    return output + noise

                handle = model.get_submodule(name).register_forward_hook(push)
                moved = (model(example) - dense).norm(dim=1)
                handle.remove()
                assert bool((moved <= gain * change[0] * (1 + 1e-6)).all()), name


def test_a_sum_of_two_paths_adds_their_gains():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

        def forward(self, x):
            y = self.first(x)
            return y + 3.0 * torch.relu(self.second(y))

    model = Twice().double()
    gains = worst_case_gains(model, torch.randn(2, 4, dtype=torch.float64))
    second = float(torch.linalg.matrix_norm(model.second.weight.detach(), 2))
    assert gains.of == pytest.approx({"first": 1 + 3 * second, "second": 3.0})


def test_a_product_of_two_activations_has_no_gain_and_is_named():
    class Gate(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.a(x) * self.b(x))

    gains = worst_case_gains(Gate(), torch.randn(2, 4))
    assert gains.unbounded == ("MulBackward0",)
    assert gains.of["a"] == float("inf") and gains.of["c"] == 1
