"""Counterfactual: every row against a network with the same weights set to zero by hand."""

import copy

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.studies.counterfactual import Counterfactual
from tests.studies import helpers


def accuracy(model, source):
    right = total = 0
    for images, labels in source.batches(7):
        right += int((model(images).argmax(1) == labels).sum())
        total += len(labels)
    return 100 * right / total


def test_rows_are_what_a_network_without_those_components_answers(randomise_):
    about = helpers.subject(randomise_, seeds=(0, 1))
    study = Counterfactual(shares=(0.3,))
    rows = helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))
    assert [(row["removed"], row["seed"]) for row in rows] == [
        ("nothing", 0), ("top", 0), ("random", 0), ("random", 1), ("bottom", 0)
    ]  # fmt: skip
    scores, _ = helpers.finished(about.scores_of(about.layers(None)))
    assert set(scores) == {"3.conv1", "3.conv2", "6"}
    for row in rows:
        if row["removed"] in ("nothing", "top", "bottom"):
            model = copy.deepcopy(about.model)
            for layer, values in scores.items():
                count = 0 if row["removed"] == "nothing" else round(0.3 * len(values))
                ranked = sorted(range(len(values)), key=lambda i: float(values[i]), reverse=row["removed"] == "top")
                with torch.no_grad():
                    for component in ranked[:count]:
                        model.get_submodule(layer).weight[:, component] *= 0
            assert row["quality"] == pytest.approx(accuracy(model, about.evaluation)), row
    assert {row["components_removed"] for row in rows} == {0, 3 + 4 + 3}


def test_without_labels_the_dense_answers_are_the_measure(randomise_):
    rows = helpers.rows_of(Counterfactual(shares=(0.5,)), helpers.subject(randomise_, labelled=False))
    assert rows[0]["quality"] == 100 and "agreement" in rows[0]["unit"]


def test_losses_and_the_figure_follow_from_the_rows():
    rows = [{"removed": "nothing", "share": 0.0, "seed": 0, "layers": 3, "quality": 90.0, "unit": "top-1, %"}]
    for choice, values in {"top": [20.0], "random": [60.0, 64.0], "bottom": [89.0]}.items():
        rows += [
            {"removed": choice, "share": 0.22, "seed": seed, "layers": 3, "quality": value, "unit": "top-1, %"}
            for seed, value in enumerate(values)
        ]
    outcome = Counterfactual(shares=(0.22,)).conclude(rows)
    (finding,) = outcome.findings
    assert finding.holds and "22 %: 70.0 / 28.0 / 1.0." in finding.found
    assert {line["removed"]: line["draws"] for line in outcome.summary} == {
        "highest scores": 1, "random": 2, "lowest scores": 1
    }  # fmt: skip
    helpers.assert_as_stored(outcome.charts)


@pytest.mark.parametrize("shares", [[], [0], [1.0], ["a"], 1])
def test_shares_out_of_range_are_told(shares):
    with pytest.raises(ConfigError, match="study.shares must be shares above 0 and below 1"):
        Counterfactual(shares=shares)


def test_too_few_images_are_told(randomise_):
    with pytest.raises(DataError, match="counterfactual: scores need at least 8 images, got 7; raise data.num_samples"):
        Counterfactual().cells(helpers.subject(randomise_, count=7))
