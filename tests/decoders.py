"""Tiny random decoders of every family that is named in configs/model, and a tokenizer of 64 tokens; no download."""

import functools
from pathlib import Path

import torch

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = _COMMON | {"num_key_value_heads": 2}
FAMILIES = {
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 16},
    "opt": {key: value for key, value in _COMMON.items() if key != "intermediate_size"}
    | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": _COMMON,
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 64}
    | {key: _COMMON[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    "phi3": _GROUPED,
    "gemma": _GROUPED | {"head_dim": 16},
    "gemma2": _GROUPED | {"head_dim": 16, "sliding_window": 8},
}


def tiny(family: str, **changed):
    """An untrained decoder of a family whose every parameter has working scale."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(FAMILIES[family] | changed))).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 1.5 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 0.2
            start = 0.0 if parameter.dim() > 1 else parameter
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + start)
    return model.requires_grad_(False)


def tokens(count: int = 20, length: int = 24, seed: int = 0):
    """Random token windows as calibration."""
    from modhifi_cli.data.text import TokenWindows

    ids = torch.randint(3, 64, (count, length), generator=torch.Generator().manual_seed(seed))
    return TokenWindows(list(ids), [0] * count, {"sha256": f"drawn with {seed}"})


@functools.cache
def tokenizer():
    """Words of one letter; everything else is unknown."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(ord("!"), ord("!") + 60)]
    words = ["<s>", "</s>", "<pad>", "<unk>", *letters]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


@functools.cache
def byte_tokenizer():
    """Byte-level byte-pair encoding of 300 tokens, as GPT-2's, of a sentence about foxes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog, and then the other one " * 8], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def uneven(family: str, **changed):
    """A tiny decoder whose second layer has fewer neurons, and fewer heads where its heads are not fused."""
    from modhifi_cli.graph.components import Layout
    from modhifi_cli.graph.decoder import find_parts, slice_part_

    model = tiny(family, **changed)
    keeps = {"mlp": (0, 2, 5, 7, 11, 20, 21, 30, 33, 40, 41, 47), "attention": (0, 2)}
    for part in find_parts(model).parts:
        if part.layer == 1:
            slice_part_(model, Layout(model, [part.group]), part, torch.tensor(keeps[part.kind]))
    return model


def saved(folder: Path, family: str = "llama", **changed) -> Path:
    """A folder with a tiny decoder and its tokenizer, as Hugging Face lays it out."""
    tiny(family, **changed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
