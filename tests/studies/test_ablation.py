"""Ablation: every arm is the pruning run it says, crossings by hand, and the errors."""

import copy
import functools

import pytest
from torch import nn

from modhifi_cli.engine.gathering import Gathering
from modhifi_cli.engine.plan import Summary
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.numerics.allocation import Uniform
from modhifi_cli.numerics.compensation import NoCompensation, PerKernel
from modhifi_cli.numerics.schedule import geometric
from modhifi_cli.numerics.scoring import Singleton
from modhifi_cli.numerics.selection import Union
from modhifi_cli.studies.ablation import Ablation
from tests.engine.test_prune import pruning
from tests.studies import helpers

STEPS = {
    "scoring": Singleton(), "selection": Union(), "compensation": PerKernel(), "allocation": Uniform(),
    "statistics": Gathering(), "target": "params", "round_to": 1, "block": 1,
}  # fmt: skip


def test_arms_are_runs_with_the_repair_and_the_statistics_on_and_off(randomise_):
    about = helpers.subject(randomise_, steps=STEPS, count=40)
    study = Ablation(shares=(0.3,))
    rows = helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))
    assert [row["arm"] for row in rows] == ["dense", "both", "repair alone", "BatchNorm alone", "neither"]
    for row, compensation, batchnorm in zip(
        rows[1:], (PerKernel(), PerKernel(), NoCompensation(), NoCompensation()), 2 * ("reestimate", "stored"),
        strict=True,
    ):  # fmt: skip
        model = copy.deepcopy(about.model)
        steps = STEPS | {"compensation": compensation, "gathering": STEPS["statistics"]}
        for key in ("statistics", "block"):
            del steps[key]
        events = list(
            pruning(
                model, about.draw("", 0), sparsity=0.3, batchnorm=batchnorm, batch_size=16,
                schedule=functools.partial(geometric, iterations=1), **steps,
            )
        )  # fmt: skip
        (summary,) = [event for event in events if isinstance(event, Summary)]
        assert row["achieved"] == summary.achieved["params"] > 0.2
        quality, _ = helpers.finished(about.quality(model))
        assert row["quality"] == quality, row["arm"]


def test_sparsities_at_equal_accuracy_follow_from_the_rows():
    rows = [{"arm": "dense", "share": 0.0, "seed": 0, "quality": 90.0, "achieved": 0.0, "unit": "%", "target": "flops"}]
    for arm, values in {
        "both": (88.0, 70.0), "repair alone": (85.0, 40.0), "BatchNorm alone": (80.0, 60.0), "neither": (70.0, 10.0)
    }.items():  # fmt: skip
        rows += [
            {"arm": arm, "share": share, "seed": 0, "quality": value, "achieved": share, "unit": "%", "target": "flops"}
            for share, value in zip((0.2, 0.4), values, strict=True)
        ]
    outcome = Ablation(drop=10).conclude(rows)
    (finding,) = outcome.findings
    # both: 20 % + 20 % · 8/18; repair alone: 20 % + 20 % · 5/45; BatchNorm alone: 20 %; neither: 20 % · 10/20
    assert (
        "both 28.9 % (1.41×); repair alone 22.2 % (1.29×); BatchNorm alone 20.0 % (1.25×); neither 10.0 %"
        in finding.found
    )
    assert finding.holds
    helpers.assert_as_stored(outcome.charts)


def test_what_it_does_not_apply_to_is_told_with_what_does(randomise_):
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    about = helpers.subject(randomise_, model=plain.double().eval(), steps=STEPS)
    told = "ablation: the network has no BatchNorm, so there is nothing to switch off; studies that apply: exist"
    with pytest.raises(UnsupportedModelError, match=told):
        Ablation().cells(about)
    with pytest.raises(DataError, match="ablation: scores need at least 32 images, got 31"):
        Ablation().cells(helpers.subject(randomise_, steps=STEPS, count=31))
    with pytest.raises(ConfigError, match="ablation: target must be params, flops or components, got latency"):
        Ablation().cells(helpers.subject(randomise_, steps=STEPS | {"target": "latency"}))
    with pytest.raises(ConfigError, match="ablation prunes the whole network; leave out layers="):
        Ablation().cells(helpers.subject(randomise_, steps=STEPS, asked=("6",)))


@pytest.mark.parametrize("given", [{"shares": [1.2]}, {"drop": 0}])
def test_settings_out_of_range_are_told(given):
    with pytest.raises(ConfigError, match="study.shares must be shares|study.drop must be a number of points"):
        Ablation(**given)
