"""Two processes that share the calibration sequences end with the network that one process ends with."""

import subprocess
import sys

import pytest
import torch

from modhifi_cli.engine.team import Team
from modhifi_cli.engine.token_walk import DecoderOptions
from modhifi_cli.errors import ConfigError, ModHiFiError
from modhifi_cli.numerics.allocation import Global
from modhifi_cli.numerics.compensation import Joint
from tests.decoders import tiny
from tests.engine.test_prune_decoder import prune


def pruned(team: Team):
    """Everything that is exchanged: error curves, held-out moments, and the cross moments of the dense reference."""
    model = tiny("llama")
    options = DecoderOptions(components=("mlp", "attention"))
    joint = Joint(reference="dense")
    prune(model, options=options, compensation=joint, allocation=Global(floor=0.1), walked={"team": team})
    return model.state_dict()


def member(rank: int, size: int, store: str, make=pruned):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        return make(Team(rank, size))
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


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.card)])
def test_several_processes_prune_as_one_does(tmp_path, size):
    store = tmp_path / "store"
    others = together(tmp_path, size, f"member(rank, {size}, {str(store)!r})")
    try:
        first = member(0, size, str(store))
        assert [other.wait(timeout=300) for other in others] == [0] * len(others)
    finally:
        for other in others:
            other.kill()
    alone = pruned(Team())
    for rank in range(1, size):
        for name, tensor in torch.load(tmp_path / f"{rank}.pt").items():
            assert torch.equal(first[name], tensor)
            assert torch.allclose(tensor, alone[name], atol=1e-4 * float(alone[name].abs().max()))


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
    store = tmp_path / "store"
    (other,) = together(tmp_path, 2, f"member(rank, 2, {str(store)!r}, apart)")
    try:
        told = member(0, 2, str(store), apart)
        assert other.wait(timeout=300) == 0
    finally:
        other.kill()
    assert told.startswith("NumericsError: layers.4: expected the same kept sets and weights in all 2 processes")
    assert torch.load(tmp_path / "1.pt").startswith("EndedElsewhere: layers.4")


def test_shares_are_a_partition():
    shares = [Team(rank, 3).share(10) for rank in range(3)]
    assert shares == [(0, 3), (3, 6), (6, 10)]


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(ConfigError, match="21 processes share 20 calibration sequences"):
        prune(tiny("llama"), walked={"team": Team(0, 21)})
