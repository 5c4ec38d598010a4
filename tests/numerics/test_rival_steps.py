"""Steps that published rivals are made of: against sums over the rows themselves."""

import pytest
import torch

from modhifi_cli.numerics.compensation import Constant, NoCompensation, restored_constant
from modhifi_cli.numerics.scoring import Wanda
from tests.numerics import helpers


@pytest.mark.parametrize("per", [1, 3])
def test_wanda_is_the_sum_of_weights_times_the_root_mean_square_of_their_input(per):
    consumer, data = helpers.make(per=per, in_group=4)
    size = data.double().square().mean(0).sqrt()
    (votes,) = Wanda()([consumer], []).votes
    assert votes.shape == (1, 4)
    for component in range(4):
        own = slice(component * per, (component + 1) * per)
        expected = sum(float(weight.abs() @ size[own]) for weight in consumer.weight[:, own].double())
        assert float(votes[0, component]) == pytest.approx(expected, rel=1e-5)


def test_constant_keeps_the_weights_and_restores_the_mean_of_what_went():
    consumer, data = helpers.make()
    kept = torch.tensor([0, 2, 3])
    weight = Constant().solve(consumer, kept).weight
    assert torch.equal(weight, NoCompensation().solve(consumer, kept).weight)
    gone = [component for component in range(consumer.components) if component not in kept.tolist()]
    expected = consumer.weight.double()[:, gone] @ data.double().mean(0)[gone]
    assert torch.allclose(restored_constant(consumer, kept, weight), expected, rtol=0, atol=1e-6)
    assert Constant.needs_statistics and not NoCompensation.needs_statistics
