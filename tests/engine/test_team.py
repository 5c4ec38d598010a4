"""Two processes that share the calibration sequences end with the network that one process ends with."""

import subprocess
import sys

import pytest
import torch

from modhifi_cli.engine.team import Team
from modhifi_cli.engine.token_walk import DecoderOptions
from modhifi_cli.errors import ConfigError
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


def member(rank: int, store: str):
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        return pruned(Team(rank, 2))
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_prune_as_one_does(tmp_path):
    store = tmp_path / "store"
    other = tmp_path / "other.pt"
    script = (
        f"import torch; from tests.engine.test_team import member; torch.save(member(1, {str(store)!r}), {str(other)!r})"
    )
    second = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script])
    try:
        first = member(0, str(store))
        assert second.wait(timeout=300) == 0
    finally:
        second.kill()
    alone = pruned(Team())
    for name, tensor in torch.load(other).items():
        assert torch.equal(first[name], tensor)
        assert torch.allclose(tensor, alone[name], atol=1e-4 * float(alone[name].abs().max()))


def test_shares_are_a_partition():
    shares = [Team(rank, 3).share(10) for rank in range(3)]
    assert shares == [(0, 3), (3, 6), (6, 10)]


def test_more_processes_than_sequences_are_refused():
    with pytest.raises(ConfigError, match="21 processes share 20 calibration sequences"):
        prune(tiny("llama"), walked={"team": Team(0, 21)})
