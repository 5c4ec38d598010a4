"""Lipschitz: both errors against two forwards by hand, the bound, and what enters normalisations."""

import copy
import math

import pytest
import torch
from torch import nn

from modhifi_cli.errors import ConfigError
from modhifi_cli.studies import lipschitz
from modhifi_cli.studies.lipschitz import Lipschitz
from tests.studies import helpers


def test_both_errors_are_those_of_two_forwards_and_stay_below_the_worst_case(randomise_):
    about = helpers.subject(randomise_)
    study = Lipschitz(share=0.2)
    rows = helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))
    worst = {row["layer"]: row["worst_case"] for row in rows if row["of"] == "worst case"}
    ratios = [row for row in rows if row["of"] == "ratio"]
    assert [row["layer"] for row in ratios] == ["3.conv1", "3.conv2", "6"]
    images = torch.cat([batch for batch, _ in about.calibration.batches(40)])
    for row in ratios:
        edited, outputs = copy.deepcopy(about.model), []
        scores, _ = helpers.finished(about.scores_of([row["layer"]]))
        with torch.no_grad():
            for component in scores[row["layer"]].argsort(stable=True)[: row["removed"]]:
                edited.get_submodule(row["layer"]).weight[:, component] = 0
            for model in (about.model, edited):
                handle = model.get_submodule(row["layer"]).register_forward_hook(lambda _, __, out: outputs.append(out))
                outputs.append(model(images))
                handle.remove()
        inside, logits = outputs[0] - outputs[2], outputs[1] - outputs[3]
        local, reached = (float(one.flatten(1).square().sum(1).mean()) for one in (inside, logits))
        assert row["local_error"] == pytest.approx(local, rel=1e-4)
        assert row["ratio"] == pytest.approx(reached / local, rel=1e-3)
        assert row["ratio_per_row"] == pytest.approx(row["ratio"] * row["rows_per_answer"])
        assert row["ratio"] <= worst[row["layer"]]
    outcome = study.conclude(rows)
    helpers.assert_as_stored(outcome.charts)
    assert len(outcome.findings) == 2


class Normed(nn.Module):
    """Two branches with normalisations on 12 features."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(192, 12), nn.LayerNorm(12)
        self.root, self.head = nn.RMSNorm(12), nn.Linear(12, 5)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        return self.head(self.root(x + torch.relu(self.norm(x))))


def test_norms_are_those_of_every_vector_that_enters(randomise_):
    torch.manual_seed(0)
    model = Normed().double().eval()
    model.norm.weight.data[3] = -2.5
    about = helpers.subject(randomise_, model=model, count=24)
    rows, _ = helpers.finished(Lipschitz().compute(about, {"of": "norms"}))
    assert [(row["layer"], row["kind"], row["vectors"]) for row in rows] == [("norm", "std", 24), ("root", "RMS", 24)]
    images = torch.cat([batch for batch, _ in about.calibration.batches(40)])
    with torch.no_grad():
        stem = model.stem(images.flatten(1))
        spread = stem.std(1, correction=0)
        size = (stem + torch.relu(model.norm(stem))).norm(dim=1)
    assert rows[0]["smallest"] == pytest.approx(float(spread.min()), rel=1e-5)
    assert rows[0]["constant"] == pytest.approx(2.5 / float(spread.min()), rel=1e-5)
    assert rows[1]["largest norm"] == pytest.approx(float(size.max()), rel=1e-5)
    found = Lipschitz().conclude(rows).findings
    assert "all between 0.2 and 60" in found[0].found


def test_a_layernorm_has_no_constant_from_the_weights_alone(randomise_):
    about = helpers.subject(randomise_, model=Normed().double().eval(), count=24)
    study = Lipschitz()
    rows, _ = helpers.finished(study.compute(about, {"of": "worst case"}))
    assert {row["layer"]: math.isinf(row["worst_case"]) for row in rows} == {"stem": True, "head": False}
    ratio, _ = helpers.finished(study.compute(about, {"of": "ratio", "layer": "stem"}))
    outcome = study.conclude([*ratio, *[row for row in rows if row["layer"] == "stem"]])
    assert "There is none" in outcome.findings[1].found and outcome.findings[1].holds is None


def test_maps_are_normalised_over_their_channels():
    class LayerNorm2d(nn.LayerNorm):
        pass

    maps = torch.randn(2, 6, 3, 3)
    found = lipschitz.entering(LayerNorm2d(6), maps)
    assert torch.allclose(found, maps.double().std(1, correction=0).flatten())


def test_a_share_out_of_range_is_told():
    with pytest.raises(ConfigError, match="study.share must be shares above 0 and below 1"):
        Lipschitz(share=1.5)
