"""What a decoder's run copies between the places and how often the processor waits: bounded, and counted by line."""

import pytest
import torch

from modhifi_cli.engine.flow import Flow
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.token_walk import DecoderOptions, TokenWalk
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.evaluation.forward import RememberedLogits, logits_of_batches, ready_to_measure
from modhifi_cli.settings import config
from tests.card import pretend
from tests.card.networks import network
from tests.decoders import tiny, tokens
from tests.engine.test_both_walks import Images

pytestmark = [pytest.mark.card, pretend.COUNTED]

LAYERS = 4
STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")


def run():
    chosen = config.steps("prune", ["preset=best_uneven_language", "model=hf", "model.path=x"])
    model = tiny("llama", num_hidden_layers=LAYERS)
    layers = sum(tensor.nbytes for tensor in model.model.layers.parameters())
    with pretend.card() as seen:
        walk = TokenWalk(model, tokens(), options=DecoderOptions(components=("mlp",)), batch_size=8, device="cuda")
        recipe = Recipe(**{key: config.build(chosen[key]) for key in STEPS})
        kept = [event for event in prune_(walk, recipe, Budget(0.3)) if hasattr(event, "kept")]
        assert not any(parameter.is_cuda for parameter in model.parameters())
    return seen, layers, [edit.kept.tolist() for edit in kept]


def of_layers(seen, way: str) -> int:
    return sum(count for where, count in seen.bytes.items() if "engine/flow.py" in where and where.endswith(way))


def test_trials_of_uneven_widths_fetch_no_layer_again_where_the_card_has_room(monkeypatch):
    roomy, layers, kept = run()
    ends = 2 * 64 * 32 * 4  # embedding and head
    hidden = 20 * 24 * 32 * 4
    # One walk for the curves and one for the edits, each layer there and back; tokens and the ends once.
    assert of_layers(roomy, "to card") <= 2 * layers + ends + 3 * hidden, roomy.report()
    monkeypatch.setattr(Flow, "_has_room", lambda flow, layer: False)
    tight, _, same = run()
    assert kept == same, "room changes traffic, not the choice"
    assert of_layers(tight, "to card") > of_layers(roomy, "to card") + 3 * layers


def test_evaluation_images_go_to_the_card_once_for_all_networks_and_none_comes_back():
    source = Images(torch.randn(20, 3, 8, 8))
    with pretend.card() as seen:
        networks = {name: network("batchnorm").cuda() for name in ("dense", "pruned")}
        models = {"dense": RememberedLogits(networks["dense"]), "pruned": networks["pruned"]}
        before = seen.moved("to card")
        with ready_to_measure(models, torch.device("cuda")):
            for _ in logits_of_batches(
                models, source, place="evaluation_data", stage="test", device=torch.device("cuda"), batch_size=8,
                progress=lambda event: None,
            ):  # fmt: skip
                pass
        logits = 20 * 10 * 4
        assert seen.moved("to card") - before <= source.images.nbytes + logits, seen.report()
        assert seen.moved("from card") < source.images.nbytes / 2, seen.report()


def test_the_processor_waits_a_bounded_number_of_times_for_each_layer():
    seen, _, _ = run()
    waits = sum(seen.waits.values()) / LAYERS
    assert waits < 200, seen.report()  # none of them at a step of an elimination: that would be 36 a layer more
