"""Weights that stay in their files: the same network, without a copy of it in memory, and files that nobody changes."""

import hashlib

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from modhifi_cli.graph.surgery import weights_hash
from modhifi_cli.models import hf
from modhifi_cli.models.mapped import mapped
from tests.decoders import saved, tiny, tokenizer

FAMILIES = ["llama", "gpt2", "gemma2", "phi3", "opt", "qwen2"]


def resident() -> int:
    with open("/proc/self/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_a_mapped_decoder_is_the_one_that_transformers_reads(family, shards, tmp_path):
    tiny(family).save_pretrained(tmp_path, max_shard_size=shards)
    config = AutoConfig.from_pretrained(tmp_path)
    found, expected = mapped(tmp_path, config, "auto"), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert found is not None and weights_hash(found) == weights_hash(expected)
    ids = torch.arange(3, 15)[None]
    assert torch.equal(found.eval()(ids).logits, expected.eval()(ids).logits)
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    tied = [model.get_output_embeddings().weight is model.get_input_embeddings().weight for model in (found, expected)]
    assert tied[0] == tied[1]


def test_what_the_files_do_not_hold_as_it_is_wanted_is_read_by_transformers(tmp_path):
    folder = saved(tmp_path / "dense")
    config = AutoConfig.from_pretrained(folder)
    assert mapped(folder, config, torch.bfloat16) is None
    loaded = hf.load(path=str(folder), dtype="bfloat16")
    assert loaded.again is None and loaded.model.dtype == torch.bfloat16
    assert hf.load(path=str(folder)).again is not None
    other = hf.load(path=str(saved(tmp_path / "other", "gpt_neox")))  # its tensors are renamed on the way in
    assert other.again is None and weights_hash(other.twin()) == weights_hash(other.model)


def test_a_network_and_its_twin_take_no_memory_of_their_own(tmp_path):
    model = tiny("llama", hidden_size=512, intermediate_size=4096, vocab_size=8000)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    size = sum(tensor.numel() * 4 for tensor in model.parameters())
    hf.load(path=str(tmp_path))  # whatever is imported
    before = resident()
    loaded = hf.load(path=str(tmp_path))
    twin = loaded.twin()
    seen = [float(tensor.abs().max()) for tensor in (*loaded.model.parameters(), *twin.parameters())]
    assert resident() - before < 0.5 * size and min(seen) > 0  # copies would be twice the size


def test_an_edit_changes_neither_the_file_nor_the_twin(tmp_path):
    folder = saved(tmp_path / "dense")
    (file,) = folder.glob("*.safetensors")
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = hf.load(path=str(folder))
    twin, dense = loaded.twin(), weights_hash(loaded.model)
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    assert weights_hash(twin) == dense != weights_hash(loaded.model)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == before
    assert weights_hash(hf.load(path=str(folder)).model) == dense
