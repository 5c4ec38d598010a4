"""A network that is larger than the card is measured all the same: its parts visit the card while they run."""

import pytest
import torch

from modhifi_cli.evaluation import generation, token_perplexity
from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.evaluation.visiting import fits, size_of
from tests.card import pretend
from tests.decoders import tiny, tokens

CARD = torch.device("cuda")


def measured(measure, model, device, **more):
    found = measure(
        models={"dense": model},
        evaluation_data=tokens(6, 12),
        calibration_data=None,
        example=torch.stack(list(tokens(1, 12).windows)),
        device=torch.device(device),
        batch_size=2,
        progress=lambda event: None,
        **more,
    )
    clocks = {one.protocol["clock"] for one in found if "clock" in one.protocol}
    assert clocks <= {"card" if device == "cuda" else "processor"}
    return {one.name: one.value for one in found}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_network_larger_than_the_card_has_the_perplexity_it_has_elsewhere(family):
    model = tiny(family)
    expected = measured(token_perplexity.measure, model, "cpu")
    before = {name: (id(tensor), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()}
    with pretend.card(memory=0.8 * size_of(model)) as seen:
        assert not fits(model, CARD)
        found = measured(token_perplexity.measure, model, "cuda")
        assert 0 < seen.peak < size_of(model)
    assert found == expected
    assert {
        name: (id(tensor), tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()
    } == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_generates_too():
    model = tiny("llama")
    with pretend.card(memory=0.8 * size_of(model)):
        found = measured(
            generation.measure,
            model,
            "cuda",
            prompt_tokens=4,
            new_tokens=3,
            sequences=1,
            warmup=1,
            rounds=2,
            max_seconds=5,
        )
    assert found and all(value > 0 for value in found.values())


def test_what_fits_lies_on_the_card_and_what_breaks_off_is_given_back():
    model = tiny("llama")
    with pretend.card(memory=100 * size_of(model)):
        with ready_to_measure({"dense": model}, CARD):
            assert all(parameter.is_cuda for parameter in model.parameters())
    with pretend.card(memory=0.8 * size_of(model)):
        with pytest.raises(RuntimeError, match="broke off"), ready_to_measure({"dense": model}, CARD):
            model(torch.zeros(1, 4, dtype=torch.int64, device="cuda"))
            raise RuntimeError("broke off")
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())
