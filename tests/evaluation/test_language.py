"""Perplexity against a slow reference, speed of generation, and lm-eval on local files, with tiny random decoders."""

import json
import math
import sys

import pytest
import torch

from modhifi_cli.data import text
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.evaluation import generation, lm_eval, token_perplexity
from modhifi_cli.pages.run import spreads
from modhifi_cli.records import TextInput
from tests.decoders import tiny, tokenizer

TEXT = "".join(chr(ord("!") + (7 * number + number * number // 5) % 60) for number in range(600))


@pytest.fixture
def words():
    return TextInput(tokenizer(), len(tokenizer()), 64, 0)


def given(words, **more):
    example = torch.zeros(1, 8, dtype=torch.int64)
    return {
        "models": {"dense": tiny("llama")}, "evaluation_data": None, "calibration_data": None, "example": example,
        "device": torch.device("cpu"), "batch_size": 4, "progress": lambda step: None,
    } | more  # fmt: skip


@pytest.mark.parametrize("stride", [None, 8])
def test_perplexity_is_that_of_every_token_scored_once(words, tmp_path, stride):
    (tmp_path / "t.txt").write_text(TEXT[:110])
    source = text.load(
        path=str(tmp_path / "t.txt"), length=20, stride=stride, sequences=None, preprocess=words, labelled=True
    )
    other = tiny("llama", intermediate_size=40)
    dense = tiny("llama")
    found = token_perplexity.measure(**given(words, models={"dense": dense, "pruned": other}, evaluation_data=source))
    ids = tokenizer()(TEXT[:110])["input_ids"]
    step = stride or 20
    total, count, kl = 0.0, 0, 0.0
    slow, slow_other = tiny("llama").double(), tiny("llama", intermediate_size=40).double()
    for start in range(0, len(ids), step):
        window = torch.tensor(ids[start : start + 20])[None]
        first = 1 if start == 0 or stride is None else 20 - step
        with torch.no_grad():
            p, q = (model(input_ids=window).logits[0].log_softmax(-1) for model in (slow, slow_other))
        for place in range(first, window.shape[1]):
            total -= float(p[place - 1, window[0, place]])
            kl += float((p[place - 1].exp() * (p[place - 1] - q[place - 1])).sum())
            count += 1
        if start + 20 >= len(ids):
            break
    values = {(m.model, m.name): m for m in found}
    measured = values["dense", "token_perplexity"]
    assert measured.protocol["scored_tokens"] == count and measured.protocol["length"] == 20
    assert measured.value == pytest.approx(math.exp(total / count), rel=1e-4)
    assert values["pruned", "token_kl"].value == pytest.approx(kl / count, rel=1e-3)


def test_generation_times_prefill_and_steps(words):
    models = {"dense": tiny("llama"), "pruned": tiny("llama")}
    found = generation.measure(
        prompt_tokens=8, new_tokens=2, rounds=1, sequences=[1, 2], **given(words, models=models)
    )
    speeds = {"first_token_ms", "prefill_tokens_per_second", "decode_tokens_per_second"}
    ratios = {"prefill_speedup", "decode_speedup"}
    names = {m.name for m in found if m.model == "pruned"}
    assert names == {f"{name}{batch}" for name in speeds | ratios for batch in ("", "_2")}
    assert {m.name for m in found if m.model == "dense"}.isdisjoint(ratios)
    assert all(m.value > 0 and m.protocol["prompt_tokens"] == 8 for m in found)
    assert {m.protocol["sequences"] for m in found if m.name.endswith("_2")} == {2}
    (speedup,) = [m for m in found if m.name == "decode_speedup"]
    assert speedup.protocol["told"].startswith("too noisy to tell"), "one round says nothing"
    spread = f"median of 1 paired rounds, {speedup.protocol['clock']} clock"
    assert spreads([speedup])["decode_speedup"] == spread, "the page reads the number of rounds"
    with pytest.raises(ConfigError, match="new_tokens must be at least 1, got 0"):
        generation.measure(new_tokens=0, **given(words))


def test_networks_that_read_images_have_no_tokens(words):
    image = given(words, example=torch.zeros(1, 3, 8, 8))
    assert token_perplexity.measure(**image) == generation.measure(**image) == lm_eval.measure(**image) == ()


def test_a_local_task_is_scored_by_likelihood(words, tmp_path):
    pytest.importorskip("lm_eval")
    model = tiny("llama")
    rows = [{"query": TEXT[n : n + 9], "choices": [TEXT[n + 20], TEXT[n + 40]], "gold": n % 2} for n in range(6)]
    (tmp_path / "piqa.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "c.txt").write_text(TEXT)
    source = text.load(path=str(tmp_path / "c.txt"), length=20, sequences=4, preprocess=words, labelled=False)
    found = lm_eval.measure(
        tasks=["piqa"], local_data=str(tmp_path), **given(words, models={"dense": model}, calibration_data=source)
    )
    right = 0
    for row in rows:
        losses = []
        for choice in row["choices"]:
            ids = tokenizer()(f"{row['query']}\nAnswer: {choice}", add_special_tokens=False)["input_ids"]
            tail = len(tokenizer()(f" {choice}", add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(ids)[None]).logits[0].log_softmax(-1)
            losses.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(ids) - tail, len(ids))))
        right += losses.index(max(losses)) == row["gold"]
    accuracy = next(m for m in found if m.name == "lm_eval/piqa_local/acc")
    assert accuracy.value == pytest.approx(100 * right / 6) and accuracy.protocol["documents"] == 6


def test_a_package_that_is_installed_on_request_only_is_named(words, tmp_path, monkeypatch):
    (tmp_path / "c.txt").write_text(TEXT)
    source = text.load(path=str(tmp_path / "c.txt"), length=20, sequences=4, preprocess=words, labelled=False)
    for name in ("lm_eval", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="needs the package lm_eval, which is not installed; .* pip install -e"):
        lm_eval.measure(tasks=["piqa"], **given(words, calibration_data=source))
    with pytest.raises(ConfigError, match="data: fetching some/text from the hub needs the package datasets"):
        text._from_hub("data", {"path": "some", "name": "text"})


def test_tasks_that_cannot_be_had_are_named(words, tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "c.txt").write_text(TEXT)
    source = text.load(path=str(tmp_path / "c.txt"), length=20, sequences=4, preprocess=words, labelled=False)
    asked = given(words, calibration_data=source)
    with pytest.raises(ConfigError, match="lm-eval knows no task 'piqaa'"):
        lm_eval.measure(tasks=["piqaa"], **asked)
    with pytest.raises(DataError, match="no folder at"):
        lm_eval.measure(tasks=["piqa"], local_data=str(tmp_path / "nothing"), **asked)
    (tmp_path / "piqa.jsonl").write_text("{")
    with pytest.raises(DataError, match="piqa.jsonl is damaged, not JSONL"):
        lm_eval.measure(tasks=["piqa"], local_data=str(tmp_path), **asked)
    (tmp_path / "piqa.jsonl").write_text('{"question": 1}')
    with pytest.raises(DataError, match="has the fields question, expected query, choices"):
        lm_eval.measure(tasks=["piqa"], local_data=str(tmp_path), **asked)
