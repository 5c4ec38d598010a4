"""Robustness: comparisons against scipy and by hand, sources of their own, and the errors."""

import pytest
from scipy.stats import spearmanr

from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.studies.robustness import Robustness
from tests.studies import helpers


def test_every_sample_is_compared_with_the_largest_of_the_first_seed(randomise_):
    about = helpers.subject(randomise_, seeds=(0, 1), sources=("other",))
    study = Robustness(sizes=(8, 40), sources=("other",))
    rows = helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))
    assert len(rows) == (2 * 2 + 1) * (10 + 12 + 10)
    outcome = study.conclude(rows)
    assert [(line["source"], line["size"], line["draws"]) for line in outcome.summary] == [
        ("calibration data", 8, 2), ("calibration data", 40, 1), ("other", 40, 1)
    ]  # fmt: skip

    def scores(source, size, seed, layer):
        wanted = (source, size, seed, layer)
        return [r["score"] for r in rows if (r["source"], r["size"], r["seed"], r["layer"]) == wanted]

    layers = ("3.conv1", "3.conv2", "6")
    other = [
        spearmanr(scores("calibration data", 40, 0, layer), scores("calibration data", 40, 1, layer)).statistic
        for layer in layers
    ]
    assert outcome.summary[1]["rank_correlation"] == pytest.approx(sorted(other)[1], abs=1e-6)
    assert outcome.summary[1]["lowest_rank_correlation"] == pytest.approx(min(other), abs=1e-6)
    assert len(outcome.findings) == 3
    helpers.assert_as_stored(outcome.charts)


def test_scores_of_a_part_are_those_of_its_first_images(randomise_):
    about = helpers.subject(randomise_)
    (row,) = [r for r in helpers.rows_of(Robustness(sizes=(16,)), about) if (r["layer"], r["component"]) == ("6", 4)]
    found, _ = helpers.finished(about.consumers(["6"], source=helpers.Images(16)))
    first = next(iter(about.draw("", 0).batches(16)))[0]
    assert len(first) == 16 and row["size"] == 16
    direct, _ = helpers.finished(about.consumers(["6"], source=about.draw("", 0), images=16))
    assert row["score"] == pytest.approx(float(about.scores(direct["6"])[4]))
    assert found["6"].statistics.rows == direct["6"].statistics.rows


def test_sizes_follow_from_the_calibration_data_where_nobody_gives_them(randomise_):
    assert [cell["size"] for cell in Robustness().cells(helpers.subject(randomise_))] == [8, 20, 40]


def test_what_cannot_be_compared_is_told(randomise_):
    with pytest.raises(ConfigError, match="study.sizes must be whole numbers of samples from 8, got .4."):
        Robustness(sizes=[4])
    with pytest.raises(ConfigError, match="study.keep must be shares above 0 and below 1"):
        Robustness(keep=0)
    with pytest.raises(DataError, match="robustness: scores need at least 8 images, got 5"):
        Robustness().cells(helpers.subject(randomise_, count=5))
    about = helpers.subject(randomise_)
    study = Robustness(sizes=(8, 64))
    with pytest.raises(DataError, match="random images: 64 images are asked for, there are 40; ask for fewer"):
        helpers.finished(study.compute(about, study.cells(about)[-1]))
