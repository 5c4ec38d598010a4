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


def test_attention_beside_fused_experts_is_found_and_these_are_left_alone_by_name_until_they_are_taken_apart():
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
    from modhifi_cli.models import transformers as families

    found = find_parts(families.load(name="xLSTMForCausalLM").model)  # a recurrence whose norm spans its heads
    assert {part.kind for part in found.parts} == {"mlp"}
    assert "it has no attention: what mixes its tokens (a state space, a recurrence) is left alone" in {
        refusal.reason for refusal in found.refused}  # fmt: skip


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


@pytest.mark.parametrize("config, kinds", [
    (lambda: transformers.DeepseekV3Config(
        **{**GATED, "num_key_value_heads": 4}, pad_token_id=0, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
        qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8), {"mlp", "attention"}),  # keys and values from a latent vector
    (lambda: transformers.GptOssConfig(**{**GATED, "num_hidden_layers": 1}, pad_token_id=0, head_dim=8, num_local_experts=4,
                                       num_experts_per_tok=2), {"attention"}),  # a sink for each head
    (lambda: transformers.BambaConfig(**{**GATED, "num_hidden_layers": 2}, pad_token_id=0, attn_layer_indices=[1],
                                      mamba_d_state=8, mamba_n_heads=8, mamba_d_head=8), {"mlp", "attention"}),
])  # fmt: skip
def test_unusual_attention_is_cut_where_it_is_lawful(config, kinds):
    found = find_parts(made(config()), components=["mlp", "attention"])
    assert {part.kind for part in found.parts} == kinds


def test_heads_that_a_bias_of_the_whole_network_counts_are_left_alone_with_that_reason():
    config = transformers.BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)
    found = find_parts(made(config), components=["mlp", "attention"])
    assert {part.kind for part in found.parts} == {"mlp"}
    assert found.refused[0].reason == (
        "its network hands the layer a bias for each of its heads (alibi), so that none of them can go"
    )


def test_a_decoder_made_small_is_cut_whole_and_answers_as_one_with_zeroed_readers():
    from modhifi_cli.engine import coverage

    cut = coverage.cut_decoder_(made(transformers.MixtralConfig(**GATED, num_local_experts=4, num_experts_per_tok=2)))
    assert cut.carried > 0.9 and 0.2 < cut.removed < 0.5 and cut.difference < 1e-10 and cut.groups == 5


def test_families_are_listed_once_and_made_small_by_the_names_of_their_sizes():
    from modhifi_cli.models import transformers as families

    known = families.names()
    assert known["LlamaForCausalLM"] == families.DECODER and known["ViTForImageClassification"] == families.CLASSIFIER
    assert not any(name.endswith("ForConditionalGeneration") for name, kind in known.items() if kind == families.DECODER)
    for name in ("LlamaForCausalLM", "GPTNeoForCausalLM"):
        model = families.load(name=name).model
        assert type(model).__name__ == name and sum(p.numel() for p in model.parameters()) < 1_000_000


SHORT = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "max_position_embeddings": 32, "intermediate_size": 48,
         "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize("config, name, components, unit", [
    # The projection writes queries, keys, values and gates of one head of keys after those of the other.
    (lambda: transformers.Qwen3NextConfig(
        **SHORT, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        layer_types=["linear_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8), "linear_attn.out_proj", 2, "linear attention"),
    (lambda: transformers.RecurrentGemmaConfig(
        **SHORT, lru_width=32, block_types=["recurrent"]), "temporal_block.linear_out", 4, "linear attention"),
    (lambda: transformers.RwkvConfig(hidden_size=32, attention_hidden_size=32, num_hidden_layers=2, vocab_size=64,
                                     intermediate_size=48), "attention.output", 32, "mixed over time"),
    (lambda: transformers.FalconH1Config(
        **SHORT, head_dim=8, mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=4, mamba_n_groups=1,
        mamba_rms_norm=False), "mamba.out_proj", 8, "state space"),
])  # fmt: skip
def test_heads_of_what_mixes_tokens_without_scores_obey_the_law(config, name, components, unit):
    found = {part.name: part for part in find_parts(made(config()), components=["attention"]).parts}
    part = next(part for name_of, part in found.items() if name_of.endswith(f".0.{name}"))
    assert part.components == components and unit in part.unit


def test_channels_of_a_short_convolution_are_components_each():
    config = transformers.Lfm2Config(**SHORT, layer_types=["conv"], block_auto_adjust_ff_dim=False)
    (part,) = find_parts(made(config), components=["attention"]).parts
    assert part.components == 32 and part.unit == "channel that is mixed over time"


def test_channels_that_a_state_space_reads_itself_are_taken_out_of_all_that_reads_them():
    (part,) = find_parts(made(transformers.MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4)),
                         components=["attention"]).parts  # fmt: skip
    assert [slot.module.rpartition(".")[2] for slot in part.group.consumers] == ["out_proj", "x_proj"]
    assert part.components == 64


def test_heads_of_a_state_space_that_one_norm_spans_are_left_alone_with_that_reason():
    config = transformers.Mamba2Config(hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4, num_heads=8, head_dim=8,
                                       n_groups=1)  # fmt: skip
    with pytest.raises(Exception, match="backbone.layers.0.mixer: norm normalises all its heads together, so that none of them"):
        find_parts(made(config))


def test_queries_with_a_gate_beside_each_head_are_cut_with_their_heads():
    config = transformers.Qwen3NextConfig(
        **SHORT, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24, shared_expert_intermediate_size=24,
        layer_types=["full_attention"])  # fmt: skip
    (part,) = find_parts(made(config), components=["attention"]).parts
    assert (part.heads, part.kv_heads) == (4, 2)
    assert part.group.producers[0].index.shape == (4, 16)


@pytest.mark.parametrize("config", [
    lambda: transformers.CTRLConfig(n_embd=32, n_layer=1, n_head=4, dff=48, vocab_size=64, n_positions=32),
    lambda: transformers.ModernBertDecoderConfig(**SHORT),
    lambda: transformers.MoshiConfig(**SHORT, ffn_dim=48, head_dim=8),
    lambda: transformers.OlmoHybridConfig(**{**SHORT, "num_hidden_layers": 2, "num_key_value_heads": 4}, layer_types=[
        "linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8),
])  # fmt: skip
def test_heads_and_neurons_under_other_names_obey_the_law(config):
    found = find_parts(made(config()))
    assert {part.kind for part in found.parts} == {"mlp", "attention"}


def test_a_text_part_whose_class_no_configuration_leads_to_is_rebuilt_by_its_class():
    from modhifi_cli.models import hf

    model = transformers.Emu3ForCausalLM(transformers.Emu3TextConfig(**SHORT)).eval()
    again = hf.build(**hf.described(model, None, "emu3").architecture["kwargs"])
    assert type(again) is type(model) and again.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(Exception, match="transformers has no network 'os'"):
        hf.build(config=model.config.to_dict(), kind="os")


@pytest.mark.parametrize("config", [
    lambda: transformers.GPTBigCodeConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32),  # one KV head
    lambda: transformers.OpenAIGPTConfig(n_embd=32, n_layer=1, n_head=4, vocab_size=64, n_positions=32),  # layers give lists
    lambda: transformers.Gemma3nTextConfig(  # several streams beside each other
        **SHORT, head_dim=8, hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4, num_kv_shared_layers=0,
        layer_types=["full_attention"], activation_sparsity_pattern=[0.0]),
])  # fmt: skip
def test_layers_that_are_called_in_other_ways_are_looked_into(config):
    config = config()
    config.vocab_size_per_layer_input = getattr(config, "vocab_size_per_layer_input", 64)
    found = find_parts(made(config))
    assert {part.kind for part in found.parts} == {"mlp", "attention"} and not found.refused


def test_only_the_layers_of_the_part_that_reads_text_are_layers_of_the_decoder():
    from modhifi_cli.graph.decoder import decoder_layers

    config = transformers.GitConfig(**{k: v for k, v in SHORT.items() if k != "num_key_value_heads"})
    config.vision_config = transformers.GitVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                                        intermediate_size=48, image_size=32, patch_size=16)  # fmt: skip
    assert decoder_layers(made(config)) == ("git.encoder.layer.0",)


def test_layers_that_do_not_run_on_text_alone_are_told():
    config = transformers.MllamaTextConfig(**{**SHORT, "num_hidden_layers": 2}, cross_attention_layers=[1])
    model = transformers.MllamaForCausalLM(config).eval()
    with pytest.raises(Exception, match="only 1 of its 2 decoder layers run on text alone"):
        find_parts(model)


def test_a_saved_network_asks_for_no_kernels_that_would_be_fetched(tmp_path):
    import json

    from modhifi_cli.models import hf

    config = transformers.JambaConfig(**SHORT, num_experts=1, attn_layer_offset=0, attn_layer_period=1, use_mamba_kernels=True)
    model = made(config)
    loaded = hf.described(model, None, "jamba")
    hf.save(model, tmp_path, loaded.preprocess)
    assert loaded.architecture["kwargs"]["config"]["use_mamba_kernels"] is False
    (file,) = tmp_path.glob("*config.json") if not (tmp_path / "config.json").exists() else [tmp_path / "config.json"]
    assert json.loads(file.read_text())["use_mamba_kernels"] is False and model.config.use_mamba_kernels is True


def test_a_class_whose_own_default_does_not_run_is_told_apart_from_one_that_cannot_be_pruned():
    from modhifi_cli.errors import NotRunnableError
    from modhifi_cli.models import transformers as families

    with pytest.raises(NotRunnableError, match="is not made from its default configuration here"):
        families.load(name="DbrxForCausalLM")
    with pytest.raises(NotRunnableError, match="does not answer input_ids alone"):
        families.load(name="MusicgenForCausalLM")
    with pytest.raises(NotRunnableError, match="does not answer pixel_values alone"):
        families.load(name="ImageGPTForImageClassification")
    with pytest.raises(Exception, match="cannot be made small by the names of its sizes") as told:
        families.load(name="BltForCausalLM")
    assert not isinstance(told.value, NotRunnableError)


@pytest.mark.parametrize("name, written", [
    ("Inkling2ForCausalLM", {"sink_proj", "relative_position_bias.linear", "relative_position_bias.num_heads"}),
    ("XGLMForCausalLM", set()),  # the least number there is, in the type of the law
    ("WhisperForCausalLM", set()),  # the whole network hears, its decoder reads
])  # fmt: skip
def test_heads_of_families_that_write_more_for_each_or_hide_tokens_in_their_own_way_obey_the_law(name, written):
    from modhifi_cli.models import transformers as families

    found = find_parts(families.load(name=name).model, components=["attention"])
    group = found.parts[0].group
    assert written <= {slot.module.rpartition("self_attn.")[2] for slot in (*group.producers, *group.followers)}
    assert len(found.parts) == len(found.layers)


def test_a_projection_of_several_devices_keeps_as_many_heads_of_each():
    config = transformers.CodeGenConfig(n_embd=64, n_layer=1, n_head=8, rotary_dim=4, vocab_size=64, n_positions=32)
    (part,) = find_parts(made(config), components=["attention"]).parts
    assert part.balanced == 4 and part.components == 8
    # Heads 2 and 3 are of the second device, whose queries, values and keys follow those of the first.
    assert part.group.producers[0].index[2].tolist() == [*range(48, 56), *range(64, 72), *range(80, 88)]


def test_attention_that_holds_bare_tensors_is_told_so():
    from modhifi_cli.models import transformers as families

    found = find_parts(families.load(name="XLNetLMHeadModel").model)
    assert "this attention holds its projections as bare tensors, which are left alone" in {r.reason for r in found.refused}


def test_a_norm_between_neurons_and_their_reader_is_the_reason_that_is_told():
    config = transformers.BitNetConfig(**SHORT)
    with pytest.raises(Exception, match="mlp.down_proj: ffn_sub_norm normalises all its neurons together, so that none"):
        find_parts(made(config))


def test_attention_that_stands_in_a_list_of_its_own_is_not_said_to_be_missing():
    config = transformers.XLMConfig(emb_dim=32, n_layers=1, n_heads=4, n_words=64)
    with pytest.raises(Exception, match="attentions.0.q_lin: no modules with the roles of an attention were found"):
        find_parts(transformers.XLMWithLMHeadModel(config).eval())


FREED = {
    "bloom": lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    "mpt": lambda: transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=64, max_seq_len=32),
    "cpmant": lambda: transformers.CpmAntConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, dim_head=8, dim_ff=48,
                                                vocab_size=64, prompt_length=4),
    "trocr": lambda: transformers.TrOCRConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                                              vocab_size=64, max_position_embeddings=32),
}  # fmt: skip


@pytest.mark.parametrize("kind", FREED)
def test_heads_that_are_handed_a_bias_or_are_as_wide_as_the_stream_can_go_once_they_are_freed(kind):
    from modhifi_cli.graph.heads import free_heads_

    model, tokens = made(FREED[kind]()), torch.arange(12)[None]
    with torch.no_grad():
        before, names = model(input_ids=tokens, use_cache=False).logits, set(model.state_dict())
        free_heads_(model)
        free_heads_(model)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, before)
    assert set(model.state_dict()) == names  # a dense network is saved as transformers knows it
    found = find_parts(model, components=["attention"])
    assert [part.components for part in found.parts] == [4, 4] and not found.refused


@pytest.mark.parametrize("kind", FREED)
def test_freed_heads_that_are_left_keep_their_own_bias_in_a_saved_network_and_with_a_cache(kind, tmp_path):
    from modhifi_cli.engine import coverage
    from modhifi_cli.models import hf

    model, tokens = made(FREED[kind]()), torch.arange(12)[None].expand(2, -1)
    loaded = hf.described(model, None, kind)
    cut = coverage.cut_decoder_(model)
    assert cut.carried == 1 and cut.removed > 0.2 and cut.difference < 1e-10
    native, described = hf.save(model, tmp_path, loaded.preprocess)
    again = hf.restore(tmp_path, loaded.architecture, described | {"native": native})
    with torch.no_grad():
        answers = [network(input_ids=tokens, use_cache=False).logits for network in (again, model)]
        assert not native and torch.equal(*answers)
        written = hf.continuation(again, tokens, 4)
        for step in range(4):
            so_far = torch.cat([tokens, written[:, :step]], 1)
            assert torch.equal(again(input_ids=so_far, use_cache=False).logits[:, -1].argmax(-1), written[:, step])


def test_a_decorated_method_is_rewritten_inside_its_decorator():
    import functools

    from modhifi_cli.graph.heads import _inferring

    def told(method):
        @functools.wraps(method)
        def around(*args):
            return method(*args) + 1

        return around

    class Merging(nn.Module):
        @told
        def forward(self, stream, heads):
            batch, length, width = stream.shape
            return heads.reshape(batch, length, width)

    narrow = torch.zeros(1, 3, 2, 4)
    with pytest.raises(RuntimeError):
        Merging()(torch.zeros(1, 3, 16), narrow)
    assert _inferring(Merging)()(torch.zeros(1, 3, 16), narrow).equal(torch.ones(1, 3, 8))
