"""Mixtures of experts: neurons in every expert, whole experts by fidelity, and the folder that plain transformers opens."""

import copy
import json

import pytest
import torch
from torch import nn

from modhifi_cli.cli import main
from modhifi_cli.engine.token_walk import DecoderOptions
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import artifacts
from modhifi_cli.graph.components import Layout
from modhifi_cli.graph.decoder import component_parameters, decoder_layers, find_parts, slice_part_
from modhifi_cli.graph.experts import Experts, closed, common_width, open_experts_
from modhifi_cli.graph.surgery import restore_widths_

from .. import decoders

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64,
         "max_position_embeddings": 64, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}  # fmt: skip
FAMILIES = {
    "mixtral": lambda: transformers.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, intermediate_size=48, num_experts=6, moe_intermediate_size=24, num_experts_per_tok=2,
        shared_expert_intermediate_size=40),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, intermediate_size=24, num_experts=6, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, intermediate_size=24, num_local_experts=6, num_experts_per_tok=2, head_dim=8),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, intermediate_size=24, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
        moe_intermediate_size=16, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4,
        qk_nope_head_dim=8, v_head_dim=8),
}  # fmt: skip


def made(family: str, **instead: int) -> nn.Module:
    config = FAMILIES[family]()
    for key, value in instead.items():
        setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            wide = parameter.dim() > 1
            drawn = torch.randn(parameter.shape, generator=draw) * (0.3 if wide else 0.1)
            parameter.copy_(drawn + (0.0 if wide else 0.5))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_taken_apart_answer_as_before_and_can_be_put_together_again(family):
    model = made(family)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    before = model(input_ids=ids).logits
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert open_experts_(model) == open_experts_(model) > 0
    scale = before.abs().max()
    assert (model(input_ids=ids).logits - before).abs().max() < 1e-5 * scale  # sums in another order
    with closed(model) as fits:
        assert fits and model.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(".experts.down_proj" in name for name in model.state_dict())


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_heads_and_whole_experts_of_a_family_obey_their_laws(family):
    model = made(family)
    open_experts_(model)
    found = find_parts(model)
    kinds = {part.kind for part in found.parts}
    assert kinds == ({"mlp", "experts"} if family == "olmoe" else {"mlp", "attention", "experts"})
    if family == "olmoe":
        assert {each.reason for each in found.refused} == {
            "q_norm normalises all its heads together, so that none of them can go"
        }
    inner = [part for part in found.parts if part.unit == "hidden neuron of an expert"]
    whole = [part for part in found.parts if part.kind == "experts"]
    assert len(inner) == sum(part.components for part in whole)
    chosen, experts = (2, model.get_submodule(whole[0].group.followers[0].module).num_experts)
    assert all(part.share == chosen / experts for part in inner)


@pytest.mark.parametrize(("experts", "chosen", "lawful"), [(8, 7, True), (4, 3, True), (4, 4, False), (2, 2, False)])
def test_whole_experts_can_go_as_long_as_the_router_has_enough_to_choose_from(experts, chosen, lawful):
    model = made("mixtral", num_local_experts=experts, num_experts_per_tok=chosen)
    open_experts_(model)
    found = find_parts(model, components=["mlp", "experts"])
    assert [part.least for part in found.parts if part.kind == "experts"] == [chosen] * 2 * lawful
    reasons = {each.reason for each in found.refused}
    assert reasons == (set() if lawful else {"it fails the slicing law: its router chooses as many experts as there are"})


def test_experts_without_a_router_beside_them_and_heads_of_uneven_latents_are_left_alone():
    model = made("mixtral")
    open_experts_(model)
    for name in decoder_layers(model):
        router = model.get_submodule(f"{name}.mlp.gate")
        router.weight = nn.Parameter(torch.zeros(5, 32))
    reasons = {each.reason for each in find_parts(model, check=False).refused}
    assert reasons == {"whole experts stay: no router with a row for each of them stands beside them"}
    model = made("deepseek_v3")
    for name in decoder_layers(model):
        model.get_submodule(f"{name}.self_attn").num_heads = 3
    reason = next(each.reason for each in find_parts(model, components=["mlp", "attention"], check=False).refused)
    assert reason.startswith("its projections have [") and reason.endswith("not so many for each of 3 heads")


def test_an_expert_that_is_cut_is_one_that_the_router_never_chooses():
    """Written out: the router's logits of the removed experts at minus infinity, in transformers' own network."""
    model = made("mixtral").double()
    model.config._experts_implementation = "eager"
    removed, kept = [1], torch.tensor([0, 2, 3])
    narrow = copy.deepcopy(model)
    open_experts_(narrow)
    for part in find_parts(narrow, components=["experts"]).parts:
        slice_part_(narrow, Layout(narrow, [part.group]), part, kept)
    routers = [model.get_submodule(f"{name}.mlp.gate") for name in decoder_layers(model)]

    def masked(self, hidden):
        logits = nn.functional.linear(hidden.reshape(-1, self.hidden_dim), self.weight)
        logits[:, removed] = -torch.inf
        shares = logits.softmax(-1)
        top, index = shares.topk(self.top_k)
        return logits, top / top.sum(-1, keepdim=True), index

    for router in routers:
        router.forward = masked.__get__(router)
    ids = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    expected, found = model(input_ids=ids).logits, narrow(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))  # its softmax runs in float32


def test_what_an_expert_costs_is_its_weights_and_its_row_of_the_router():
    model = made("mixtral")
    open_experts_(model)
    part = find_parts(model, components=["experts"]).parts[0]
    assert component_parameters(model, part) == 3 * 48 * 32 + 32


def run(folder, tmp_path, monkeypatch, *words: str, text: str | None = None):
    monkeypatch.chdir(tmp_path)
    draw = torch.randint(33, 93, (4000,), generator=torch.Generator().manual_seed(0))
    (tmp_path / "text.txt").write_text("".join(map(chr, draw.tolist())) if text is None else text)
    every = ["model=hf", f"model.path={folder}", "data=text", "data.path=text.txt", "data.sequences=8", "data.length=32",
             "evaluation_data=none", "evaluation=[size]", "measure_dense=false", "console=plain", *words]  # fmt: skip
    assert main(["prune", *every]) == 0
    return max((tmp_path / "outputs/prune").glob("*/*"), key=lambda path: path.stat().st_mtime)


@pytest.fixture
def folder(tmp_path):
    made("mixtral").save_pretrained(tmp_path / "mixtral")
    decoders.tokenizer().save_pretrained(tmp_path / "mixtral")
    return tmp_path / "mixtral"


@pytest.mark.parametrize("components, preset", [("mlp", "best"), ("experts", "paper"), ("mlp,attention", "paper")])
def test_a_pruned_mixture_is_verified_replayed_and_opened_by_plain_transformers(
    components, preset, folder, tmp_path, monkeypatch
):
    share = 0.2 if components == "experts" else 0.3
    words = (f"components=[{components}]", f"preset={preset}", "target=params", f"sparsity={share}", "round_to=1")
    run_folder = run(folder, tmp_path, monkeypatch, *words)
    results = json.loads((run_folder / "results.json").read_text())
    assert abs(results["achieved"]["params"] - share) < 0.06
    if components == "experts":  # the others go the same way
        assert main(["verify", f"run={run_folder}", "console=plain"]) == 0
    plain = transformers.AutoModelForCausalLM.from_pretrained(run_folder / "model")
    ours = artifacts.load_model(run_folder)
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    first, second = plain(input_ids=ids).logits, ours(input_ids=ids).logits
    assert torch.allclose(first, second, atol=1e-5 * float(first.abs().max()))
    if components == "experts":
        assert plain.config.num_local_experts == 3 and plain.config.intermediate_size == 48
    else:
        assert plain.config.intermediate_size < 48 and plain.config.num_local_experts == 4


def test_uneven_widths_keep_every_expert_at_its_own_and_are_read_back(folder, tmp_path, monkeypatch):
    words = ("components=[mlp]", "preset=best_uneven", "target=params", "sparsity=0.3", "round_to=1")
    run_folder = run(folder, tmp_path, monkeypatch, *words)
    model = artifacts.load_model(run_folder)
    widths = [common_width(module) for module in model.modules() if isinstance(module, Experts)]
    assert len(widths) == 2 and None in widths


def test_neurons_and_whole_experts_in_one_run_are_refused_with_the_way_to_do_both():
    with pytest.raises(ConfigError, match=r"prune with components=\[experts\] first, then the new folder"):
        DecoderOptions(components=["mlp", "experts"])


def test_an_expert_that_no_token_reaches_is_cut_by_its_weights_and_that_is_said(folder, tmp_path, monkeypatch, capsys):
    words = ("components=[mlp]", "preset=paper", "target=params", "sparsity=0.2", "round_to=1")
    run_folder = run(folder, tmp_path, monkeypatch, *words, text="a" * 4000)
    assert "the router gives no calibration token to" in " ".join(capsys.readouterr().out.split())
    model = artifacts.load_model(run_folder)
    assert len({common_width(module) for module in model.modules() if isinstance(module, Experts)}) == 1


def test_saved_widths_that_name_no_expert_are_damaged():
    model = made("mixtral")
    open_experts_(model)
    with pytest.raises(DataError, match="the saved widths name none of its experts; the architecture file is damaged"):
        restore_widths_(model, {})
