import pytest
import torch

from modhifi_cli.data import generated
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError, DataError
from modhifi_cli.files import cache
from modhifi_cli.records import Preprocess, TextInput
from tests.decoders import tiny


def text(bos=0) -> TextInput:
    return TextInput(tokenizer=None, vocabulary=64, max_length=64, bos=bos)


def load(model, *, bos=0, **settings):
    making = Making(model, "tiny", store=cache.open_store, progress=settings.pop("progress", lambda step: None))
    settings = {"sequences": 5, "length": 12} | settings
    return generated.load(preprocess=text(bos), labelled=False, making=making, **settings)


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def test_sequences_begin_as_asked_and_are_seeded(llama):
    windows = load(llama).windows
    assert len(windows) == 5 and all(window.shape == (12,) and window[0] == 0 for window in windows)
    assert load(llama).text == text()  # zero-shot tasks take the tokenizer from there
    assert all(torch.equal(a, b) for a, b in zip(windows, load(llama, cache=None).windows))
    assert not torch.equal(windows[0], load(llama, seed=1).windows[0])
    assert len({int(window[0]) for window in load(llama, bos=None, start="random").windows}) > 2


def test_sampling_follows_the_network_and_its_temperature(llama):
    """Against a walk without a cache: at a low temperature every token is the most likely one."""
    for window in load(llama, temperatures=[0.001], start="bos", sequences=1, distinct=0.0).windows:
        with torch.no_grad():
            likely = llama(window[None]).logits[0].argmax(1)
        assert torch.equal(window[1:], likely[:-1])


def test_the_parts_of_an_interrupted_set_are_kept(llama):
    def stop(step):
        if step.done > 12 + 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load(llama, sequences=20, progress=stop)
    steps = []
    resumed = load(llama, sequences=20, progress=steps.append)
    assert len(steps) == 11, "only the second part"
    assert [w.tolist() for w in resumed.windows] == [w.tolist() for w in load(llama, sequences=20, cache=None).windows]


def test_loops_and_copies_are_left_out(llama):
    assert generated.variety(torch.tensor([5, 6] * 20)) < 0.1
    assert generated.variety(torch.arange(40)) == 1
    # The most likely continuation is the same for every sequence that begins in the same way.
    with pytest.raises(DataError, match="64 sequences sampled .* copies, and 5 others were asked for; lower"):
        load(llama, temperatures=[0.001], start="bos", distinct=0.0)


WRONG = {
    "a vocabulary without beginning": ({"start": "bos", "bos": None}, "data.start=bos: the vocabulary has no token"),
    "too long": ({"length": 65}, "data.length=65: the network was made for at most 64 tokens"),
    "no temperature": ({"temperatures": []}, "data.temperatures: expected a list of numbers above 0"),
    "a cold temperature": ({"temperatures": [0]}, "data.temperatures: expected a list of numbers above 0"),
    "another start": ({"start": "eos"}, "data.start: expected one of auto, bos, random, got 'eos'"),
    "no sequences": ({"sequences": 0}, "data.sequences: expected a whole number from 1, or auto, got 0"),
    "a share above 1": ({"distinct": 2}, "data.distinct: expected a share from 0 to 1, got 2"),
}


@pytest.mark.parametrize(("settings", "words"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_in_one_sentence(llama, settings, words):
    with pytest.raises(ConfigError, match=words):
        load(llama, **settings)


def test_networks_that_read_images_are_told_what_suits():
    with pytest.raises(ConfigError, match="this network reads images; choose data=inversion or data=procedural"):
        generated.load(
            preprocess=Preprocess((8, 8), (0.5,), (0.5,)), labelled=False, making=Making(torch.nn.Identity())
        )
