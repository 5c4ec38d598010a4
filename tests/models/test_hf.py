"""Decoders of transformers: loading, refusing, saving so that plain transformers opens the folder, and restoring."""

import json

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.files import artifacts
from modhifi_cli.graph.components import Layout
from modhifi_cli.graph.decoder import find_parts, slice_part_
from modhifi_cli.models import hf
from tests.decoders import FAMILIES, saved, tiny, tokenizer

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def cut(model, widths, unit="query_head"):
    """The model with all MLPs, or all MLPs and heads, narrowed; `widths` maps a kind to widths, layer after layer."""
    parts = find_parts(model, components=list(widths), unit=unit).parts
    layout = Layout(model, [part.group for part in parts])
    for part in parts:
        keep = widths[part.kind][part.layer]
        runs = torch.arange(part.components).view(part.balanced, -1)[:, : keep // part.balanced]
        slice_part_(model, layout, part, runs.flatten())
    return model


def loaded(folder, **settings):
    return hf.load(path=str(folder), **settings)


@pytest.mark.parametrize("widths", [{"mlp": (32, 32)}, {"mlp": (32, 32), "attention": (2, 2)}, {"mlp": (16, 40)}])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_decoder_reloads_and_opens_natively_where_the_family_can_say_its_shape(family, widths, tmp_path):
    from transformers import AutoModelForCausalLM

    source = loaded(saved(tmp_path / "dense", family))
    model = cut(source.model, widths)
    artifacts.save_model(tmp_path / "model", source, model)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        again = artifacts.load_saved(tmp_path)
        assert torch.equal(again.model(input_ids=IDS, use_cache=False).logits, wanted)
    assert again.preprocess.tokenizer("abc")["input_ids"] == source.preprocess.tokenizer("abc")["input_ids"]
    even = len(set(widths["mlp"])) == 1
    tied = "attention" in widths and family in ("opt", "gpt2", "gpt_neox")  # heads × head_dim is the width there
    assert artifacts.opens_natively(tmp_path) == (even and not tied)
    if even and not tied:
        with torch.no_grad():
            plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
            assert torch.equal(plain(input_ids=IDS, use_cache=False).logits, wanted)


def test_head_counts_that_a_configuration_refuses_are_known():
    model = tiny("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    assert hf.accepts_heads(model, 4, 2)
    assert not hf.accepts_heads(model, 5, 5)  # 48 is not divisible by 5
    assert not hf.accepts_heads(tiny("gpt2"), 2, 2)


@pytest.mark.parametrize("missing, said", [
    ("config.json", "has no config.json"),
    ("model.safetensors", "has no weights"),
    ("tokenizer", "has no tokenizer"),
])  # fmt: skip
def test_a_folder_that_lacks_something_says_what(tmp_path, missing, said):
    folder = saved(tmp_path / "dense")
    for file in folder.glob(f"{missing}*"):
        file.unlink()
    with pytest.raises(DataError, match=said):
        loaded(folder)


def test_damaged_weights_are_named(tmp_path):
    folder = saved(tmp_path / "dense")
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read .* copy it again"):
        loaded(folder)


def test_other_networks_are_refused(tmp_path):
    folder = saved(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())

    def refuse(match, **changed):
        (folder / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(UnsupportedModelError, match=match):
            loaded(folder)

    refuse("weights are quantised .gptq.", quantization_config={"quant_method": "gptq", "bits": 4})
    refuse("no causal decoder", model_type="bert", architectures=["BertForMaskedLM"])
    refuse("sequence-to-sequence", model_type="t5", architectures=["T5For…"], is_encoder_decoder=True)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="could not be fetched from the hub"):
        hf.load(path="nobody/nothing-of-this-name")


def test_wrong_settings_are_named(tmp_path):
    with pytest.raises(ConfigError, match="give either model.path"):
        hf.load()
    with pytest.raises(ConfigError, match="model.dtype must be auto or one of"):
        hf.load(path="x", dtype="int8")
    with pytest.raises(DataError, match="no folder at"):
        hf.load(path=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="model: dry_run=true reads a configuration; give model.path=FOLDER_OR_HUB_NAME"):
        hf.outline(path=None)
    with pytest.raises(DataError, match=f"model.path: {tmp_path} has no config.json; copy the network's there"):
        hf.outline(path=str(tmp_path))
    with pytest.raises(DataError, match="no file at"):
        hf.load(gguf=str(tmp_path / "nothing.gguf"))


@pytest.mark.parametrize("given", [{}, {"path": "a", "gguf": "b"}])
def test_a_decoder_comes_from_one_place(given):
    with pytest.raises(ConfigError, match="give either model.path=FOLDER_OR_HUB_NAME or model.gguf=FILE"):
        hf.load(**given)


def test_random_weights_come_from_a_seed(tmp_path):
    folder = saved(tmp_path / "dense")
    one, two = (loaded(folder, weights="random", seed=seed).model.lm_head.weight for seed in (1, 1))
    assert torch.equal(one, two) and not torch.equal(one, loaded(folder, weights="random", seed=2).model.lm_head.weight)
    assert tokenizer().bos_token_id == 0


def test_where_a_configuration_was_read_from_is_no_part_of_the_network():
    model = tiny("llama")
    model.config._model_name_or_path = model.config._name_or_path = "/some/where"  # the former by GGUF files
    assert not [key for key in hf.described(model, None, "tiny").architecture["kwargs"]["config"] if "name_or_path" in key]
