"""Roles, heads and the slicing law for a tiny random decoder of every family."""

import copy
import re

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError, UnsupportedModelError
from modhifi_cli.graph import decoder
from modhifi_cli.graph.components import Layout, is_transposed
from modhifi_cli.graph.law import randomise_
from tests.decoders import FAMILIES, tiny

MANY_TO_ONE = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2")


def logits(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("unit", ["kv_group", "query_head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_slicing_equals_zeroing_consumer_weights(family, unit):
    model = tiny(family).double()
    randomise_(model)
    found = decoder.find_parts(model, unit=unit)
    assert not found.refused and len(found.parts) == 4
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    before = logits(model, tokens)
    sliced, layout = copy.deepcopy(model), Layout(model, [part.group for part in found.parts])
    for number, part in enumerate(found.parts):
        gone = decoder._drawn(part, torch.Generator().manual_seed(number))
        kept = torch.ones(part.components, dtype=torch.bool)
        kept[gone] = False
        reader = model.get_submodule(part.consumer.module)
        features = part.consumer.index[gone].flatten()
        with torch.no_grad():
            (reader.weight.T if is_transposed(reader) else reader.weight)[:, features] = 0
        decoder.slice_part_(sliced, layout, part, kept.nonzero().flatten())
    zeroed, narrow = logits(model, tokens), logits(sliced, tokens)
    assert (narrow - zeroed).abs().max() < 1e-9 * before.abs().max()
    assert (zeroed - before).abs().max() > 1e-4 * before.abs().max()
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_running_layer_by_layer_gives_the_logits_of_the_whole_forward(family):
    model = tiny(family)
    tokens = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
    layers = decoder.decoder_layers(model)
    with torch.no_grad():
        hidden, calls = decoder.enter(model, layers, tokens)
        for name, call in zip(layers, calls, strict=True):
            hidden = decoder.run_layer(model.get_submodule(name), hidden, call)
        assert torch.equal(decoder.leave(model, layers, hidden), logits(model, tokens))
    assert "forward" not in model.get_submodule(layers[0]).__dict__


@pytest.mark.parametrize("family", MANY_TO_ONE)
def test_grouped_heads_are_removed_by_group_or_evenly(family):
    model = tiny(family)
    whole = decoder.find_parts(model, components=["attention"], unit="kv_group").parts[0]
    assert (whole.components, whole.head_counts(1)) == (2, (2, 1))
    even = decoder.find_parts(model, components=["attention"], unit="query_head").parts[0]
    assert (even.components, even.balanced, even.head_counts(2)) == (4, 2, (2, 2))
    assert decoder.find_parts(model, components=["attention"]).parts[0].unit == even.unit  # two KV heads are few


def test_the_layout_of_a_fused_projection_is_found_by_the_law():
    by_head = decoder.find_parts(tiny("gpt_neox"), components=["attention"]).parts[0]
    assert by_head.group.producers[0].index[1].tolist() == list(range(24, 48))
    by_block = decoder.find_parts(tiny("gpt2"), components=["attention"]).parts[0]
    assert by_block.group.producers[0].index[1].tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]


def test_a_module_without_a_known_role_is_refused_by_its_name():
    model = tiny("llama")
    model.model.layers[1].mlp.gate = model.model.layers[1].mlp.gate_proj
    del model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj
    found = decoder.find_parts(model, components=["mlp"])
    assert [part.layer for part in found.parts] == [0]
    assert found.refused[0].name.startswith("model.layers.1.") and "roles of a mlp" in found.refused[0].reason


def test_a_norm_over_all_heads_is_named_as_the_reason():
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model("olmo2", **(FAMILIES["llama"]))
    except StrictDataclassError as error:  # transformers 5.4.0 takes tie_word_embeddings for a number, its own default too
        pytest.skip(f"this transformers cannot make its own Olmo 2: {error}")
    found = decoder.find_parts(AutoModelForCausalLM.from_config(config).eval())
    assert {part.kind for part in found.parts} == {"mlp"}
    assert found.refused[0].reason == "q_norm normalises all its heads together, so that none of them can go"


def test_excluded_modules_are_left_alone_and_unknown_ones_named():
    found = decoder.find_parts(tiny("llama"), exclude=["model.layers.0.mlp"])
    assert "excluded" in found.refused[0].reason and len(found.parts) == 3
    with pytest.raises(ConfigError, match="the network has no module 'model.layer.0'"):
        decoder.find_parts(tiny("llama"), exclude=["model.layer.0"])


def test_networks_that_are_no_decoders_are_refused():
    from torch import nn

    with pytest.raises(UnsupportedModelError, match="only causal decoders"):
        decoder.decoder_layers(nn.Sequential(nn.Linear(2, 2)))


def _narrow_reader_(layer):
    layer.mlp.down_proj = nn.Linear(40, 32)


def _odd_head_size_(layer):
    layer.self_attn.head_dim = 7


@pytest.mark.parametrize(("change_", "words"), [
    (_narrow_reader_, r"it reads 40 neurons, its writers have \[48\]"),
    (_odd_head_size_, "its head dimension is unknown, or does not divide the 32 features it reads"),
])  # fmt: skip
def test_what_does_not_fit_together_is_left_alone_with_the_numbers(change_, words):
    model = tiny("llama")
    change_(model.model.layers[1])
    found = decoder.find_parts(model, check=False)
    assert len(found.parts) == 3 and re.fullmatch(words, found.refused[0].reason)
