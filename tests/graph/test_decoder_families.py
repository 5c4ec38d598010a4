"""Families of decoders beyond the plain ones: what can be pruned of them, and what is said of the rest."""

import copy

import pytest
import torch
from torch import nn

from modhifi_cli.graph.components import is_linear
from modhifi_cli.graph.decoder import find_parts

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 64,
         "max_position_embeddings": 32}  # fmt: skip
GATED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2}


def made(config) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def test_attention_beside_experts_is_pruned_and_experts_are_left_alone_by_name():
    model = made(transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2))
    before = copy.deepcopy(model.config._experts_implementation)
    found = find_parts(model)
    assert [part.kind for part in found.parts] == ["attention"]
    (refusal,) = found.refused
    assert refusal.name == "model.layers.0.mlp.experts"
    assert "hold the weights of all in one tensor (gate_up_proj [4, 96, 32]), which is left alone" in refusal.reason
    assert model.config._experts_implementation == before  # the law's copy alone runs them one by one


def test_an_expert_that_all_tokens_share_is_an_mlp():
    config = transformers.Qwen2MoeConfig(**GATED, num_experts=4, moe_intermediate_size=24, num_experts_per_tok=2,
                                         shared_expert_intermediate_size=40, decoder_sparse_step=1)  # fmt: skip
    found = find_parts(made(config))
    assert {(part.kind, part.name, part.components) for part in found.parts if part.kind == "mlp"} == {
        ("mlp", "model.layers.0.mlp.shared_expert.down_proj", 40)
    }
    assert {part.kind for part in found.parts} == {"attention", "mlp"}


@pytest.mark.parametrize("kind, config", [
    ("bert", lambda: transformers.BertConfig(**SMALL, intermediate_size=48, is_decoder=True)),
    ("roberta", lambda: transformers.RobertaConfig(**SMALL, intermediate_size=48, is_decoder=True)),
    ("falcon", lambda: transformers.FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64,
                                                 new_decoder_architecture=False, multi_query=False)),
    ("gptj", lambda: transformers.GPTJConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=64, rotary_dim=4, n_positions=32)),
    ("smollm3", lambda: transformers.SmolLM3Config(**GATED, pad_token_id=0)),
    ("gemma3", lambda: transformers.Gemma3TextConfig(**GATED, head_dim=8, pad_token_id=0)),
])  # fmt: skip
def test_heads_and_neurons_of_a_family_obey_the_law(kind, config):
    found = find_parts(made(config()))
    assert "mlp" in {part.kind for part in found.parts}
    assert kind == "falcon" or {part.kind for part in found.parts} == {"mlp", "attention"}
    assert all(refusal.reason for refusal in found.refused)


def test_attention_without_heads_of_its_own_is_told_by_what_it_is():
    state = transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)
    with pytest.raises(Exception, match="it has no attention: what mixes its tokens .a state space, a recurrence. is left"):
        find_parts(made(state))


def test_what_computes_a_product_with_its_weight_is_linear_and_what_does_more_is_not():
    class Written(nn.Linear):
        def forward(self, rows):
            return rows @ self.weight.T + self.bias

    class Named(nn.Linear):
        pass

    class Rounded(nn.Linear):
        def forward(self, rows):
            return nn.functional.linear(rows, self.weight.round(), self.bias)

    assert all(is_linear(kind(4, 6).eval()) for kind in (nn.Linear, Written, Named))
    assert not is_linear(Rounded(4, 6).eval()) and not is_linear(nn.Conv1d(4, 6, 1))
