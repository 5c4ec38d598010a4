"""Processes that share the calibration samples end with the network that one process ends with."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from modhifi_cli.engine.gathering import HeldOutApart
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.team import Team
from modhifi_cli.engine.token_walk import DecoderOptions
from modhifi_cli.engine.walk import Budget
from modhifi_cli.errors import ConfigError, ModHiFiError
from modhifi_cli.graph.law import randomise_
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from modhifi_cli.numerics.moments import RowMoments, second_moment
from tests.decoders import tiny
from tests.engine.test_both_walks import RECIPE, Images
from tests.engine.test_prune_decoder import prune
from tests.graph import transformers


def pruned(team: Team):
    """Everything that is exchanged: error curves, held-out moments, and the cross moments of the dense reference."""
    model = tiny("llama")
    options = DecoderOptions(components=("mlp", "attention"))
    joint = Joint(reference="dense")
    prune(model, options=options, compensation=joint, allocation=Global(floor=0.1), walked={"team": team})
    return model.state_dict()


class Mixed(nn.Module):
    """A residual network with a depthwise layer, BatchNorms and a classifier: everything that images exchange."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
        self.wide = nn.Sequential(nn.Conv2d(12, 20, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.depth = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1, groups=20, bias=False), nn.BatchNorm2d(20), nn.ReLU())
        self.narrow = nn.Sequential(nn.Conv2d(20, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12, 5)

    def forward(self, images):
        stream = self.stem(images)
        stream = stream + self.narrow(self.depth(self.wide(stream)))
        return self.head(stream.mean((2, 3)))


def pruned_images(team: Team, batchnorm: str = "reestimate", count: int = 46):
    """As `pruned`, of a network that reads images; the shares of three processes differ."""
    torch.manual_seed(0)
    model = Mixed()
    randomise_(model)
    images = torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1)) + 1
    walk = ImageWalk(model.eval(), Images(images), batch_size=7, batchnorm=batchnorm, team=team)
    joint = Joint(reference="dense")
    recipe = replace(RECIPE, compensation=joint, allocation=Global(floor=0.1), classifier="auto")
    for _ in prune_(walk, recipe, Budget(0.3, "flops")):
        pass
    return model.state_dict()


def pruned_attention(team: Team):
    """As `pruned_images`, of transformers' ViT: heads and features of queries and keys are numbers of its modules."""
    model = transformers.build("hf_vit")
    randomise_(model)
    images = transformers.images("hf_vit", 24)
    walk = ImageWalk(model, Images(images), batch_size=7, batchnorm="stored", query_key=True, team=team)
    for _ in prune_(walk, replace(RECIPE, compensation=Joint(), allocation=Global(floor=0.1)), Budget(0.4, "flops")):
        pass
    return model.state_dict()


def member(rank: int, size: int, store: str, make, **given):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        return make(Team(rank, size), **given)
    finally:
        torch.distributed.destroy_process_group()


def together(folder, size: int, call: str) -> list[subprocess.Popen]:
    """The other processes of a team, each keeping what ``call`` (with ``rank``) gives in ``RANK.pt``."""
    start = "import sys, torch; from tests.engine.test_team import *; rank = int(sys.argv[1]); "
    script = f"{start}torch.save({call}, sys.argv[2])"
    return [
        subprocess.Popen([sys.executable, "-W", "ignore", "-c", script, str(rank), str(folder / f"{rank}.pt")])
        for rank in range(1, size)
    ]


def of_all(folder, size: int, make, **given) -> list:
    """What a function of this file gives in each process of a team, the first one here."""
    store = str(folder / "store")
    others = together(folder, size, f"member(rank, {size}, {store!r}, {make.__name__}, **{given!r})")
    try:
        first = member(0, size, store, make, **given)
        assert [other.wait(timeout=300) for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
    return [first, *(torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(1, size))]


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.card)])
def test_several_processes_prune_as_one_does(tmp_path, size):
    first, *others = of_all(tmp_path, size, pruned)
    alone = pruned(Team())
    for other in others:
        for name, tensor in other.items():
            assert torch.equal(first[name], tensor)
            assert torch.allclose(tensor, alone[name], atol=1e-4 * float(alone[name].abs().max()))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.card)])
@pytest.mark.parametrize("batchnorm", ["reestimate", "stored"])
def test_several_processes_prune_an_image_network_as_one_does(tmp_path, size, batchnorm):
    first, *others = of_all(tmp_path, size, pruned_images, batchnorm=batchnorm)
    alone = pruned_images(Team(), batchnorm=batchnorm)
    for other in others:
        for name, tensor in other.items():
            assert torch.equal(first[name], tensor)
            assert tensor.shape == alone[name].shape
            assert torch.allclose(tensor.double(), alone[name].double(), atol=1e-4 * float(alone[name].abs().max()))


def test_several_processes_prune_what_is_counted_in_numbers_of_modules(tmp_path):
    first, other = of_all(tmp_path, 2, pruned_attention)
    for name, tensor in pruned_attention(Team()).items():
        assert torch.equal(first[name], other[name])
        assert torch.allclose(tensor, first[name], atol=1e-3 * float(tensor.abs().max()))


def test_more_processes_than_images_are_refused():
    with pytest.raises(ConfigError, match="9 processes share 8 calibration images; start fewer .* data.num_samples"):
        pruned_images(Team(0, 9), count=8)


@pytest.mark.parametrize("rows", [(2, 3), (30, 5), (0, 4)], ids=["samples", "summed", "one has none"])
def test_moments_of_several_processes_are_those_of_all_rows(tmp_path, rows):
    statistics, _ = of_all(tmp_path, 2, means, rows=rows)
    own = torch.cat([drawn_rows(rank, count) for rank, count in enumerate(rows)]).double()
    assert statistics.rows == len(own) and (statistics.samples is not None) == (len(own) <= 8)
    centred = own - own.mean(0)
    found = second_moment(statistics, centred=True)
    torch.testing.assert_close(found, centred.T @ centred / len(own), rtol=1e-4, atol=1e-5)


def drawn_rows(rank, count):
    """Rows far from 0, so that every process has a shift of its own."""
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(rank)) + 100 * (rank + 1)


def means(team, rows):
    sums = HeldOutApart(lambda: RowMoments(8), hold_out=False, team=team)
    # Where this process has had nothing, what was held out says of what shape the moments are.
    if rows[team.rank]:
        sums.update(drawn_rows(team.rank, rows[team.rank]))
        return sums.results()[0]
    held = RowMoments(8)
    held.update(drawn_rows(7, 3))
    return team.mean(held.result(), nothing=True)


def apart(team: Team):
    """One layer of two networks that are not the same; what each process is told."""
    weight = torch.ones(3) if team.rank == 0 else torch.tensor([1.0, 1.0, 1.0000001])
    team.agree("layers.3", {"same": torch.ones(2)}, torch.device("cpu"))
    try:
        team.agree("layers.4", {"weight": weight}, torch.device("cpu"))
    except ModHiFiError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_processes_that_do_not_hold_the_same_stop_with_a_sentence(tmp_path):
    told, elsewhere = of_all(tmp_path, 2, apart)
    assert told.startswith("NumericsError: layers.4: expected the same kept sets and weights in all 2 processes")
    assert elsewhere.startswith("EndedElsewhere: layers.4")


def test_shares_are_a_partition():
    shares = [Team(rank, 3).share(10) for rank in range(3)]
    assert shares == [(0, 3), (3, 6), (6, 10)]


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(ConfigError, match="21 processes share 20 calibration sequences"):
        prune(tiny("llama"), walked={"team": Team(0, 21)})
