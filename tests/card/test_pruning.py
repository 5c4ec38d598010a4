"""Every recipe on every kind of network and every way to forget on the pretended card: the same choices as off it."""

import pytest

import modhifi_cli
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.token_walk import DecoderOptions, TokenWalk
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.records import Edit
from modhifi_cli.settings import config
from tests.card import pretend
from tests.card.networks import labelled_images, network
from tests.decoders import tiny, tokens

pytestmark = pytest.mark.card

PRESETS = config.groups()["preset"]
OF_IMAGES = [name for name in PRESETS if "language" not in name and not name.startswith("torch_pruning")]
STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")
METHODS = config.groups()["method"]
OF_TEXT = [name for name in PRESETS if name.endswith("_language")]
WITHOUT_CLASSES = [name for name in OF_IMAGES if name not in ("discedit_sp", "tvsprune")]


@pytest.mark.parametrize(
    ("kind", "preset"),
    [(kind, preset) for kind in ("batchnorm", "no norm", "vit") for preset in OF_IMAGES]
    + [("swin", preset) for preset in WITHOUT_CLASSES]
    + [("torchvision_vit", "best"), ("hf_vit", "best")],
)
def test_every_recipe_for_images_keeps_the_same_on_the_card(kind, preset):
    model, data = network(kind), labelled_images(kind, 40 if kind == "swin" else 60)
    if preset == "best" and kind == "swin":
        data = [(images[:10], labels[:10]) for images, labels in data]
    _, here = modhifi_cli.prune(model, data, sparsity=0.3, preset=preset)
    with pretend.card() as seen:
        small, there = modhifi_cli.prune(model.cuda(), data, sparsity=0.3, preset=preset)
        assert all(tensor.is_cuda for tensor in small.state_dict().values()) and seen.peak > 0
        model.cpu()
    assert there.achieved["params"] > 0.1
    assert {name: kept.tolist() for name, kept in there.kept.items()} == {
        name: kept.tolist() for name, kept in here.kept.items()
    }


@pytest.mark.parametrize("preset", ["torch_pruning_magnitude", "torch_pruning_bn_scale"])
def test_the_rivals_run_on_the_card(preset):
    from modhifi_cli.data.tensors import from_batches

    settings = config.compose("prune", [f"preset={preset}"])
    with pretend.card():
        model = network("batchnorm").cuda()
        events = list(
            config.build(settings["outside"])(
                model, calibration=from_batches(labelled_images("batchnorm"), part=tuple), sparsity=0.3, target="params",
                batchnorm=settings["batchnorm"], exclude=(), round_to=1, batch_size=20, device="cuda", done=(),
            )
        )  # fmt: skip
        assert all(parameter.is_cuda for parameter in model.parameters())
    assert any(isinstance(event, Edit) and event.removed.numel() for event in events)


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, method) for kind in ("no norm", "vit", "swin") for method in METHODS if method != "collapse"]
    + [("embedded", method) for method in METHODS],
)
def test_every_way_to_forget_runs_on_the_card(kind, method):
    with pretend.card():
        model, data = network(kind).cuda(), labelled_images(kind)
        edited, record = modhifi_cli.unlearn(model, data, forget=3, method=method)
        assert all(parameter.is_cuda for parameter in edited.parameters())
    assert record.forgotten == (3,) and record.layers


def edits_of(family: str, preset: str, device: str, words: tuple[str, ...] = (), **options):
    chosen = config.steps("prune", [f"preset={preset}", "model=hf", "model.path=x", *words])
    model = tiny(family)
    asked = DecoderOptions(**{"components": ("mlp", "attention"), **options})
    walk = TokenWalk(model, tokens(), options=asked, device=device)
    recipe = Recipe(**{key: config.build(chosen[key]) for key in STEPS})
    return model, [event for event in prune_(walk, recipe, Budget(0.3)) if isinstance(event, Edit)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2"])
@pytest.mark.parametrize("preset", OF_TEXT)
def test_every_recipe_for_text_keeps_the_same_on_the_card(family, preset):
    _, here = edits_of(family, preset, "cpu")
    with pretend.card() as seen:
        model, there = edits_of(family, preset, "cuda")
        assert not any(parameter.is_cuda for parameter in model.parameters()), "it comes back to the processor"
    assert seen.peak > 0 and [edit.kept.tolist() for edit in there] == [edit.kept.tolist() for edit in here]


@pytest.mark.parametrize(("words", "options"), [(("compensation=joint_dense",), {}), ((), {"offload": True})], ids=str)
def test_the_ways_of_repair_of_a_decoder_run_on_the_card(words, options):
    with pretend.card():
        _, edits = edits_of("llama", "best_language", "cuda", words, **options)
    assert sum(edit.state.step == "cut" for edit in edits) == 4
