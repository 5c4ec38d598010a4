"""Pruning tiny random decoders: edits, budgets, replay, resuming, both references, and the numerics behind them."""

import copy
import functools

import pytest
import torch
import transformers

from modhifi_cli.engine.plan import Plan, Summary
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.token_walk import DecoderOptions, TokenWalk
from modhifi_cli.engine.walk import Budget, Recipe, Surveyed
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.graph.surgery import apply_edit_, weights_hash
from modhifi_cli.models.hf import native_config
from modhifi_cli.numerics.allocation import Global, Uniform
from modhifi_cli.numerics.compensation import Joint, NoCompensation, PerKernel
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import Energy, Fluctuation, Singleton
from modhifi_cli.numerics.selection import Greedy, TopK
from modhifi_cli.records import Edit, Note
from tests.decoders import FAMILIES, tiny, tokens

BOTH = DecoderOptions(components=("mlp", "attention"))


def prune(
    model, *, sparsity=0.3, target="params", round_to=1, options=BOTH, passes=1, done=(), stop=None, walked=None, **changed
):
    """Edits and the other records of a run; with `stop` it is left after so many edits."""
    steps = {"scoring": Singleton(), "selection": Greedy(), "compensation": Joint(), "allocation": Uniform()} | changed
    recipe = Recipe(**steps, schedule=functools.partial(geometric, iterations=passes))
    walk = TokenWalk(model, tokens(), options=options, **(walked or {}))
    edits, others = list(done), []
    for event in prune_(walk, recipe, Budget(sparsity, target, round_to), done=done):
        (edits if isinstance(event, Edit) else others).append(event)
        if stop is not None and len(edits) == stop:
            break
    return edits, others


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pruned_decoder_replays_and_goes_on_after_an_interruption(family):
    dense, model = tiny(family), tiny(family)
    edits, others = prune(model)
    assert len(edits) == 4 and isinstance(others[-1], Summary)
    assert abs(others[-1].achieved["params"] - 0.3) < 0.02
    again = copy.deepcopy(dense)
    for edit in edits:
        apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)
    resumed = tiny(family)
    begun, _ = prune(resumed, stop=3)
    goes_on = tiny(family)
    prune(goes_on, done=begun)
    assert weights_hash(goes_on) == weights_hash(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family):
    model = tiny(family)
    prune(model)
    prompt = tokens(2, 6, seed=3).windows
    prompt = torch.stack(list(prompt))
    with torch.no_grad():
        out = model(input_ids=prompt, use_cache=True)
        longer = prompt
        for _ in range(6):
            token = out.logits[:, -1:].argmax(-1)
            longer = torch.cat([longer, token], 1)
            plain = model(input_ids=longer, use_cache=False).logits[:, -1]
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            assert torch.allclose(out.logits[:, -1], plain, atol=1e-4 * float(plain.abs().max()))


def test_the_repair_is_least_squares_on_the_tokens_that_the_layer_sees():
    dense, model = tiny("llama").double(), tiny("llama").double()
    edits, _ = prune(model, options=DecoderOptions(components=("mlp",)), compensation=Joint(ridge=1e-3))
    first = edits[0]
    rows = []
    down = dense.model.layers[0].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].flatten(0, 1)))
    with torch.no_grad():
        dense(torch.stack(list(tokens().windows)))
    handle.remove()
    x = torch.cat(rows)
    kept = first.kept
    strength = 1e-3 * x[:, kept].square().mean()
    ours = next(edit for edit in first.modules if edit.module.endswith("down_proj")).tensors["weight"].double()
    # min |X W' - X W|² + strength |W' - W_C|², by stacking rows.
    root = (strength * len(x)).sqrt() * torch.eye(len(kept), dtype=torch.float64)
    matrix = torch.cat([x[:, kept], root])
    wanted = torch.cat([x @ down.weight.T, root @ down.weight[:, kept].T])
    expected = torch.linalg.lstsq(matrix, wanted).solution.T
    assert torch.allclose(ours, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_the_dense_reference_repairs_errors_of_earlier_layers(family):
    """Behind the last layer the residual stream is nearer to the dense one than with each layer's own output."""
    ids = torch.stack(list(tokens().windows))
    wanted = tiny(family)(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    errors = {}
    for reference in ("current", "dense"):
        model = tiny(family)
        prune(model, selection=TopK(), compensation=Joint(ridge=1e-4, reference=reference))
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
        errors[reference] = float((hidden - wanted).square().mean())
    assert errors["dense"] < errors["current"]


def test_the_dense_reference_asks_nothing_of_a_layer_that_rebuilds_its_own_output():
    """The first part's repair is the best there is on its own rows: solved again without a ridge it stays."""
    model = tiny("llama")
    edits, _ = prune(model, compensation=Joint(ridge=0.0, reference="dense"), selection=TopK(), stop=3)
    cut, again = edits[0], next(edit for edit in edits if edit.state.step == "dense" and edit.name == edits[0].name)
    (before,) = (module.tensors["weight"] for module in cut.modules if "weight" in module.tensors)
    assert torch.allclose(again.modules[0].tensors["weight"], before, atol=1e-4 * float(before.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_behind_the_consumer_has_no_dense_reference(dtype):
    with pytest.raises(ConfigError, match="a normalisation follows it"):
        prune(tiny("gemma2").to(dtype), compensation=Joint(reference="dense"))


def test_the_dense_reference_is_left_out_where_a_norm_stands_in_between_if_that_is_allowed():
    wanted, found = tiny("gemma2"), tiny("gemma2")
    prune(wanted, compensation=Joint())
    prune(found, compensation=Joint(reference="auto"))
    assert weights_hash(found) == weights_hash(wanted)
    wanted, found = tiny("llama"), tiny("llama")
    prune(wanted, compensation=Joint(reference="dense"))
    prune(found, compensation=Joint(reference="auto"))
    assert weights_hash(found) == weights_hash(wanted)


def test_a_stream_that_half_precision_rounds_is_no_norm():
    """Streams of trained decoders are hundreds of times as large as what a layer adds, and swallow some of it."""
    model = tiny("llama").to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1000)
    edits, _ = prune(model, compensation=Joint(reference="dense"))
    assert len(edits) == 8 and all(p.isfinite().all() for p in model.parameters())


def test_a_bias_can_be_added_and_carries_the_mean():
    model = tiny("llama")
    options = DecoderOptions(add_bias=True)
    edits, _ = prune(model, options=options, scoring=Fluctuation(), selection=TopK(), compensation=NoCompensation())
    assert model.model.layers[0].mlp.down_proj.bias is not None
    again = tiny("llama")
    for edit in edits:
        apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)


def test_even_widths_are_the_same_in_every_layer_and_multiples():
    model = tiny("llama", num_hidden_layers=3)
    _, others = prune(model, sparsity=0.3, round_to=8)
    plan = next(event for event in others if isinstance(event, Plan))
    assert {group.keep for group in plan.groups if "mlp" in group.name} in ({32}, {24}, {40})
    assert len({group.keep for group in plan.groups if "attn" in group.name}) == 1


def test_query_heads_stay_even_over_their_kv_heads():
    model = tiny("llama")
    options = DecoderOptions(components=("attention",), unit="query_head")
    edits, _ = prune(model, options=options, target="components", sparsity=0.5)
    assert all((edit.kept // 2).tolist() == [0, 1] for edit in edits)
    for selection in (TopK(),):
        edits, _ = prune(
            tiny("llama"), options=options, target="components", sparsity=0.5, selection=selection, scoring=Energy()
        )
        assert all((edit.kept // 2).tolist() == [0, 1] for edit in edits)


def test_several_passes_reach_the_same_widths():
    model = tiny("llama")
    edits, others = prune(model, passes=2, compensation=PerKernel(), scoring=Energy(), selection=TopK())
    assert {edit.iteration for edit in edits} == {0, 1}
    assert abs(others[-1].achieved["params"] - 0.3) < 0.02


def test_memory_is_told_before_and_after():
    notes = [event.text for event in prune(tiny("llama"))[1] if isinstance(event, Note)]
    assert "estimated" in notes[0] and "measured" in notes[-1]


def test_wrong_settings_are_named():
    with pytest.raises(ConfigError, match="cannot be reached: the groups that may be pruned give at most"):
        prune(tiny("llama"), options=DecoderOptions(components=("attention",)), sparsity=0.9)
    with pytest.raises(ConfigError, match="must name some of mlp, attention and experts"):
        DecoderOptions(components=("heads",))
    with pytest.raises(ConfigError, match="decoder.unit must be one of auto, kv_group, query_head, got 'head'"):
        DecoderOptions(unit="head")
    edits, _ = prune(tiny("llama"))
    with pytest.raises(DataError, match="does not fit these settings"):
        prune(tiny("llama"), sparsity=0.1, done=edits)


def test_uneven_widths_follow_what_each_part_costs_the_predictions():
    dense, model = tiny("llama", num_hidden_layers=3), tiny("llama", num_hidden_layers=3)
    _, others = prune(model, sparsity=0.3, allocation=Global(floor=0.1))
    plan = next(event for event in others if isinstance(event, Plan))
    assert abs(others[-1].achieved["params"] - 0.3) < 0.02
    assert len({group.keep for group in plan.groups if "mlp" in group.name}) > 1
    assert all(value >= 0 for value in plan.predicted_impact.values())
    assert native_config(model) is None and native_config(dense) is not None


@pytest.mark.parametrize("config", [
    lambda: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4),
    lambda: transformers.Qwen3_5TextConfig(
        hidden_size=32, num_hidden_layers=2, vocab_size=64, intermediate_size=48, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=4, pad_token_id=0,
        linear_num_value_heads=8, linear_key_head_dim=8, linear_value_head_dim=8),
    # Heads that are handed a bias, and such as are merged to the stream's width.
    lambda: transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=64),
    lambda: transformers.TrOCRConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=64),
])  # fmt: skip
def test_what_mixes_tokens_in_its_own_way_is_pruned_and_replayed(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config()).eval().requires_grad_(False)
    dense = copy.deepcopy(model)
    edits, others = prune(model, options=DecoderOptions(components=("attention",)), target="components", sparsity=0.25)
    assert len(edits) == 2 and all(edit.removed.numel() for edit in edits) and isinstance(others[-1], Summary)
    again = copy.deepcopy(dense)
    for edit in edits:
        apply_edit_(again, edit)
    assert weights_hash(again) == weights_hash(model)
    ids = torch.stack(list(tokens().windows))
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=ids, use_cache=False).logits).all()
        assert torch.equal(again(input_ids=ids, use_cache=False).logits, model(input_ids=ids, use_cache=False).logits)


def divergence(model, dense, ids):
    """KL(dense ‖ model) a token, in float64 from whole forwards."""
    with torch.no_grad():
        present, wanted = (one(input_ids=ids).logits.double().log_softmax(-1) for one in (model, dense))
    return float((wanted.exp() * (wanted - present)).sum(-1).mean())


def test_a_trial_measures_how_far_a_cut_leads_from_the_dense_network_also_in_a_later_pass():
    dense, model = tiny("llama"), tiny("llama")
    walk = TokenWalk(model, tokens(), options=BOTH)
    recipe = Recipe(Singleton(), Greedy(), Joint(), Global(), functools.partial(geometric, iterations=2))
    list(walk.prepare(recipe, 2))
    held = torch.cat([batch for batch, _ in tokens().batches(64)])[4::5]
    reader = model.model.layers[-1].mlp.down_proj
    for _ in range(2):
        before, weight = divergence(model, dense, held), reader.weight.detach().clone()
        for event in walk.survey():
            if isinstance(event, Surveyed) and event.part is walk.parts[-1]:
                with event.trial.edited([reader]), torch.no_grad():
                    reader.weight.mul_(0.5)
                    expected = divergence(model, dense, held) - before
                    assert event.trial.measure() == pytest.approx(expected, rel=1e-3, abs=1e-6) and expected > 0
        assert torch.equal(reader.weight, weight)
        with torch.no_grad():  # the later pass finds a network that was cut
            model.model.layers[0].mlp.down_proj.weight[:, :8] = 0
