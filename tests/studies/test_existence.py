"""Existence: sizes against brute force over subsets, and the errors."""

import itertools

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.numerics.contributions import similarity
from modhifi_cli.numerics.fidelity import subset_fidelity
from modhifi_cli.studies.existence import Existence
from tests.studies import helpers


@pytest.fixture
def rows(randomise_):
    about = helpers.subject(randomise_)
    study = Existence(subsets=400, outputs=None)
    return about, study, helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))


def test_every_size_of_every_layer_has_a_row_and_figures_are_as_stored(rows):
    about, study, found = rows
    assert len(found) == 2 * (10 + 12 + 10)
    outcome = study.conclude(found)
    helpers.assert_as_stored(outcome.charts)
    assert len(outcome.findings) == 3 and len(outcome.summary) == 6


def test_random_subsets_stay_below_the_best_there_is_and_come_near(rows):
    about, _, found = rows
    consumers, _ = helpers.finished(about.consumers(["6"]))
    gram = similarity(consumers["6"])
    energy = gram.sum((1, 2))
    for kept in (1, 2, 9):
        best = max(
            float((subset_fidelity(gram, torch.tensor(chosen)) * energy).sum() / energy.sum())
            for chosen in itertools.combinations(range(10), kept)
        )
        row = next(r for r in found if (r["layer"], r["weights"], r["kept"]) == ("6", "trained", kept))
        assert best - 0.02 <= row["random_best"] <= best + 1e-6
        assert row["random_best"] <= row["own_random_best"] + 1e-9
        assert row["random_mean"] <= row["random_best"]
        for key in ("top_k", "greedy"):
            assert row[key] <= best + 1e-6


def test_all_components_rebuild_everything(rows):
    for row in rows[2]:
        if row["kept"] == row["components"]:
            for key in ("random_best", "top_k", "greedy", "own_top_k", "own_random_best", "joint_greedy"):
                assert row[key] == pytest.approx(1, abs=1e-6), key


def test_some_outputs_stand_for_all(randomise_):
    about = helpers.subject(randomise_, asked=("3.conv1",))
    some = helpers.rows_of(Existence(subsets=5, outputs=4, untrained=False), about)
    assert {row["outputs"] for row in some} == {4} and {row["weights"] for row in some} == {"trained"}


def test_too_few_images_are_told(randomise_):
    with pytest.raises(DataError, match="existence: fidelity needs at least 32 images, got 31; raise data.num_samples"):
        Existence().cells(helpers.subject(randomise_, count=31))


def test_fewer_rows_than_features_are_told(randomise_):
    wide = helpers.subject(randomise_, count=32, model=_flat().double().eval(), asked=("1",))
    with pytest.raises(DataError, match="1: fidelity needs more rows than its 192 features, got 32"):
        helpers.rows_of(Existence(subsets=3, untrained=False), wide)


@pytest.mark.parametrize("given", [{"subsets": 0}, {"subsets": 1.5}, {"outputs": 0}])
def test_settings_out_of_range_are_told(given):
    with pytest.raises(ConfigError, match="study.subsets and study.outputs must be whole numbers from 1"):
        Existence(**given)


def _flat():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 5))
