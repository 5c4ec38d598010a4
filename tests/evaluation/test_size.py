"""Size: the file's bytes against the file itself, and what the counter says passed on."""

import torch
from torch import nn

from modhifi_cli.evaluation import size


def test_bytes_are_those_of_the_file_that_safetensors_writes(tmp_path, tiny_convnet):
    from safetensors.torch import save_file

    tiny_convnet.register_buffer("halves", torch.zeros(3, dtype=torch.float16))
    tiny_convnet.register_buffer("source", torch.tensor([0, -1, 1]))
    tiny_convnet.register_buffer("flag", torch.tensor([True]))
    tiny_convnet.register_buffer("none", torch.zeros(0, 4))
    save_file(tiny_convnet.state_dict(), tmp_path / "weights.safetensors")

    assert size.safetensors_bytes(tiny_convnet) == (tmp_path / "weights.safetensors").stat().st_size


def test_tied_weights_are_counted_once(tmp_path):
    from safetensors.torch import save_model

    tied = nn.Sequential(nn.Linear(40, 40, bias=False), nn.Linear(40, 40, bias=False))
    tied[1].weight = tied[0].weight
    save_model(tied, str(tmp_path / "weights.safetensors"))

    # save_model also writes into the header which name stands for which.
    assert 0 <= (tmp_path / "weights.safetensors").stat().st_size - size.safetensors_bytes(tied) < 200


def test_parameters_and_macs_are_those_of_the_convolutions(measured, tiny_convnet):
    example = torch.zeros(1, 3, 8, 8)

    result = {m.name: m for m in measured(size.measure, models={"dense": tiny_convnet}, example=example)}

    assert result["parameters"].value == sum(parameter.numel() for parameter in tiny_convnet.parameters())
    assert result["macs"].value == 64 * 6 * 3 * 9 + 64 * 8 * 6 * 9 + 8 * 5
    assert [result[name].unit for name in ("parameters", "macs", "file_bytes")] == ["parameters", "MACs", "bytes"]
    assert result["file_bytes"].value == size.safetensors_bytes(tiny_convnet)
    assert measured.progress[-1].done == measured.progress[-1].total == 1


def test_network_in_training_mode_keeps_its_statistics(measured, tiny_convnet):
    tiny_convnet.train()
    before = {name: tensor.clone() for name, tensor in tiny_convnet.state_dict().items()}

    measured(size.measure, models={"dense": tiny_convnet}, example=torch.ones(1, 3, 8, 8))

    assert tiny_convnet.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_convnet.state_dict().items())
