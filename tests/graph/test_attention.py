"""Heads and gated neurons of vision transformers: found, lawful, cut, counted, saved and built again."""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph import law
from modhifi_cli.graph.counting import CostModel, count
from modhifi_cli.graph.heads import HeadwiseAttention, adopt_, head_count
from modhifi_cli.graph.law import check, slice_groups_, zero_consumers_
from modhifi_cli.graph.surgery import describe_widths, restore_widths_
from tests.graph import attentions, transformers


def found(name, **settings):
    model = transformers.build(name)
    _, groups, refused = discover(model, transformers.images(name), **settings)
    return model, groups, refused


def halves(groups):
    keep = [max(1, group.components // 2) for group in groups]
    return keep, [torch.arange(kept, group.components) for kept, group in zip(keep, groups, strict=True)]


@pytest.mark.parametrize("name", transformers.FAMILIES)
def test_heads_and_neurons_of_every_family_are_found_and_lawful(name):
    model, groups, refused = found(name)
    readers = {slot.module for group in groups for slot in group.consumers}
    attentions = [n for n, m in model.named_modules() if head_count(m) is not None and not n.endswith("rel_pos")]
    assert attentions
    for attention in attentions:
        assert any(reader.rpartition(".")[0] == attention for reader in readers), attention
    mlps = [n for n, m in model.named_modules() if n.endswith(("mlp.fc2", "mlp.3"))]
    assert mlps and set(mlps) <= readers
    assert not [one for one in refused if "law" in one.reason]
    assert check(model, groups, transformers.images(name)).holds


@pytest.mark.parametrize("name", transformers.FAMILIES)
def test_the_residual_width_is_refused_with_the_normalisation_or_the_table_it_passes(name):
    _, _, refused = found(name)
    assert any("LayerNorm across" in one.reason or "parameter across" in one.reason for one in refused)


@pytest.mark.parametrize("name", transformers.FAMILIES)
def test_a_cut_network_is_built_again_with_equal_outputs_and_its_counts_were_predicted(name):
    model, groups, _ = found(name)
    example = transformers.images(name)
    keep, gone = halves(groups)
    costs = CostModel(model, example[:1], groups)
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, gone)
    assert count(narrow, example[:1]) == costs.counts(keep)
    assert costs.counts(keep).macs < costs.dense.macs
    again = transformers.build(name, seed=7)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    with torch.no_grad():
        assert torch.equal(again(example), narrow(example))


@pytest.mark.parametrize("name", ["torchvision_vit", "torchvision_swin", "torchvision_swin_v2", "cait", "swinv2", "beit"])
def test_an_adopted_network_answers_as_the_librarys_own(name):
    model = transformers.build(name)
    for parameter in model.parameters():  # position tables and biases start at zero, which would hide a mistake
        nn.init.normal_(parameter, std=0.2)
    example = torch.randn(2, 3, *transformers.images(name).shape[2:], dtype=torch.float64)
    model.double()
    with torch.no_grad():
        before = model(example)
        names = list(model.state_dict())
        assert adopt_(model)
        after = model(example)
    assert list(model.state_dict()) == names
    assert float((after - before).abs().max()) <= 1e-9 * float(before.abs().max())
    assert not adopt_(model)


@pytest.mark.parametrize("name", [*transformers.FAMILIES, *transformers.APART])
def test_a_cut_network_is_pickled_and_copied_with_equal_outputs(name):
    model, example = transformers.build(name), transformers.images(name)
    _, groups, _ = discover(model, example, products=True)
    slice_groups_(model, groups, halves(groups)[1])
    for again in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):  # noqa: S301 - what was written a line above
        assert [type(module) for module in again.modules()] == [type(module) for module in model.modules()]
        with torch.no_grad():
            assert torch.equal(again(example), model(example))


def test_a_pickled_network_is_read_by_another_process(tmp_path):
    model, example = transformers.build("hf_vit"), transformers.images("hf_vit")
    _, groups, _ = discover(model, example, products=True)
    slice_groups_(model, groups, halves(groups)[1])
    with torch.no_grad():
        torch.save((model, example, model(example)), tmp_path / "network.pt")
    script = "import sys, torch; m, x, y = torch.load(sys.argv[1], weights_only=False); assert torch.equal(m.eval()(x), y)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(tmp_path / "network.pt")], check=True, timeout=120)


def test_windows_that_do_not_divide_the_map_are_padded_and_shifted_as_in_torchvision():
    model = transformers.build("torchvision_swin").double()
    example = torch.randn(2, 3, 44, 36, dtype=torch.float64)  # maps of 22 × 18 and 11 × 9 in windows of 4 × 4
    with torch.no_grad():
        before = model(example)
        adopt_(model)
        assert float((model(example) - before).abs().max()) <= 1e-9 * float(before.abs().max())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_adopted_multi_head_attention_takes_what_pytorchs_takes(batch_first, bias):
    torch.manual_seed(0)
    plain = nn.MultiheadAttention(12, 3, batch_first=batch_first, bias=bias).double().eval()
    ours = copy.deepcopy(plain)
    adopt_(ours)
    assert type(ours) is HeadwiseAttention
    shape = (2, 5, 12) if batch_first else (5, 2, 12)
    query, memory = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    causal = torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    padding = torch.tensor([[False] * 5, [False, False, False, True, True]])
    for arguments in (
        {}, {"need_weights": False}, {"attn_mask": causal}, {"key_padding_mask": padding, "need_weights": False},
        {"attn_mask": causal, "key_padding_mask": padding}, {"average_attn_weights": False},
        {"attn_mask": torch.randn(6, 5, 5, dtype=torch.float64)},
    ):  # fmt: skip
        expected, shares = plain(query, memory, memory, **arguments)
        output, ours_shares = ours(query, memory, memory, **arguments)
        assert torch.allclose(output, expected, rtol=0, atol=1e-12)
        assert (shares is None) == (ours_shares is None)
        assert shares is None or torch.allclose(shares, ours_shares, rtol=0, atol=1e-12)
    one = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(ours(one, one, one)[0], plain(one, one, one)[0], rtol=0, atol=1e-12)


def test_the_products_of_attention_are_counted_with_the_heads_that_are_left():
    model, groups, _ = found("vit")
    heads = [group for group in groups if group.name.endswith("attn")]
    costs = CostModel(model, transformers.images("vit")[:1], groups)
    keep = [group.components - (group in heads) for group in groups]
    tokens, width, dim = 17, 24, 8
    projections = tokens * width * 3 * dim + tokens * dim * width
    products = 2 * tokens * tokens * dim  # queries with keys, weights with values
    assert costs.dense.macs - costs.counts(keep).macs == len(heads) * (projections + products)
    parameters = width * 3 * dim + 3 * dim + dim * width
    assert costs.dense.parameters - costs.counts(keep).parameters == len(heads) * parameters


def test_position_biases_and_temperatures_go_with_their_heads():
    model, groups, _ = found("swinv2")
    group = next(group for group in groups if group.name == "layers.1.blocks.0.attn")
    dense = copy.deepcopy(model).get_submodule(group.name)
    slice_groups_(model, [group], [torch.tensor([0, 2])])
    attention = model.get_submodule(group.name)
    left = torch.tensor([1, 3])
    assert attention.num_heads == 2
    assert torch.equal(attention.logit_scale, dense.logit_scale[left])
    assert torch.equal(attention.q_bias.view(2, 8), dense.q_bias.view(4, 8)[left])
    assert torch.equal(attention.cpb_mlp[2].weight, dense.cpb_mlp[2].weight[left])
    assert attention.proj.in_features == 16 and attention.qkv.out_features == 48


def test_excluded_attention_is_left_alone_and_a_wrong_name_is_told():
    _, groups, refused = found("vit", exclude=["blocks.0.attn"])
    assert "blocks.0.attn" not in {group.name for group in groups}
    assert any(one.name == "blocks.0.attn" and "exclude" in one.reason for one in refused)
    with pytest.raises(ConfigError, match="has no module 'blocks.0.attnn'"):
        found("vit", exclude=["blocks.0.attnn"])


def test_a_norm_across_the_heads_is_named():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", **transformers.PLAIN, scale_attn_norm=True).eval()
    _, groups, refused = discover(model, transformers.images("vit"))
    assert not [group for group in groups if group.name.endswith("attn")]
    assert any("attn.norm is a LayerNorm across the heads" in one.reason for one in refused)


HARD = (
    attentions.Attention,
    attentions.Interleaved,
    attentions.Reduced,
    attentions.Wrapped,
    attentions.Biased,
    attentions.Asked,
)


@pytest.mark.parametrize("attention", HARD)
def test_heads_that_are_hard_to_see_are_cut_counted_and_built_again(attention):
    model, example = attentions.build(attention), attentions.images()
    _, groups, refused = discover(model, example)
    assert {"attns.0", "attns.1"} <= {group.name for group in groups}
    assert not [one for one in refused if "law" in one.reason]
    assert check(model, groups, example).holds
    keep, gone = halves(groups)
    narrow = copy.deepcopy(model)
    slice_groups_(narrow, groups, gone)
    assert count(narrow, example[:1]) == CostModel(model, example[:1], groups).counts(keep)
    again = attentions.build(attention, seed=7)
    restore_widths_(again, describe_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    assert torch.equal(again(example), narrow(example))


def test_the_order_in_which_heads_are_read_is_found():
    model = attentions.build(attentions.Interleaved)
    _, groups, _ = discover(model, attentions.images())
    reads = next(group for group in groups if group.name == "attns.0").consumers[0]
    assert torch.equal(reads.index, torch.arange(12).view(3, 4).T)


def test_what_heads_share_with_other_blocks_is_left_to_them():
    model, example = attentions.build(attentions.Biased), attentions.images().double()
    _, groups, _ = discover(model, attentions.images())
    whole = copy.deepcopy(model.double())
    first = [group for group in groups if group.name == "attns.0"]
    gone = torch.tensor([0, 2])
    zero_consumers_(whole, first[0], gone)
    slice_groups_(model, first, [gone])
    assert model.attns[0].taken_heads.tolist() == [1, 3] and model.shared.shape[1] == 4
    assert not hasattr(model.attns[1], "taken_heads")
    torch.testing.assert_close(model(example), whole(example), rtol=1e-10, atol=1e-12)


def test_a_norm_across_the_queries_heads_is_named_though_keys_are_written_behind_it():
    _, groups, refused = discover(attentions.build(attentions.Normed), attentions.images())
    assert not [group for group in groups if group.name.startswith("attns")]
    assert any("attns.0.q_norm is a LayerNorm across the heads" in one.reason for one in refused)


def test_heads_that_cannot_be_fewer_are_refused_in_every_module_of_the_class_and_the_neurons_stay():
    _, groups, refused = discover(attentions.build(attentions.Fixed), attentions.images())
    reasons = {one.name: one.reason for one in refused}
    assert all("fails the slicing law" in reasons[f"attns.{block}"] for block in (0, 1))
    assert "mlp.0" in {group.name for group in groups}


def test_heads_whose_reader_stands_outside_their_attention_are_tried_once_a_class(monkeypatch):
    """Each block's halo attention raises on fewer heads: one failure speaks for all, or large networks take for ever."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    block = ByoBlockCfg(type="self_attn", d=3, c=8, s=1, gs=0, br=1.0)
    config = ByoModelCfg(
        blocks=(block, replace(block, c=16, s=2)),
        stem_chs=8,
        stem_pool="maxpool",
        num_features=0,
        self_attn_layer="halo",
        self_attn_kwargs={"block_size": 4, "halo_size": 2, "num_heads": 2},
    )
    checks, check = [], law.check
    monkeypatch.setattr(law, "check", lambda *args, **given: (checks.append(args), check(*args, **given))[1])
    _, groups, refused = discover(ByobNet(config, num_classes=3).eval(), torch.randn(1, 3, 64, 64))
    assert sum("self_attn.q" in one.name for one in refused) == 6
    assert len([group for group in groups if "conv1_1x1" in group.name]) == 6
    assert len(checks) <= 12  # 27 where each block fails for itself
