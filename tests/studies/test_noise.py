"""Noise: where it goes, what the answers and scores say, and the errors."""

import copy

import pytest
import torch

from modhifi_cli.errors import ConfigError
from modhifi_cli.studies import noise
from modhifi_cli.studies.noise import Noise
from tests.studies import helpers


def test_noise_goes_into_the_chosen_components_alone_and_is_the_same_whatever_the_level(randomise_, monkeypatch):
    about = helpers.subject(randomise_)
    dense = copy.deepcopy(about.model)
    seen = []

    def look(self, model, *, item=""):
        yield from ()
        seen.append(copy.deepcopy(model))
        return 50.0

    monkeypatch.setattr(type(about), "quality", look)
    study = Noise(levels=(0.01, 0.02), share=0.25)
    cells = [cell for cell in study.cells(about) if cell["part"] in ("high", "low")]
    helpers.unchanged(about.model, lambda: [helpers.finished(study.compute(about, cell)) for cell in cells])
    scores, _ = helpers.finished(about.scores_of(about.layers(None)))
    assert [(cell["part"], cell["level"]) for cell in cells] == [
        ("high", 0.01), ("low", 0.01), ("high", 0.02), ("low", 0.02)
    ]  # fmt: skip
    for layer, values in scores.items():
        before = dense.get_submodule(layer).weight
        added = [model.get_submodule(layer).weight - before for model in seen]
        touched = [{int(i) for i in (one.transpose(0, 1).flatten(1) != 0).any(1).nonzero()} for one in added]
        ranked = values.argsort(descending=True).tolist()
        count = round(0.25 * len(values))
        assert touched == 2 * [set(ranked[:count]), set(ranked[-count:])]
        assert torch.allclose(added[2], 2 * added[0], atol=1e-12)
    spread = torch.cat(
        [(m.get_submodule(n).weight - dense.get_submodule(n).weight).flatten() for n in scores for m in seen[:2]]
    )
    assert float(spread[spread != 0].std()) == pytest.approx(0.01, rel=0.1)


def test_scores_under_noise_are_those_of_a_layer_with_noisy_weights(randomise_):
    about = helpers.subject(randomise_, seeds=(3,), asked=("3.conv2", "6"))
    study = Noise(levels=(0.05, 5.0))
    rows, _ = helpers.finished(study.compute(about, {"part": "scores", "seed": 3}))
    assert [(row["layer"], row["level"]) for row in rows] == [
        ("3.conv2", 0.05), ("3.conv2", 5.0), ("6", 0.05), ("6", 5.0)
    ]  # fmt: skip
    noisy = copy.deepcopy(about.model)
    layer = noisy.get_submodule("6")
    with torch.no_grad():
        layer.weight += noise._drawn(layer.weight.shape, 5.0, "3 6 scores")
    before, _ = helpers.finished(about.consumers(["6"]))
    after, _ = helpers.finished(about.consumers(["6"], model=noisy))
    ours, theirs = about.scores(before["6"]), about.scores(after["6"])
    from scipy.stats import spearmanr

    assert rows[3]["rank_correlation"] == pytest.approx(spearmanr(ours, theirs).statistic, abs=1e-9)
    assert rows[2]["rank_correlation"] > 0.9


def test_losses_figures_and_verdicts_follow_from_the_rows():
    rows = [{"part": "none", "level": 0.0, "seed": 0, "quality": 90.0, "unit": "top-1, %"}]
    for level, high, low in ((0.01, (88.0, 86.0), (90.0, 89.0)), (0.05, (40.0, 44.0), (85.0, 83.0))):
        for part, values in (("high", high), ("low", low)):
            rows += [
                {"part": part, "level": level, "seed": seed, "quality": value, "unit": "top-1, %"}
                for seed, value in enumerate(values)
            ]
        rows += [
            {"part": "scores", "level": level, "seed": 0, "layer": layer, "rank_correlation": rank,
             "kept_in_common": 0.9, "relative_level": 0.1}
            for layer, rank in (("a", 0.99), ("b", 0.95), ("c", 0.2))
        ]  # fmt: skip
    outcome = Noise(levels=(0.01, 0.05)).conclude(rows)
    helpers.assert_as_stored(outcome.charts)
    first, second = outcome.findings
    assert (
        first.holds and "At 0.05: 48.0 points lost with noise in the high-scored, 6.0 in the low-scored" in first.found
    )
    assert second.holds and "0.05: 0.950" in second.found


def test_rows_of_one_part_alone_still_make_an_outcome():
    row = {"part": "scores", "level": 0.01, "seed": 0, "layer": "a", "rank_correlation": 0.5, "kept_in_common": 0.9}
    outcome = Noise(levels=(0.01,)).conclude([row])
    assert [chart.name for chart in outcome.charts] == ["scores_under_noise"] and not outcome.findings[0].holds


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"levels": [0]}, "study.levels must be a list of numbers above 0"),
        ({"levels": []}, "study.levels must be a list of numbers above 0"),
        ({"share": 1}, "study.share must be shares above 0 and below 1"),
    ],
)
def test_settings_out_of_range_are_told(given, told):
    with pytest.raises(ConfigError, match=told):
        Noise(**given)
