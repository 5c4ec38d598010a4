"""Studies of a language model: which layers, how answers are compared, and which study does not apply."""

import copy

import pytest
import torch

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.studies.ablation import Ablation
from modhifi_cli.studies.counterfactual import Counterfactual
from modhifi_cli.studies.existence import Existence
from modhifi_cli.studies.lipschitz import Lipschitz
from modhifi_cli.studies.noise import Noise
from modhifi_cli.studies.robustness import Robustness
from modhifi_cli.studies.subject import Subject
from tests.decoders import tiny, tokens
from tests.studies import helpers


def subject(count=40, **given):
    windows = tokens(count, 12)
    model = tiny("llama")
    return Subject(
        model=model, calibration=windows, evaluation=None, example=next(iter(windows.batches(2)))[0],
        untrained=lambda: tiny("llama"), draw=lambda source, seed: tokens(count, 12, seed), batch_size=16, **given,
    )  # fmt: skip


def test_the_layers_are_what_reads_the_hidden_neurons_where_nobody_chose():
    about = subject()
    assert about.layers(None) and all(name.endswith("mlp.down_proj") for name in about.layers(None))
    assert "lm_head" in about.eligible and len(about.eligible) > len(about.layers(None))
    assert subject(asked=("lm_head",)).layers() == ("lm_head",)
    assert subject(asked="last 2").layers() == about.eligible[-2:]
    with pytest.raises(ConfigError, match="layers='last 0' must be 'last N' with N from 1 to"):
        subject(asked="last 0").layers()


def test_rows_of_statistics_are_tokens_and_scores_their_energies():
    about = subject(count=8)
    (name, *_) = about.layers(None)
    found, _ = helpers.finished(about.consumers([name]))
    seen = []
    handle = about.model.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for ids, _ in about.calibration.batches(8):
        about.model(input_ids=ids)
    handle.remove()
    rows = seen[0].flatten(0, 1).double()
    assert found[name].statistics.rows == len(rows) == 8 * 12
    moment = found[name].statistics.second_moment
    ours = found[name].statistics.samples.double().T @ found[name].statistics.samples.double() / len(rows) if (
        moment is None
    ) else moment  # fmt: skip
    assert torch.allclose(ours, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-6)
    assert not found[name].centred


def test_quality_is_the_share_of_next_tokens_that_stay():
    about = subject(count=8)
    edited = copy.deepcopy(about.model)
    with torch.no_grad():
        edited.get_submodule(about.layers(None)[0]).weight.mul_(-3)
    same = total = 0
    for ids, _ in about.calibration.batches(3):
        one, other = (model(input_ids=ids).logits.argmax(-1) for model in (about.model, edited))
        same, total = same + int((one == other).sum()), total + one.numel()
    dense, _ = helpers.finished(about.quality(about.model))
    quality, _ = helpers.finished(about.quality(edited))
    assert dense == 100 and quality == pytest.approx(100 * same / total) and "next tokens" in about.quality_label


@pytest.mark.parametrize(
    "study",
    [Counterfactual(shares=(0.3,)), Noise(levels=(0.05,)), Robustness(), Lipschitz(), Existence(subsets=5, outputs=3)],
    ids=lambda study: type(study).__name__,
)
def test_studies_take_a_language_model_and_leave_it_as_it_was(study):
    about = subject()
    rows = helpers.unchanged(about.model, lambda: helpers.rows_of(study, about))
    outcome = study.conclude(rows)
    assert outcome.charts and outcome.findings


def test_the_study_that_does_not_apply_says_which_do():
    with pytest.raises(UnsupportedModelError, match="ablation: a language model has no BatchNorm .* apply: existence"):
        Ablation().cells(subject())
    with pytest.raises(ConfigError, match="study.sources are for networks that read images"):
        Robustness(sources=("more.txt",)).cells(subject())
    with pytest.raises(DataError, match="noise: scores need at least 8 windows of text, got 5; raise data.sequences"):
        Noise().cells(subject(count=5))
