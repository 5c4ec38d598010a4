"""Reading weights: nests and prefixes are undone, and what does not fit is told by name."""

import json
import re

import pytest
import safetensors.torch
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.models.weights import (
    fit_weights_,
    load_weights_,
    read_weights,
    seeded_initialisation,
    undrawn_weights,
)


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def filled(value: float = 0.5) -> dict[str, torch.Tensor]:
    return {
        name: torch.full_like(tensor, value) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in network().state_dict().items()
    }


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tensors: tensors,
        lambda tensors: {"state_dict": tensors, "epoch": 3},
        lambda tensors: {"model": {"state_dict": tensors}, "best_acc": 0.9},
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: {"model_state_dict": {f"_orig_mod.module.{name}": t for name, t in tensors.items()}},
        lambda tensors: {"n_averaged": torch.tensor(7), **{f"module.{name}": t for name, t in tensors.items()}},
        lambda tensors: {"state_dict_ema": {f"module.{name}": t for name, t in tensors.items()}, "epoch": 3},
        lambda tensors: {
            "state_dict": {f"model.{name}": t for name, t in tensors.items()}
            | {"criterion.weight": torch.ones(2), "val_acc.total": torch.tensor(3), "metric.confusion": torch.ones(2, 2)},
            "pytorch-lightning_version": "2.5",
        },
        lambda tensors: {name: tensor.half() for name, tensor in tensors.items()},
    ],
    ids=["plain", "state_dict", "model_state_dict", "module_prefix", "two_prefixes_in_a_nest", "averaged", "timm's average",
         "lightning", "half with its counters"],  # fmt: skip
)
def test_nests_and_prefixes_are_undone(tmp_path, wrap):
    torch.save(wrap(filled()), tmp_path / "weights.pt")
    model = network()
    load_weights_(model, tmp_path / "weights.pt")
    assert all((p == 0.5).all() for p in model.parameters())


def test_a_prefix_that_belongs_to_the_network_stays():
    model = nn.Module()
    model.model = nn.Linear(2, 2)
    fit_weights_(model, {"model.weight": torch.ones(2, 2), "model.bias": torch.ones(2)}, source="here")
    assert (model.model.weight == 1).all()


def test_half_precision_becomes_the_networks_own_dtype():
    model = network()
    fit_weights_(model, {n: t.half() if t.is_floating_point() else t for n, t in filled().items()}, source="here")
    assert model[0].weight.dtype == torch.float32


def test_safetensors_are_read_and_named_by_their_hash(tmp_path):
    safetensors.torch.save_file(filled(), tmp_path / "weights.safetensors")
    account = load_weights_(network(), tmp_path / "weights.safetensors")
    assert re.search(r"weights\.safetensors \(sha256 [0-9a-f]{12}\)$", account)


def test_batch_counters_and_option_a_maps_may_be_missing():
    from modhifi_cli.models import cifar_resnet

    model = cifar_resnet.build(depth=8)
    tensors = {
        name: torch.ones_like(tensor)
        for name, tensor in model.state_dict().items()
        if not name.endswith(("num_batches_tracked", "shortcut.source"))
    }
    before = model.layer2[0].shortcut.source.clone()
    fit_weights_(model, tensors, source="here")
    assert torch.equal(model.layer2[0].shortcut.source, before)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(DataError, match="no file at .*nowhere.pt; give the path"):
        read_weights(tmp_path / "nowhere.pt")


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_damaged_bytes_are_told(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 these are not weights")
    with pytest.raises(DataError, match=f"{name} (cannot be read as|is damaged or holds)"):
        read_weights(tmp_path / name)


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(network(), tmp_path / "whole.pt")
    with pytest.raises(DataError, match="only tensors are read from it; save model.state_dict"):
        read_weights(tmp_path / "whole.pt")


def test_a_file_without_tensors_is_told(tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "log.pt")
    with pytest.raises(DataError, match="holds no tensors by name"):
        read_weights(tmp_path / "log.pt")


def test_weights_of_another_network_are_told_by_the_first_three_names():
    tensors = {f"encoder.{index}.weight": torch.ones(2) for index in range(5)}
    with pytest.raises(
        DataError,
        match=r"here does not fit Sequential: missing 0\.weight, 0\.bias, 1\.weight and 5 more; "
        r"unexpected encoder\.0\.weight, encoder\.1\.weight, encoder\.2\.weight and 2 more; choose the model",
    ):
        fit_weights_(network(), tensors, source="here")


def test_another_shape_is_told():
    tensors = filled() | {"3.weight": torch.ones(10, 4)}
    with pytest.raises(DataError, match=r"of another shape: 3\.weight is 10×4 instead of 2×4.*set model\.num_classes"):
        fit_weights_(network(), tensors, source="here")


def test_quantised_weights_are_not_taken_for_floats():
    tensors = filled() | {"0.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)}
    with pytest.raises(DataError, match=r"0\.weight is 4×3×3×3 int8 instead of 4×3×3×3"):
        fit_weights_(network(), tensors, source="here")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_told_by_layer_and_nothing_is_copied(value):
    model = network()
    before = model[0].weight.clone()
    tensors = filled()
    tensors["3.bias"][1] = value
    with pytest.raises(DataError, match=r"3\.bias in here holds NaN or infinite values"):
        fit_weights_(model, tensors, source="here")
    assert torch.equal(model[0].weight, before)


def test_seeded_initialisation_is_repeatable_and_leaves_the_global_generator_alone():
    state = torch.random.get_rng_state()
    weights = []
    for seed in (0, 0, 1):
        with seeded_initialisation(seed):
            weights.append(nn.Linear(3, 3).weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_that_are_not_drawn_end_truncated_draws():
    """Such draws go on until no value lies outside, whatever the memory held before."""
    with undrawn_weights():
        weight = torch.full((5, 7), 9.0)
        nn.init.trunc_normal_(weight, std=0.02)
        assert float(weight.abs().max()) <= 2
        far = nn.init.trunc_normal_(torch.full((5, 7), 9.0), a=2.5, b=3.0)
        assert 2.5 <= float(far.min()) and float(far.max()) <= 3


def test_class_names_are_one_for_each_logit_and_differ():
    from modhifi_cli.models.preprocessing import named_classes

    assert named_classes(["a", 1], 2) == ("a", "1") and named_classes(None, 2) is None
    for names, message in ((["a"], "expected 2 names, one for each logit, got 1"), (["a", "a"], "a stands there twice"),
                           ("ab", "expected a list of names in the order of the logits, got 'ab'")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"model.classes: {message}"):
            named_classes(names, 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_a_folder_of_shards_is_read_by_its_index(tmp_path, suffix):
    tensors = {name: tensor.clone() for name, tensor in filled().items()}
    names = list(tensors)
    shards = {f"part-1{suffix}": names[:3], f"part-2{suffix}": names[3:]}
    for file, mine in shards.items():
        write = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
        write({name: tensors[name] for name in mine}, tmp_path / file)
    with pytest.raises(DataError, match="holds 2 files of weights and no index .part-1"):
        load_weights_(network(), tmp_path)
    index = tmp_path / f"model{suffix}.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, mine in shards.items() for name in mine}}))
    model = network()
    assert "sha256" in load_weights_(model, tmp_path) and all((p == 0.5).all() for p in model.parameters())
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.bin"}}))
    with pytest.raises(DataError, match="names ../elsewhere.bin, which is not in the folder; copy all files"):
        load_weights_(network(), tmp_path)
    index.write_text("[]")
    with pytest.raises(DataError, match="cannot be read as an index of weights; copy it again"):
        load_weights_(network(), tmp_path)


def test_a_folder_with_one_file_is_that_file_and_one_with_none_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no file of weights"):
        load_weights_(network(), tmp_path)
    torch.save(filled(), tmp_path / "pytorch_model.bin")
    load_weights_(network(), tmp_path)


def test_what_training_keeps_is_told_where_the_network_is_not_all_there():
    tensors = filled()
    del tensors["3.bias"]
    with pytest.raises(DataError, match="missing 3.bias; unexpected criterion.weight"):
        fit_weights_(network(), tensors | {"criterion.weight": torch.ones(2)}, source="here")


def test_a_torchscript_archive_says_how_to_get_its_tensors(tmp_path):
    torch.jit.trace(network().eval(), torch.zeros(1, 3, 3, 3)).save(tmp_path / "net.pt")
    with pytest.raises(DataError, match="is a TorchScript archive, which holds code; save its tensors alone with"):
        read_weights(tmp_path / "net.pt")
