"""Networks of the user's own that read something else than images: model.example, model.forward, data=batches."""

import json

import pytest
import torch

from modhifi_cli.cli import main
from modhifi_cli.files import artifacts

CODE = '''
import torch
from torch import nn


class Towers(nn.Module):
    def __init__(self, count=50):
        super().__init__()
        torch.manual_seed(0)
        self.seen = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.words, self.read, self.head = nn.Embedding(count, 8), nn.Linear(8, 24), nn.Linear(40, 4)

    def forward(self, image, words):
        return self.head(torch.cat([self.seen(image).mean((2, 3)), self.read(self.words(words).mean(1)).relu()], 1))


def batches():
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        image, words = torch.randn(16, 3, 12, 12, generator=draw), torch.randint(0, 50, (16, 5), generator=draw)
        yield {"image": image, "words": words, "label": torch.arange(16) % 4}


def example():
    return next(batches())


def far_example():
    return {**example(), "words": torch.arange(290, 300).view(2, 5).repeat(8, 1)}


def pairs():
    for batch in batches():
        yield batch["image"], batch["label"], ["path"] * 16


def named_images():
    for batch in batches():
        yield {"pixel_values": batch["image"], "label": batch["label"], "path": ["path"] * 16}


def unnamed_images():
    for batch in batches():
        yield {"a": batch["image"], "b": batch["image"]}


def swapped():
    for batch in batches():
        yield batch["words"], batch["image"]


def swapped_example():
    return next(swapped())


def swap(model, batch):
    return {"answer": [model(batch[1], batch[0])]}


def sound():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 16, 9, 4), nn.ReLU(), nn.Conv1d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1),
                         nn.Flatten(), nn.Linear(16, 4))


def waves():
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(48, 1, 64, generator=draw)]


def wave():
    return waves()[0][:2]


def doubled(model, images):
    return 2 * model(images)[0]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.head = nn.Linear(16, 4)

    def forward(self, images):
        maps = self.body(images)
        return self.head(maps.mean((2, 3))), maps


def nothing():
    return 3


def broken():
    raise ValueError("no disk")
'''


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    name = f"nets_{abs(hash(str(tmp_path))) % 10**9}"  # imported once for each test
    (tmp_path / f"{name}.py").write_text(CODE)
    return name


def run(*words: str) -> int:
    return main([*words, "console=plain"])


def pruned(words):
    assert run("prune", "model=module", "sparsity=0.25", "target=params", "preset=fast", "evaluation=[size]",
               "evaluation_data=none", *words) == 0  # fmt: skip
    from pathlib import Path

    (folder,) = Path("outputs/prune").glob("*/*")
    assert run("verify", f"run={folder}", "model.trust=true") == 0
    return folder


@pytest.mark.parametrize("kind", ["names", "function", "sound"])
def test_what_is_no_image_prunes_verifies_and_is_read_back_from_the_command_line(kind, place):
    chosen = {
        "names": ("Towers", "example", "batches", None),
        "function": ("Towers", "swapped_example", "swapped", "swap"),
        "sound": ("sound", "wave", "waves", None),
    }[kind]
    factory, example, data, forward = chosen
    words = [f"model.factory={place}:{factory}", f"model.example={place}:{example}", "data=batches",
             f"data.factory={place}:{data}", *([f"model.forward={place}:{forward}"] if forward else [])]  # fmt: skip
    folder = pruned(words)
    results = json.loads((folder / "results.json").read_text())
    assert results["achieved"]["params"] > 0.1
    model = artifacts.load_model(folder, allow=f"{place}:{factory}")
    network = model.network
    import importlib

    code = importlib.import_module(place)
    given = getattr(code, example)()
    if kind == "names":
        direct = network(given["image"], given["words"])
    elif kind == "function":
        direct = network(given[1], given[0])
    else:
        direct = network(given)
    assert torch.equal(model(model.packed(given)[0]), direct)


def test_a_function_of_model_and_images_says_what_of_the_answer_counts(place):
    preprocess = "model.preprocess={mean: [0, 0, 0], std: [1, 1, 1], size: 12}"
    words = [f"model.factory={place}:Pair", f"model.forward={place}:doubled", preprocess, "data=batches",
             f"data.factory={place}:pairs"]  # fmt: skip
    folder = pruned(words)
    model = artifacts.load_model(folder, allow=f"{place}:Pair")
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(images), 2 * model.network(images)[0])


def test_batches_without_the_labels_that_a_measurement_needs_are_one_sentence(place, capsys):
    assert run("evaluate", "model=module", f"model.factory={place}:sound", f"model.example={place}:wave",
               "evaluation_data=batches", f"evaluation_data.factory={place}:waves", "evaluation=[top1]") == 2  # fmt: skip
    text = " ".join(capsys.readouterr().err.split())
    assert f"evaluation_data: {place}:waves gives no labels; give pairs of inputs and labels, or a key 'label'" in text


def test_dictionaries_of_images_are_read_at_the_usual_names(place, capsys):
    preprocess = "model.preprocess={mean: [0, 0, 0], std: [1, 1, 1], size: 12}"
    words = ["model=module", f"model.factory={place}:Pair", f"model.forward={place}:doubled", preprocess,
             "evaluation_data=batches", "evaluation=[top1]"]  # fmt: skip
    assert run("evaluate", *words, f"evaluation_data.factory={place}:named_images") == 0
    assert run("evaluate", *words, f"evaluation_data.factory={place}:unnamed_images") == 2
    text = " ".join(capsys.readouterr().err.split())
    assert "batches: it is not clear which of a, b the network reads; name it (inputs=)" in text


def test_labels_of_batches_are_read_where_a_measurement_needs_them(place):
    assert run("evaluate", "model=module", f"model.factory={place}:Towers", f"model.example={place}:example",
               "evaluation_data=batches", f"evaluation_data.factory={place}:batches", "evaluation=[top1]") == 0  # fmt: skip


@pytest.mark.parametrize("words, told", [
    (["model.example=NAME:nothing"], "it holds|expected tensors with one entry for each sample"),
    (["model.example=NAME:broken"], "failed with ValueError: no disk; it is called without arguments and returns one batch"),
    (["model.example=NAME:lost"], "has no 'lost'"),
    (["model.example=NAME:example", "data.factory=NAME:broken"], "data.factory=.* failed with ValueError: no disk"),
    (["model.example=NAME:example", "data.factory=NAME:nothing"], "expected batches one after the other, got a int"),
    (["model.example=NAME:example", "data.factory=NAME:swapped"], "expected dictionaries with image, words as in the first batch, got tuple"),
])  # fmt: skip
def test_what_is_wrong_with_an_example_or_with_batches_is_one_sentence(words, told, place, capsys):
    import re

    known = {"data.factory": f"data.factory={place}:batches"}
    said = [word.replace("NAME", place) for word in words]
    every = [*said, *(word for key, word in known.items() if not any(one.startswith(key) for one in said))]
    assert run("prune", "model=module", f"model.factory={place}:Towers", "data=batches", "evaluation=[size]",
               "evaluation_data=none", *every) == 2  # fmt: skip
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(told, text) and "Traceback" not in text


@pytest.mark.parametrize("dtype, highest", [("bfloat16", 256), ("float16", 2048)])
def test_ids_that_a_precision_does_not_tell_apart_are_refused(dtype, highest):
    from modhifi_cli.errors import ConfigError
    from modhifi_cli.models.called import Sent

    def sent(largest):
        return Sent(torch.nn.Identity(), (torch.zeros(2, 3), torch.tensor([[0], [largest]])), lambda model, batch: batch)

    sent(highest).refuse(getattr(torch, dtype))
    with pytest.raises(ConfigError, match=f"up to {highest + 1}, and {dtype} tells only those up to {highest} apart"):
        sent(highest + 1).refuse(getattr(torch, dtype))


def test_a_run_in_a_precision_that_would_round_ids_is_refused(place, capsys):
    assert run("prune", "model=module", f"model.factory={place}:Towers", "model.kwargs={count: 300}", "data=batches",
               f"model.example={place}:far_example", f"data.factory={place}:batches", "evaluation=[size]",
               "evaluation_data=none", "runtime.dtype=bfloat16") == 2  # fmt: skip
    text = " ".join(capsys.readouterr().err.split())
    assert "runtime.dtype=bfloat16: the network reads whole numbers up to 299, and bfloat16 tells only those up to 256" in text


def test_a_folder_cannot_name_code_of_another_module_than_the_one_that_was_allowed(place):
    from modhifi_cli.errors import DataError
    from modhifi_cli.models import module

    with pytest.raises(DataError, match="also runs code named json:dumps, of another module than"):
        module.build(factory=f"{place}:Towers", forward="json:dumps", allow=f"{place}:Towers")
