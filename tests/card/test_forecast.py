"""A dry run says what a run takes: against peaks that the pretended card measured, and for networks of 7 and 70 B."""

import json
import re

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.engine.forecast import Run, forecast
from modhifi_cli.engine.prune import prune_
from modhifi_cli.engine.token_walk import DecoderOptions, TokenWalk
from modhifi_cli.engine.walk import Budget, Recipe
from modhifi_cli.errors import DataError
from modhifi_cli.models import hf
from modhifi_cli.settings import config
from tests.card import pretend
from tests.decoders import tiny, tokens

STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")
# Family, what is changed of the tiny one, recipe: the reader's input is what a real network is wide in, too.
RUNS = [
    ("llama", {"intermediate_size": 320}, "best_language"),
    ("llama", {"intermediate_size": 256, "hidden_size": 64}, "best_language"),
    ("gpt2", {"n_inner": 288}, "best_language"),
    ("phi3", {"intermediate_size": 256}, "best_language"),
    ("opt", {"ffn_dim": 384}, "paper_language"),
]
BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
# Published hyper-parameters of Llama 2 7B and Llama 3 70B.
KNOWN = {
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    },
    "70B": {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    },
}  # fmt: skip


@pretend.COUNTED
@pytest.mark.card
@pytest.mark.parametrize(("family", "changed", "preset"), RUNS, ids=lambda value: str(value).replace(" ", ""))
def test_the_forecast_is_within_15_percent_of_the_measured_peak(family, changed, preset):
    chosen = config.steps("prune", [f"preset={preset}", "model=hf", "model.path=x"])
    recipe = Recipe(**{key: config.build(chosen[key]) for key in STEPS})
    model, data = tiny(family, **changed), tokens(32, 24)
    with pretend.card() as seen:
        walk = TokenWalk(model, data, options=DecoderOptions(components=("mlp",)), batch_size=8, device="cuda")
        run = Run(
            sequences=32, length=24, batch_size=8, passes=1,
            reference=recipe.compensation.reference, hold_out=recipe.compensation.wants_held_out, uneven=False,
            statistics=recipe.needs_statistics, offload=False, dense_copies=0,
        )  # fmt: skip
        expected = forecast(model, walk.decoder, run)
        for _ in prune_(walk, recipe, Budget(0.3)):
            pass
    assert sum(expected.card.values()) == pytest.approx(seen.peak, rel=0.15), (expected.card, seen.peak_at)
    assert seen.moved() < 2 * expected.traffic + 2e6  # tokens, indices and edits go between the places, too


def folder(tmp_path, size: str):
    (tmp_path / "config.json").write_text(json.dumps(BASE | KNOWN[size]))
    return tmp_path


def dry(capsys, tmp_path, *words: str) -> dict:
    asked = ["model=hf", f"model.path={tmp_path}", "model.dtype=bfloat16", "sparsity=0.2", "dry_run=true"]
    assert main(["prune", *asked, "console=json", "measure_dense=false", *words]) == 0
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# Grams and moments of the widest reader, five matrices in float64, and the network in bfloat16.
@pytest.mark.parametrize(("size", "card", "host", "parts", "removed"), [("7B", 6.8, 13.48, 32, 0.202), ("70B", 38.0, 141.1, 80, 0.2)])
def test_a_dry_run_of_a_known_network_tells_memory_without_a_weight(tmp_path, capsys, size, card, host, parts, removed):
    found = dry(capsys, folder(tmp_path, size))
    assert found["parts"] == parts and found["removed"]["params"] == pytest.approx(removed, abs=0.002)  # 256 neurons are 1.6 % of 7B
    assert card * 1e9 < found["card_bytes"] < card * 1e9 * 1.6
    assert found["host_bytes"] == pytest.approx(host * 1e9, rel=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json"}, "no folder of a run"


def test_uneven_widths_and_a_dense_network_beside_cost_traffic_and_memory(tmp_path, capsys):
    even = dry(capsys, folder(tmp_path, "7B"))
    uneven = dry(capsys, tmp_path, "preset=best_uneven", "measure_dense=true")
    assert uneven["traffic_bytes"] > 5 * even["traffic_bytes"]
    assert uneven["host_bytes"] == 2 * even["host_bytes"]


def test_a_dry_run_speaks_as_a_run_does(tmp_path, capsys):
    dry(capsys, folder(tmp_path, "7B"))
    words = ["model=hf", f"model.path={tmp_path}", "model.dtype=bfloat16", "sparsity=0.2", "dry_run=true", "console=plain"]
    assert main(["prune", *words, "measure_dense=false"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"would remove 20[.\d]* % of decoder parameters \([\d.]+ % of the network\), ", said)
    assert re.search(r"about \d+ (s|min) where a second takes 60 × 10¹² multiply-accumulates", said)


def test_an_outline_has_no_weights(tmp_path):
    model = hf.outline(path=str(folder(tmp_path, "7B")), dtype="bfloat16")
    assert all(tensor.is_meta for tensor in model.parameters())
    assert sum(tensor.numel() for tensor in model.parameters()) == 6_738_415_616
    assert next(model.parameters()).dtype == torch.bfloat16


def test_a_dry_run_without_a_configuration_or_of_images_is_refused(tmp_path, capsys):
    with pytest.raises(DataError, match="has no config.json"):
        hf.outline(path=str(tmp_path))
    assert main(["prune", "dry_run=true", "console=plain"]) == 2
    assert "dry_run=true reads the shapes of language models" in capsys.readouterr().err
