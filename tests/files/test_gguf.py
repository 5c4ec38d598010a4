"""GGUF files: keys, names and layouts that llama.cpp wants, read back; and what cannot be written, in one sentence."""


import numpy
import pytest
import torch

from modhifi_cli.errors import ConfigError, NumericsError, UnsupportedModelError
from modhifi_cli.files.exports.gguf import Gguf
from modhifi_cli.files.exports.written import Intent
from modhifi_cli.records import LoadedModel, TextInput
from tests.decoders import FAMILIES, byte_tokenizer, tiny, tokenizer, uneven

gguf = pytest.importorskip("gguf", reason="pip install gguf")


def loaded(model, words=None):
    return LoadedModel(model, "tiny", TextInput(words, model.config.vocab_size, 64, 0), {}, "drawn")


def export(model, folder, words=None, facts=None, **settings):
    settings = {"vocabulary": "auto" if words else "none"} | settings
    return Gguf(**settings)(loaded(model, words), example=torch.zeros(1, 4), path=folder, facts=facts or {})


def fields(file):
    reader = gguf.GGUFReader(file)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3"])
def test_unequal_layers_are_written_with_their_own_widths(tmp_path, family):
    report = export(uneven(family), tmp_path, type="f32", facts={"sparsity": 0.4})
    keys, tensors = fields(report.path)
    assert keys["general.architecture"] == "deci" and report.max_difference == 0
    assert keys["deci.feed_forward_length"] == [48, 12]
    assert keys["deci.attention.head_count"] == [4, 2] and keys["deci.attention.head_count_kv"] == [2, 2]
    assert keys["deci.attention.key_length"] == keys["deci.attention.value_length"] == 8
    assert keys["deci.rope.dimension_count"] == 8 and keys["deci.block_count"] == 2
    assert "sparsity 0.4" in keys["general.description"]
    assert tuple(tensors["blk.1.ffn_down.weight"].shape) == (12, 32)
    assert tuple(tensors["blk.1.attn_q.weight"].shape) == (32, 16)


def test_equal_layers_are_a_llama_and_queries_turn_from_halves_to_pairs(tmp_path):
    model = tiny("llama")
    keys, tensors = fields(export(model, tmp_path, type="f32").path)
    assert keys["general.architecture"] == "llama" and keys["llama.feed_forward_length"] == 48
    ours = model.model.layers[0].self_attn.q_proj.weight.numpy()
    theirs = tensors["blk.0.attn_q.weight"].data
    # Head 1 has rows 8 … 15; pair n of a file is rows n and n + 4 of the head.
    assert numpy.array_equal(theirs[8:16], ours[[8, 12, 9, 13, 10, 14, 11, 15]])
    assert numpy.array_equal(tensors["blk.0.attn_v.weight"].data, model.model.layers[0].self_attn.v_proj.weight.numpy())


@pytest.mark.parametrize("type_, bits", [("f16", 16), ("bf16", 16), ("q8_0", 8.5), ("q5_0", 5.5), ("q5_1", 6), ("q4_0", 4.5), ("q4_1", 5)])  # fmt: skip
def test_every_type_comes_back_as_near_as_it_rounds(tmp_path, type_, bits):
    report = export(tiny("llama", intermediate_size=64), tmp_path, type=type_)
    _, tensors = fields(report.path)
    down = tensors["blk.0.ffn_down.weight"]
    assert down.n_bytes * 8 == down.n_elements * bits
    assert 0 < report.max_difference <= report.max_logit / 4
    assert tensors["output_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32


def test_a_wrong_tensor_is_found_when_it_is_read_back(tmp_path, monkeypatch):
    quantize = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda values, kind: quantize(values * 1.001, kind))
    with pytest.raises(NumericsError, match=r"export.gguf: token_embd.weight comes back with a difference of"):
        export(tiny("llama"), tmp_path, type="f16")
    assert not list(tmp_path.iterdir())


def test_a_byte_level_tokenizer_is_written_with_its_merges(tmp_path):
    words = byte_tokenizer()
    keys, _ = fields(export(tiny("llama", vocab_size=304), tmp_path, words).path)
    assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.tokens"][:2] == ["<s>", "</s>"] and len(keys["tokenizer.ggml.tokens"]) == 304
    assert keys["tokenizer.ggml.token_type"][:3] == [3, 3, 1] and keys["tokenizer.ggml.token_type"][-1] == 5
    assert keys["tokenizer.ggml.tokens"][-1] == "[PAD303]" and "h e" in keys["tokenizer.ggml.merges"]
    assert keys["tokenizer.ggml.bos_token_id"] == 0 and keys["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
])  # fmt: skip
def test_scaled_rotations_are_told(tmp_path, rope):
    model = tiny("llama", rope_parameters={"rope_theta": 5000.0} | rope)
    keys, _ = fields(export(model, tmp_path).path)
    assert keys["llama.rope.scaling.type"] == rope["rope_type"] and keys["llama.rope.freq_base"] == 5000
    assert keys["llama.rope.scaling.factor"] == rope["factor"]


def test_a_sliding_window_bounds_the_context(tmp_path):
    keys, _ = fields(export(tiny("mistral", sliding_window=16), tmp_path).path)
    assert keys["llama.context_length"] == 16


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llama", "mistral", "qwen2", "phi3", "qwen3"}))
def test_other_families_are_refused_before_the_run_with_the_way_that_works(family):
    with pytest.raises(UnsupportedModelError, match=r"export.gguf: \w+ cannot be written: only .*convert_hf_to_gguf"):
        Gguf(vocabulary="none").foresee(loaded(tiny(family)), Intent())


def test_unequal_layers_with_norms_of_queries_are_refused_before_the_run():
    with pytest.raises(UnsupportedModelError, match=r"q_norm.*allocation=uniform"):
        Gguf(vocabulary="none").foresee(loaded(tiny("qwen3")), Intent(even=False))
    Gguf(vocabulary="none").foresee(loaded(tiny("qwen3")), Intent(even=True))


@pytest.mark.parametrize("settings, intent, said", [
    ({"type": "q3"}, Intent(), r"export.gguf.type must be one of f32, f16.*got 'q3'"),
    ({"vocabulary": "some"}, Intent(), r"export.gguf.vocabulary must be auto or none; got 'some'"),
    ({"type": "q8_0"}, Intent(round_to=8), r"blocks of 32 values, and hidden widths will be multiples of 8; add round_to"),
])  # fmt: skip
def test_wrong_settings_are_refused_before_the_run(settings, intent, said):
    with pytest.raises(ConfigError, match=said):
        Gguf(**{"vocabulary": "none"} | settings).foresee(loaded(tiny("llama")), intent)


def test_a_width_that_the_type_cannot_hold_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"blocks of 32 values, and model.layers.0.mlp.down_proj has 48 and 1 more; .*"):
        export(tiny("llama"), tmp_path, type="q8_0")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changed, said", [
    ({"hidden_act": "gelu"}, r"its MLPs use gelu"),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, r"rotary embeddings of type dynamic"),
])  # fmt: skip
def test_what_the_format_does_not_compute_is_refused(changed, said):
    with pytest.raises(UnsupportedModelError, match=said):
        Gguf(vocabulary="none").foresee(loaded(tiny("llama", **changed)), Intent())


def test_a_tensor_without_a_place_is_refused_by_name(tmp_path):
    model = tiny("llama")
    model.model.layers[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModelError, match=r"model.layers.0.extra.weight has no place"):
        export(model, tmp_path)


@pytest.mark.parametrize("words, said", [
    (None, r"has no fast tokenizer"),
    (tokenizer(), r"of type WordLevel, and llama.cpp's decoders take byte-pair encodings"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_written_is_refused(words, said):
    with pytest.raises(UnsupportedModelError, match=said):
        Gguf().foresee(loaded(tiny("llama"), words), Intent())


def test_a_split_without_a_name_asks_for_it():
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=made)
    with pytest.raises(UnsupportedModelError, match=r"\(Whitespace\) has no name here; set export.gguf.pre=NAME"):
        Gguf().foresee(loaded(tiny("llama", vocab_size=304), words), Intent())
    Gguf(pre="gpt-2").foresee(loaded(tiny("llama", vocab_size=304), words), Intent())


def test_a_missing_library_is_one_sentence(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"export=\[gguf\] needs the package gguf, .*modhifi\[language\]"):
        Gguf().foresee(loaded(tiny("llama")), Intent())


def test_a_gguf_files_licence_and_file_name_travel_with_what_is_made_of_it(tmp_path):
    from gguf import GGUFReader, GGUFWriter

    from modhifi_cli.models.hf import _license

    writer = GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert GGUFReader(tmp_path / "base.gguf").get_field("general.license") is not None
    assert _license(tmp_path / "base.gguf", gguf=True) == "apache-2.0"
    assert _license(tmp_path, gguf=False) is None
