"""The functions for Python: the same results as the command line, nothing changed unasked, errors in one sentence."""

import copy
import re

import pytest
import torch
from torch import nn

import modhifi_cli
from modhifi_cli.api.words import in_words
from modhifi_cli.cli import main
from modhifi_cli.data import digits
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.evaluation import latency_probe
from modhifi_cli.files import artifacts
from modhifi_cli.graph.surgery import apply_edit_
from modhifi_cli.models import embedded, hf
from modhifi_cli.settings import config
from tests import decoders
from tests.evaluation.test_language import TEXT
from tests.machines import Machine

LOADED = embedded.load()


def images(count=96, *, labelled=False):
    source = digits.load(preprocess=LOADED.preprocess, labelled=labelled, num_samples=count)
    return [pixels if labels is None else (pixels, labels) for pixels, labels in source.batches(32)]


@pytest.fixture(scope="module")
def pruned():
    before = copy.deepcopy(LOADED.model.state_dict())
    model, result = modhifi_cli.prune(LOADED.model, images(), sparsity=0.3, target="flops")
    assert all(torch.equal(tensor, before[name]) for name, tensor in LOADED.model.state_dict().items())
    return model, result


@pytest.mark.parametrize("preset", ["best", "magnitude_batchnorm"])
def test_a_preset_gives_the_network_of_the_command_line(preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"preset={preset}", "data.num_samples=96", "target=flops", "sparsity=0.3", "evaluation=[]", "console=json"]
    assert main(["prune", *words]) == 0
    (folder,) = (tmp_path / "outputs/prune/embedded").iterdir()
    theirs = artifacts.load_model(folder).state_dict()
    calibration = digits.load(preprocess=LOADED.preprocess, labelled=False, num_samples=96)
    ours, _ = modhifi_cli.prune(
        LOADED.model, [pixels for pixels, _ in calibration.batches(64)], sparsity=0.3, target="flops", preset=preset
    )
    assert theirs.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_record_says_what_was_removed(pruned):
    model, result = pruned
    assert result.achieved["flops"] == pytest.approx(0.3, abs=0.01)
    assert result.after["macs"] / result.before["macs"] == pytest.approx(1 - result.achieved["flops"])
    assert result.after["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for name, kept in result.kept.items():
        width = LOADED.model.get_submodule(name).out_channels
        assert torch.equal(torch.cat([kept, result.removed[name]]).sort().values, torch.arange(width))
        assert model.get_submodule(name).out_channels == len(kept)


def test_the_edits_make_the_same_network_again(pruned):
    model, result = pruned
    again = copy.deepcopy(LOADED.model)
    for edit in result.edits:
        apply_edit_(again, edit)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_in_place_changes_the_given_network(tiny_convnet):
    pixels = torch.randn(16, 3, 8, 8)
    model, _ = modhifi_cli.prune(tiny_convnet, pixels, sparsity=0.2, preset="fast", in_place=True, check_data=False)
    assert model is tiny_convnet and model[0].out_channels + model[3].out_channels < 14


def test_further_settings_win_over_the_preset(tiny_convnet):
    pixels = torch.randn(16, 3, 8, 8)
    plain, _ = modhifi_cli.prune(
        tiny_convnet, pixels, sparsity=0.2, check_data=False,
        settings=["compensation=none", "classifier=keep", "batchnorm=stored"],
    )  # fmt: skip
    rows = {tuple(row.flatten().tolist()) for row in tiny_convnet[-1].weight.T}
    assert {tuple(row.flatten().tolist()) for row in plain[-1].weight.T} <= rows, "sliced and not repaired"


def test_unlearning_forgets_the_class_and_keeps_the_network():
    before = copy.deepcopy(LOADED.model.state_dict())
    batches = images(240, labelled=True)
    edited, result = modhifi_cli.unlearn(LOADED.model, batches, forget="3", classes=LOADED.classes)
    assert result.forgotten == (3,) and len(result.layers) >= 2 and result.strength["beta"] > 0 and result.edits
    assert all(torch.equal(tensor, before[name]) for name, tensor in LOADED.model.state_dict().items())
    pixels, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.inference_mode():
        right = edited(pixels).argmax(1) == labels
    assert right[labels == 3].float().mean() < 0.2 < 0.8 < right[labels != 3].float().mean()


def test_scores_are_the_norms_of_filters_and_order_every_component(tiny_convnet):
    pixels = torch.randn(16, 3, 8, 8)
    scores = modhifi_cli.score(tiny_convnet, pixels, scoring="magnitude_l2")
    found, refused = modhifi_cli.groups(tiny_convnet, pixels)
    assert [group.name for group in found] == list(scores) == ["0", "3"] and refused == ()
    norms = tiny_convnet[0].weight.detach().double().flatten(1).norm(dim=1)
    assert torch.equal(scores["0"].argsort(), norms.argsort())
    fidelity = modhifi_cli.score(tiny_convnet, pixels)
    assert fidelity["3"].shape == (8,) and float(fidelity["3"].min()) >= 0 and float(fidelity["3"].max()) <= 1


def test_groups_of_a_transformer_are_those_that_the_best_recipe_cuts():
    import timm

    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    found, _ = modhifi_cli.groups(vit, torch.randn(2, 3, 32, 32))
    assert [(group.components, group.product) for group in found] == [(64, True), (3, False), (768, False)] * 2
    assert type(vit.blocks[0].attn) is timm.layers.Attention, "the network is left as it was"


def test_evaluation_counts_what_it_is_given(pruned):
    model, result = pruned
    batches = images(150, labelled=True)
    found = modhifi_cli.evaluate(model, batches, dense=LOADED.model)
    pixels, labels = torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])
    with torch.inference_mode():
        answers, dense = model(pixels).argmax(1), LOADED.model(pixels).argmax(1)
    assert found["top1"] == pytest.approx(100 * float((answers == labels).float().mean()))
    assert found["agreement"] == pytest.approx(100 * float((answers == dense).float().mean()))
    assert found["macs"] == result.after["macs"]
    assert not {"top1", "agreement"} & modhifi_cli.evaluate(model, pixels).keys()


def test_a_hydra_application_around_the_call_stays(tiny_convnet):
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    with hydra.initialize_config_dir(str(config.config_directory()), version_base="1.3", job_name="theirs"):
        mine = GlobalHydra.instance().hydra
        modhifi_cli.score(tiny_convnet, torch.randn(4, 3, 8, 8), scoring="random")
        assert GlobalHydra.instance().is_initialized() and GlobalHydra.instance().hydra is mine


PIXELS = torch.randn(4, 3, 8, 8)
WRONG = {
    "no images": ([], {}, DataError, "expected at least one image, got none"),
    "bytes": ([PIXELS.to(torch.uint8)], {}, DataError, r"images \[batch.* of floats, all of one shape, got uint8 \[4,"),
    "two sizes": ([PIXELS, PIXELS[..., 1:]], {}, DataError, r"got float32 \[4, 3, 8, 7\] in batch 1"),
    "no tensors": ([{"image": "a.png"}], {}, DataError, "got a dict in batch 0; take both out of it"),
    "labels": ([(PIXELS, torch.zeros(3))], {}, DataError, r"one label for each of 4 images, got float32 \[3\]"),
    "half labelled": ([PIXELS, (PIXELS, torch.zeros(4))], {}, DataError, "some come with labels and some without"),
    "NaN": ([PIXELS * float("nan")], {}, DataError, "batch 0 holds NaN or infinite values"),
    "preset": (PIXELS, {"preset": "bets"}, ConfigError, "there is no recipe 'bets'; known: best, "),
    "outside": (PIXELS, {"preset": "torch_pruning_magnitude"}, ConfigError, "is another library's method"),
    "target": (PIXELS, {"target": "max_drop"}, ConfigError, "target must be auto, params, .* or latency, got 'max_drop'"),
    "texts": (["a text"], {}, DataError, "texts are for language models of transformers, and Sequential is none"),
    "number": (PIXELS, {"num_samples": 0}, ConfigError, "num_samples: expected a whole number from 1, auto or None, got 0"),
    "listener": (PIXELS, {"progress": 3}, ConfigError, "progress: expected None for a bar, False for none, or a function"),
    "setting": (PIXELS, {"settings": ["compensatoin=joint"]}, ConfigError, "compensatoin.*did you mean 'compensation'"),
    "channels": (PIXELS[:, :1], {}, UnsupportedModelError, r"does not take an image batch of shape \(2, 1, 8, 8\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case, tiny_convnet):
    batches, settings, kind, words = WRONG[case]
    with pytest.raises(kind, match=words):
        modhifi_cli.prune(tiny_convnet, batches, **settings)


def test_a_network_must_be_a_module():
    with pytest.raises(ConfigError, match="model: expected a torch.nn.Module, got a dict"):
        modhifi_cli.groups({}, PIXELS)
    assert modhifi_cli.groups(nn.Conv2d(3, 3, 1), PIXELS) == ((), ())  # maps are an answer; nothing is inside


def test_a_text_to_exclude_is_one_name():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    found, _ = modhifi_cli.groups(net, torch.randn(4, 3, 8, 8), exclude="0")
    assert [group.name for group in found] == ["2"]
    with pytest.raises(ConfigError, match="exclude: the network has no module 'blocks.1'"):
        modhifi_cli.groups(net, torch.randn(4, 3, 8, 8), exclude="blocks.1")


# ------------------------------------------------------------------------------------- records, and more functions


def test_records_are_short_at_a_prompt_and_tables_in_a_notebook(pruned):
    _, result = pruned
    assert re.fullmatch(r"Pruned\([\d.]+ % of parameters, [\d.]+ % of FLOPs, [\d.]+ % of components removed from \d groups"
                        r"(; \d+ warnings?)?\)", repr(result))  # fmt: skip
    shown = result._repr_html_()
    assert len(shown) < 3000 and "<table>" in shown and "FLOPs (MACs)" in shown


def test_time_can_be_the_target_and_the_clock_says_what_it_became(tiny_convnet, monkeypatch):
    monkeypatch.setattr(latency_probe, "stopwatch", Machine(fixed=0.01))
    pixels = torch.randn(16, 3, 8, 8)
    _, result = modhifi_cli.prune(
        tiny_convnet, pixels, sparsity=0.2, target="latency", preset="fast", check_data=False,
        settings=["target.rounds=2", "target.max_seconds=2", "target.batch_size=4"],
    )  # fmt: skip
    assert result.achieved["latency"] == pytest.approx(0.2, abs=0.1) and 0 < result.achieved["flops"] < 1


def test_words_of_the_command_line_are_those_of_the_functions():
    said = in_words("evaluation_data.num_samples=5, data.sequences or evaluation_data.sequences; evaluation_data.length=3.")
    assert said == "num_samples=5, num_samples or num_samples; length=3."


def test_an_audit_tells_the_output_from_the_inside():
    pixels, labels = (torch.cat(parts) for parts in zip(*images(300, labelled=True), strict=True))
    edited, _ = modhifi_cli.unlearn(LOADED.model, [(pixels, labels)], forget=3)
    found = modhifi_cli.audit(
        LOADED.model, edited, [(pixels[:200], labels[:200])], forget="3", classes=LOADED.classes,
        evaluation=[(pixels[200:], labels[200:])],
        settings=["audit.relearn.steps=2", "audit.further.seeds=1", "audit.probe.iterations=20"],
    )  # fmt: skip
    assert found.verdict.startswith("forgotten at the output") and found.sentences
    assert found.figures["edited"]["FA"] <= 5 < found.figures["dense"]["FA"]
    assert repr(found) == f"Audited({found.verdict})" and "head-only" in found._repr_html_()
    with pytest.raises(ConfigError, match="evaluation: an audit measures accuracy on these images, and they come without"):
        modhifi_cli.audit(LOADED.model, edited, [(pixels, labels)], forget=3, evaluation=pixels)
    with pytest.raises(ConfigError, match="edited: expected a torch.nn.Module, got a dict"):
        modhifi_cli.audit(LOADED.model, {}, [(pixels, labels)], forget=3)


class Masked(nn.Module):
    """Reads an image and a mask beside it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 12, 3), nn.ReLU())
        self.head = nn.Linear(12, 4)

    def forward(self, image, mask):
        return self.head((self.body(image) * mask[:, None, None, None]).mean((2, 3)))


def test_batches_of_another_form_than_the_first_are_one_sentence():
    model, draw = Masked(), torch.Generator().manual_seed(0)
    full = {"image": torch.randn(80, 3, 8, 8, generator=draw), "mask": torch.ones(80, dtype=torch.int64), "label": torch.arange(80) % 4}
    without = {key: value for key, value in full.items() if key != "mask"}
    with pytest.raises(DataError, match="batches: expected dictionaries with image, mask as in the first batch, got dict"):
        modhifi_cli.prune(model, [full, without], preset="fast")
    half = {**full, "mask": torch.arange(80) % 2}
    with pytest.raises(DataError, match=r"holds nothing but 1 in the first batch and other values later; put batches with"):
        modhifi_cli.audit(model, model, [full], forget=1, evaluation=[half])


def test_methods_are_compared_on_the_same_samples(tiny_convnet):
    pixels = (torch.randn(16, 3, 8, 8) for _ in range(2))
    found = modhifi_cli.compare(
        tiny_convnet, pixels, torch.randn(24, 3, 8, 8), methods=["fast", "magnitude"], budgets=[0.2, 0.4]
    )
    assert [(row["method"], row["budget"]) for row in found.rows] == [
        ("fast", 0.2), ("fast", 0.4), ("magnitude", 0.2), ("magnitude", 0.4),
    ]  # fmt: skip
    assert all(0 <= row["agreement"] <= 100 and row["removed_flops"] > 0 for row in found.rows)
    assert found.finding.startswith("At 20 % ") and found.finding in repr(found) and "<table>" in found._repr_html_()
    parameters = sum(one.numel() for one in found.networks["fast", 0.4].parameters())
    assert parameters == found.rows[1]["parameters"] < found.dense["parameters"]
    with pytest.raises(ConfigError, match="methods: expected names of presets, such as .* got 'best'"):
        modhifi_cli.compare(tiny_convnet, PIXELS, PIXELS, methods="best")
    with pytest.raises(ConfigError, match=r"budgets: expected shares with 0 <= budget < 1, such as \[0.2, 0.4\]; got 40"):
        modhifi_cli.compare(tiny_convnet, PIXELS, PIXELS, budgets=[40])


@pytest.mark.parametrize("data", ["inversion", "procedural"])
def test_samples_are_made_from_the_network_as_it_wants_them(data):
    said = {"size": 8, "mean": [0.304], "std": [0.375]}
    short = ["data.steps=2"] if data == "inversion" else []
    made = modhifi_cli.synthesize(LOADED.model, data=data, num_samples=8, preprocess=said, cache=False, settings=short)
    assert made.shape == (8, 1, 8, 8) and made.dtype == torch.float32 and bool(torch.isfinite(made).all())
    with pytest.raises(ConfigError, match=r"^preprocess must say how .* mean, std, size are missing, e.g. preprocess=\{'mean'"):
        modhifi_cli.synthesize(LOADED.model)
    with pytest.raises(ConfigError, match=r"^preprocess\['size'\]: expected pixels"):
        modhifi_cli.synthesize(LOADED.model, preprocess=said | {"size": -1})
    with pytest.raises(ConfigError, match="data: expected auto or inversion or procedural for a .*, got 'generated'"):
        modhifi_cli.synthesize(LOADED.model, data="generated")


# ------------------------------------------------------------------------------------------------- language models


@pytest.fixture(scope="module")
def decoder():
    return decoders.tiny("llama")


def test_a_language_model_becomes_that_of_the_command_line(decoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    decoders.saved(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    words = [
        "model=hf", "model.path=dense", "data=text", "data.path=text.txt", "data.sequences=16", "data.length=20",
        "sparsity=0.3", "evaluation=[]", "console=json", "components=[mlp,attention]", "runtime.batch_size=8",
    ]  # fmt: skip
    assert main(["prune", *words]) == 0
    (folder,) = (tmp_path / "outputs/prune/dense").iterdir()
    theirs = artifacts.load_model(folder).state_dict()
    ours, result = modhifi_cli.prune(
        hf.load(path="dense").model, TEXT, tokenizer=decoders.tokenizer(),
        sparsity=0.3, num_samples=16, length=20, components=["mlp", "attention"],
    )  # fmt: skip
    assert theirs.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.state_dict().items())
    assert "of decoder parameters" in repr(result) and result.after["parameters"] < result.before["parameters"]


def test_token_ids_do_as_well_as_texts_and_the_network_is_left_alone(decoder):
    before = copy.deepcopy(decoder.state_dict())
    ids = torch.randint(3, 64, (20, 24), generator=torch.Generator().manual_seed(0))
    small, result = modhifi_cli.prune(decoder, ids, sparsity=0.25, preset="paper")
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())
    assert result.achieved["params"] == pytest.approx(0.25, abs=0.1)
    found = modhifi_cli.evaluate(small, [{"input_ids": ids[:4]}], dense=decoder)
    assert found["token_perplexity"] > 1 and 0 <= found["token_agreement"] <= 100 and found["token_kl"] > 0
    groups, refused = modhifi_cli.groups(decoder)
    assert len(groups) == 4 and refused == ()


def test_a_recipe_for_language_models_alone_has_its_plain_name_in_python(decoder):
    ids = torch.randint(3, 64, (20, 24), generator=torch.Generator().manual_seed(0))
    small, result = modhifi_cli.prune(decoder, ids, sparsity=0.25, preset="best_uneven", round_to=1)
    assert result.achieved["params"] == pytest.approx(0.25, abs=0.02)
    assert len({layer.mlp.down_proj.in_features for layer in small.model.layers}) > 1


def test_networks_that_are_measured_come_back_as_they_were(decoder, monkeypatch):
    """In training mode and where they were; none is copied, for a large one would take its memory again."""
    model, dense = (copy.deepcopy(decoder).train() for _ in range(2))
    monkeypatch.setattr(copy, "deepcopy", lambda *_: pytest.fail("a network was copied"))
    ids = torch.randint(3, 64, (4, 24), generator=torch.Generator().manual_seed(0))
    moved = []
    monkeypatch.setattr(nn.Module, "to", lambda self, *a, _to=nn.Module.to, **k: moved.append(self) or _to(self, *a, **k))
    found = modhifi_cli.evaluate(model, ids, dense=dense)
    assert found["token_agreement"] == 100 and moved.count(model) == 4 and moved.count(dense) == 2, "there and back"
    assert all(module.training for network in (model, dense) for module in network.modules())


LANGUAGE = {
    "no tokenizer": (["a text"], {}, ConfigError, "tokenizer: texts are read with the network's own tokenizer"),
    "no ids": ([torch.randn(2, 8)], {}, DataError, "a language model reads texts, or ids of tokens .* got a Tensor"),
    "vocabulary": (torch.full((2, 8), 64), {}, DataError, "expected token ids from 0 to 63, .* got 64 to 64"),
    "lengths": ([[3, 4, 5], [3, 4]], {}, DataError, "calibration windows must be of one length, got 2 to 3 tokens"),
    "too few": ("abc abc", {"tokenizer": decoders.tokenizer()}, DataError, "lower num_samples or length, or give more text"),
}


@pytest.mark.parametrize("case", LANGUAGE)
def test_what_is_wrong_with_text_is_said_in_one_sentence(case, decoder):
    batches, settings, kind, words = LANGUAGE[case]
    with pytest.raises(kind, match=words):
        modhifi_cli.prune(decoder, batches, **settings)


def test_a_score_that_tells_classes_apart_is_for_pruning_alone():
    with pytest.raises(ConfigError, match="DisCEditSP tells classes apart and scores while it prunes; choose another"):
        modhifi_cli.score(LOADED.model, images(), scoring="discedit_sp")


def test_what_is_for_classifiers_of_images_is_refused_for_a_language_model(decoder):
    ids = torch.full((4, 8), 3)
    with pytest.raises(ConfigError, match="classes can be taken out of classifiers of images only, and this is a language"):
        modhifi_cli.unlearn(decoder, ids, forget=0)
    with pytest.raises(ConfigError, match="score: neurons of language models are scored while their layers are cut; use prune"):
        modhifi_cli.score(decoder, ids)


def test_the_names_of_the_package_are_functions_whatever_was_imported_before():
    import modhifi_cli.api.forgetting
    import modhifi_cli.auditing.audit  # noqa: F401

    assert all(callable(getattr(modhifi_cli, name)) for name in modhifi_cli.__all__)
