"""The folder for timm: opened by timm in a process that cannot import this package, or refused by the layer in the way."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modhifi_cli
from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.files.exports.timm import Timm
from modhifi_cli.files.exports.written import Intent
from modhifi_cli.models import timm as networks
from modhifi_cli.records import LoadedModel, Preprocess
from tests.tasks import stranger

SIDE = {"test_resnet": 32, "test_efficientnet": 32, "test_convnext": 32, "test_vit": 32}
_LISTED = """
import timm
from safetensors.torch import load_file, save_file
from timm.models import adapt_model_from_string, load_checkpoint
model = adapt_model_from_string(timm.create_model("local-dir:timm"), open("timm/pruned.txt").read().strip())
load_checkpoint(model, "timm/model.safetensors")
save_file({"logits": model.eval()(load_file("in")["images"]).detach()}, "out")
"""
_BY_ARGUMENTS = """
import timm
from safetensors.torch import load_file, save_file
model = timm.create_model("local-dir:timm", pretrained=True).eval()
save_file({"logits": model(load_file("in")["images"]).detach()}, "out")
"""


def network(name):
    given = {"size": SIDE[name], "resize": None, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    options = {"img_size": SIDE[name], "patch_size": 8} if name == "test_vit" else None
    return networks.load(name=name, weights="random", num_classes=5, preprocess=given, options=options, classes=list("abcde"))


def pruned(loaded, *settings, exclude=()):
    images = torch.randn(8, 3, *loaded.preprocess.size, generator=torch.Generator().manual_seed(0))
    small, _ = modhifi_cli.prune(
        loaded.model, images, sparsity=0.3, preset="fast", exclude=exclude, settings=settings, check_data=False
    )
    return dataclasses.replace(loaded, model=small)


def write(loaded, path):
    example = torch.zeros(1, 3, *loaded.preprocess.size)
    return Timm()(loaded, example=example, path=path, facts={"sparsity": "0.3"})


def opened_by_timm(script, folder, images):
    save_file({"images": images}, folder / "in")
    stranger(script, folder=folder)
    return load_file(folder / "out")["logits"]


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_convolutional_networks_open_by_timms_list_of_widths(tmp_path, name):
    loaded = pruned(network(name))
    report = write(loaded, tmp_path)
    assert "adapt_model_from_string" in report.opens
    assert sorted(file.name for file in (tmp_path / "timm").iterdir()) == ["config.json", "model.safetensors", "pruned.txt"]
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(opened_by_timm(_LISTED, tmp_path, images), loaded.model(images), atol=1e-5, rtol=1e-4)


def test_a_transformer_with_even_blocks_opens_by_name_and_short_blocks_get_neurons_of_zeros(tmp_path):
    dense = network("test_vit")
    attentions = [name for name, _ in dense.model.named_modules() if name.endswith(".attn")]
    loaded = pruned(dense, "allocation=uniform", exclude=attentions)
    first = loaded.model.blocks[0].mlp
    first.fc1.weight, first.fc1.bias = nn.Parameter(first.fc1.weight[:-1]), nn.Parameter(first.fc1.bias[:-1])
    first.fc2.weight = nn.Parameter(first.fc2.weight[:, :-1])
    first.fc1.out_features = first.fc2.in_features = len(first.fc1.weight)

    assert write(loaded, tmp_path).opens == 'timm.create_model("local-dir:timm", pretrained=True)'
    images = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(opened_by_timm(_BY_ARGUMENTS, tmp_path, images), loaded.model(images), atol=1e-5, rtol=1e-4)
    assert first.fc1.out_features == len(first.fc1.weight) < max(b.mlp.fc1.out_features for b in loaded.model.blocks)


def test_timm_reads_the_preprocessing_and_the_classes_from_the_folder(tmp_path):
    import timm

    write(network("test_resnet"), tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path / 'timm'}")
    told = timm.data.resolve_model_data_config(model)
    found = [tuple(told[key]) for key in ("mean", "std", "input_size")]
    assert found == [(0.1, 0.2, 0.3), (0.5, 0.6, 0.7), (3, 32, 32)]
    assert model.num_classes == 5 and '"sparsity": "0.3"' in (tmp_path / "timm" / "config.json").read_text()


def test_removed_heads_are_refused_by_the_name_of_the_layer(tmp_path):
    loaded = pruned(network("test_vit"), "allocation=uniform")
    with pytest.raises(UnsupportedModelError, match=r"timm cannot build blocks\.\d\.attn\.qkv with weight .* exclude=\[blocks"):
        write(loaded, tmp_path)
    assert not list(tmp_path.iterdir())


def test_blocks_of_unequal_width_are_refused_before_the_run_and_after_it(tmp_path):
    loaded = network("test_vit")
    with pytest.raises(UnsupportedModelError, match=r"test_vit with one mlp_ratio, .* add allocation=uniform, or choose"):
        Timm().foresee(loaded, Intent(even=False))
    Timm().foresee(loaded, Intent(even=True))
    mlp = loaded.model.blocks[0].mlp
    mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, 4), nn.Linear(4, mlp.fc2.out_features)
    with pytest.raises(UnsupportedModelError, match=r"here they keep 4 to \d+ hidden neurons; prune with allocation=uniform"):
        write(loaded, tmp_path)


def test_neurons_of_zeros_are_refused_where_a_norm_would_see_them(tmp_path):
    loaded = network("test_vit")
    mlp = loaded.model.blocks[0].mlp
    neurons = mlp.fc1.out_features
    mlp.fc1, mlp.fc2 = nn.Linear(mlp.fc1.in_features, neurons - 1), nn.Linear(neurons - 1, mlp.fc2.out_features)
    mlp.norm = nn.LayerNorm(neurons - 1)
    with pytest.raises(UnsupportedModelError, match=rf"blocks.0.mlp keeps {neurons - 1} hidden .* {neurons}, and its norm sees all"):
        write(loaded, tmp_path)


def test_what_timms_list_has_no_word_for_is_refused_before_the_run():
    loaded = networks.load(name="resnext26ts", weights="random", num_classes=5)
    with pytest.raises(UnsupportedModelError, match=r"timm's list of widths cannot say .*; choose export=\[plain\]"):
        Timm().foresee(loaded, Intent())


def test_hidden_widths_without_an_argument_are_refused_before_the_run():
    with pytest.raises(UnsupportedModelError, match=r"no argument for the hidden widths of test_convnext \(ConvNeXt\); choose"):
        Timm().foresee(network("test_convnext"), Intent(even=True))


def test_networks_of_others_are_refused_before_the_run():
    other = LoadedModel(nn.Identity(), "mine", Preprocess((8, 8), (0.0,), (1.0,)), {"builder": "x"}, "drawn", None)
    with pytest.raises(UnsupportedModelError, match=r"mine is no network of timm \(model=timm model.name=…\); choose export=\[p"):
        Timm().foresee(other, Intent())
