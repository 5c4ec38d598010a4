"""Folders with unequal layers in plain transformers: a process that cannot import this package opens them."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modhifi_cli.errors import DataError
from modhifi_cli.files import artifacts, manifest
from modhifi_cli.models import hf, uneven
from modhifi_cli.records import LoadedModel, TextInput
from tests.decoders import FAMILIES, tiny, tokenizer
from tests.decoders import uneven as made
from tests.tasks import stranger

FAMILIES_WITH_CODE = sorted({*FAMILIES} & {*uneven.FAMILIES})
_STRANGER = """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
assert AutoTokenizer.from_pretrained(sys.argv[1])("abc")["input_ids"]
ids = torch.arange(3, 15)[None]
asked = dict(attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=None)
with torch.no_grad():
    logits = model(input_ids=ids).logits
    cached = model.generate(ids, **asked)
    plain = model.generate(ids, use_cache=False, **asked)
    fixed = model.generate(ids, cache_implementation="static", **asked)
    model.save_pretrained(sys.argv[2])
    again = AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True).eval()
    model.set_attn_implementation("eager")
    eager = model(input_ids=ids).logits
    save_file({"logits": logits, "again": again(input_ids=ids).logits, "cached": cached, "plain": plain, "fixed": fixed,
               "eager": eager}, sys.argv[3])
"""


def folder_of(model, place):
    model = model.requires_grad_(False)
    text = TextInput(tokenizer(), 64, 64, 0)
    kwargs = {"config": hf._described(model.config), "dtype": "float32"}
    architecture = {"builder": "modhifi_cli.models.hf.build", "kwargs": kwargs}
    artifacts.save_model(place, LoadedModel(model, "tiny", text, architecture, "drawn"), model)
    return place


@pytest.mark.parametrize("family", FAMILIES_WITH_CODE)
def test_transformers_alone_opens_unequal_layers(tmp_path, family):
    model = made(family)
    if family in ("llama", "qwen2"):
        model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32), requires_grad=False)
    folder = folder_of(model, tmp_path / "model")
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    stranger(_STRANGER, folder, tmp_path / "saved", tmp_path / "answers", folder=tmp_path, **offline)
    answers = load_file(tmp_path / "answers")
    with torch.no_grad():
        wanted = model(input_ids=torch.arange(3, 15)[None]).logits
    assert torch.equal(answers["logits"], wanted) and torch.equal(answers["again"], wanted)
    assert torch.allclose(answers["eager"], wanted, atol=1e-4)
    assert torch.equal(answers["cached"], answers["plain"]) and torch.equal(answers["cached"], answers["fixed"])
    again = artifacts.load_saved(folder).model
    assert torch.equal(again(input_ids=torch.arange(3, 15)[None]).logits, wanted)


def test_our_own_reader_never_runs_the_file(tmp_path):
    folder = folder_of(made("llama"), tmp_path / "model")
    (folder / uneven.FILE).write_text("raise SystemExit('it ran')\n")
    with pytest.raises(DataError, match=f"{uneven.FILE}: damaged or changed"):
        artifacts.load_saved(folder)
    manifest.write(folder)  # listed as it is now, by the user whose folder it is
    artifacts.load_saved(folder)


@pytest.mark.parametrize("how, said", [
    ("other code", f"{uneven.FILE}: is not the code that this version of modhifi writes"),
    ("another file", "evil.py: a saved network has no such file"),
    ("another class", f"{uneven.FILE}: a saved network has no such file"),
])  # fmt: skip
def test_a_strangers_folder_brings_our_code_or_none(tmp_path, how, said):
    folder = folder_of(made("llama"), tmp_path / "model")
    if how == "other code":
        (folder / uneven.FILE).write_text("raise SystemExit('it ran')\n")
    elif how == "another file":
        (folder / "evil.py").write_text("")
    else:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"]["AutoConfig"] = "evil.Make"
        (folder / "config.json").write_text(json.dumps(config))
    manifest.write(folder)
    told = json.loads((folder / manifest.NAME).read_text())
    del told["mark"]  # only its maker's machine can make one
    (folder / manifest.NAME).write_text(json.dumps(told))
    with pytest.raises(DataError, match=said):
        artifacts.load_saved(folder)


def test_the_configuration_says_each_layers_own_numbers(tmp_path):
    folder = folder_of(made("llama"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"intermediate_size": 48, "num_attention_heads": 4},
        "1": {"intermediate_size": 12, "num_attention_heads": 2},
    }
    assert config["num_key_value_heads"] == 2 and config["head_dim"] == 8
    assert not uneven.deci(config)


def test_vllms_form_is_there_where_query_heads_are_alike(tmp_path):
    model = tiny("llama")
    from modhifi_cli.graph.components import Layout
    from modhifi_cli.graph.decoder import find_parts, slice_part_

    (part,) = [one for one in find_parts(model, components=["mlp"]).parts if one.layer == 0]
    slice_part_(model, Layout(model, [part.group]), part, torch.arange(20))
    folder = folder_of(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert uneven.deci(config)
    space: dict = {}
    exec(compile(uneven.code(model), "file", "exec"), space)
    del config["model_type"], config["architectures"], config["auto_map"]
    blocks = space["UnevenLlamaConfig"](**config).block_configs
    assert [block.ffn.intermediate_size for block in blocks] == [20, 48]
    assert [block.attention.n_heads_in_group for block in blocks] == [2, 2]
    assert not any(block.attention.no_op or block.ffn.no_op or hasattr(block.ffn, "ffn_mult") for block in blocks)


@pytest.mark.parametrize("family, even, by, why", [
    ("llama", True, "transformers", ""),
    ("llama", False, "transformers with trust_remote_code", "its layers differ in width"),
    ("gemma3_text", True, "transformers", ""),
    ("opt", False, "modhifi", "its layers differ in width, and there is no file of code of ours for opt"),
    ("bloom", True, "modhifi", "the configuration of bloom has no key for the width of the MLPs"),
    ("mpt", True, "modhifi", "the configuration of mpt has no key for the width of the MLPs"),
])  # fmt: skip
def test_what_will_open_the_folder_is_known_before_the_run(family, even, by, why):
    from transformers import AutoConfig, AutoModelForCausalLM

    if family in FAMILIES:
        model = tiny(family)
    else:
        sizes = {"bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
                 "gemma3_text": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
                                 "num_key_value_heads": 2, "intermediate_size": 48}}  # fmt: skip
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=64, **sizes[family]))
    opening = hf.will_open(model, even=even)
    assert (opening.by, opening.why) == (by, why)
    assert str(opening).startswith(("plain transformers opens", "transformers opens", "modhifi_cli.load_model opens"))
