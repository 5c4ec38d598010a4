"""Networks of the user's own code: loaded, recorded, built again, and refused in one sentence."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modhifi_cli.cli import main
from modhifi_cli.engine.plan import discover
from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError
from modhifi_cli.files import artifacts
from modhifi_cli.graph.law import Verdict
from modhifi_cli.models import build_architecture, module

CODE = Path(__file__).with_name("own_networks.py")
SIZE = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "size": 8}
TINY = {"layers": [1, 1], "growth": 4, "classes": 3}


@pytest.fixture(autouse=True)
def mine(tmp_path, monkeypatch):
    """The working folder is one in which the user's file lies; nothing of it stays imported."""
    shutil.copy(CODE, tmp_path / "mynets.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield
    for name in ("mynets", "broken", "wants"):
        sys.modules.pop(name, None)


def load(factory, **settings):
    return module.load(factory=f"mynets:{factory}", **{"preprocess": SIZE} | settings)


def test_the_description_builds_the_same_network():
    loaded = load("densenet", kwargs=TINY, classes=["a", "b", "c"])
    description = json.loads(json.dumps(loaded.architecture))
    rebuilt = build_architecture(description, allow="mynets:densenet")
    rebuilt.load_state_dict(loaded.model.state_dict())
    inputs = torch.randn(2, 3, 8, 8)
    with torch.inference_mode():
        assert torch.equal(rebuilt(inputs), loaded.model(inputs))
    assert loaded.name == "densenet" and loaded.classes == ("a", "b", "c")
    assert "mynets:densenet" in loaded.weights and "mynets.py, sha256 " in loaded.weights


def test_weights_come_from_the_factory_a_seed_or_a_file(tmp_path):
    own = load("always_the_same")
    import mynets

    assert torch.equal(own.model.first.weight, mynets._kept.first.weight)
    assert own.model is not mynets._kept, "an edit must not reach the user's object"
    first, again, other = (load("always_the_same", weights="random", seed=seed).model for seed in (1, 1, 2))
    assert torch.equal(first.first.weight, again.first.weight)
    assert not torch.equal(first.first.weight, other.first.weight)
    assert not torch.equal(first.first.weight, own.model.first.weight)
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "w.pt")
    save_file(other.state_dict(), tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        read = load("Small", weights=str(tmp_path / name))
        assert torch.equal(read.model.first.weight, other.first.weight)
        assert "sha256" in read.weights


def test_a_check_of_the_input_that_never_fires_is_no_decision():
    load("ChecksInput")


WRONG = {
    "no colon": ({"factory": "mynets.densenet"}, ConfigError, "expected package.module:function with a colon"),
    "no module": ({"factory": "mynet:densenet"}, ConfigError, "there is no module 'mynet', did you mean 'mynets'?"),
    "no package": ({"factory": "mine.mynets:f"}, ConfigError, "there is no module 'mine.mynets', "),
    "no function": ({"factory": "mynets:densnet"}, ConfigError, "mynets has no 'densnet', did you mean 'densenet'"),
    "no callable": ({"factory": "mynets:number"}, ConfigError, "expected a function or class .*, got a int"),
    "Python's own": ({"factory": "os:system"}, ConfigError, "os is part of Python itself and makes no networks"),
    "raises": ({"factory": "mynets:raises"}, ConfigError, "it failed with RuntimeError: no weights here; call it"),
    "no network": ({"factory": "mynets:gives_nothing"}, ConfigError, "expected a torch.nn.Module, got dict"),
    "kwargs": ({"kwargs": {"growht": 4}}, ConfigError, r"does not take \{'growht': 4\} .*; did you mean 'growth'"),
    "preprocess": ({"preprocess": {"mean": [0.5]}}, ConfigError, "std, size are missing, e.g. model.preprocess="),
    "channels": ({"preprocess": SIZE | {"mean": [0.5] * 4}}, ConfigError, "images have 1 or 3 channels, got 4"),
    "classes": ({"classes": ["cat"]}, ConfigError, "model.classes: expected 10 names, .* got 1"),
    "other inputs": (
        {"factory": "mynets:TakesMask"},
        UnsupportedModelError,
        r"forward needs other inputs than an image batch \(mask\); an adapter is missing",
    ),
    "other outputs": (
        {"factory": "mynets:GivesPair"},
        UnsupportedModelError,
        "GivesPair gives a tuple for 2 images, expected logits .* an adapter is missing",
    ),
    "control flow": (
        {"factory": "mynets:SkipsBright"},
        UnsupportedModelError,
        "forward of SkipsBright is dynamic: it takes the value of a tensor .* at mynets.py, line [0-9]+; it cannot be",
    ),
    "a count": ({"factory": "mynets:PicksLayer"}, UnsupportedModelError, "PicksLayer is dynamic: it takes the value"),
    "small images": (
        {"factory": "mynets:Large"},
        UnsupportedModelError,
        "images of 8×8 pixels are smaller than the network allows, set a larger model.preprocess.size",
    ),
    "grey images": (
        {"factory": "mynets:Small", "preprocess": {"mean": [0.5], "std": [0.5], "size": 8}},
        UnsupportedModelError,
        r"does not take an image batch of shape \(2, 1, 8, 8\): .*; give the size and the channels",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_sentence(case):
    settings, kind, words = WRONG[case]
    with pytest.raises(kind, match=words) as caught:
        module.load(**{"factory": "mynets:densenet", "preprocess": SIZE} | settings)
    assert "\n" not in str(caught.value)


def test_code_that_cannot_be_imported_says_why(tmp_path):
    (tmp_path / "broken.py").write_text("x = 1 / 0\n")
    (tmp_path / "wants.py").write_text("import a_library_nobody_has\n")
    with pytest.raises(ConfigError, match="importing broken failed with ZeroDivisionError: division by zero"):
        module.load(factory="broken:f", preprocess=SIZE)
    with pytest.raises(ConfigError, match="importing wants failed, No module named 'a_library_nobody_has'; install"):
        module.load(factory="wants:f", preprocess=SIZE)


def saved(folder):
    loaded = load("Small")
    artifacts.save_model(folder, loaded, loaded.model)
    return loaded


def test_a_saved_network_warns_when_its_code_has_changed(tmp_path, recwarn):
    loaded = saved(tmp_path / "model")
    again = artifacts.load_model(tmp_path / "model", allow="mynets:Small")
    assert not recwarn.list
    assert torch.equal(again.first.weight, loaded.model.first.weight)
    with (tmp_path / "mynets.py").open("a") as file:
        file.write("# a remark\n")
    with pytest.warns(UserWarning, match=r"code of mynets:Small .* has changed since the network was saved"):
        artifacts.load_model(tmp_path / "model", allow="mynets:Small")


def test_a_saved_network_without_its_code_says_what_is_missing(tmp_path, monkeypatch):
    saved(tmp_path / "model")
    sys.modules.pop("mynets")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    sys.path.remove(str(tmp_path))
    words = r"made by mynets:Small \(it was in mynets.py\).* no module 'mynets'.*PYTHONPATH"
    with pytest.raises(DataError, match=words):
        artifacts.load_model(tmp_path / "model", allow="mynets:Small")


def test_a_saved_network_runs_no_code_that_the_caller_did_not_name(tmp_path):
    saved(tmp_path / "model")
    sys.modules.pop("mynets")
    for allow in (False, "mynets:densenet", "mynets"):
        with pytest.raises(DataError, match=r'code named mynets:Small.*allow="mynets:Small"\) or model.trust=true'):
            artifacts.load_model(tmp_path / "model", allow=allow)
    assert "mynets" not in sys.modules, "refused code was imported"


@pytest.mark.parametrize("named", ["torch.serialization:os.system", "torch:load", "numpy.lib._utils_impl:os.system"])
def test_code_is_not_reached_through_what_another_module_imported(named):
    with pytest.raises(ConfigError, match="is not defined in"):
        module.exactly(named)


def test_tensors_shared_between_modules_are_left_alone():
    _, groups, refused = discover(load("Tied").model, torch.randn(2, 3, 8, 8))
    assert groups == ()
    assert {r.reason for r in refused} <= {
        "second and third share a tensor, so neither can be cut",
        "third and second share a tensor, so neither can be cut",
    }
    assert {r.name for r in refused} == {"first"}  # which they read and write, so that nothing is left


def test_code_that_mixes_channels_is_left_alone():
    _, groups, refused = discover(load("MixesChannels").model, torch.randn(2, 3, 8, 8))
    assert [group.name for group in groups] == ["first"] and [r.name for r in refused] == ["second"]


def test_a_group_that_fails_the_law_is_named_with_its_modules(monkeypatch):
    def unlawful(model, candidates, example, **_):
        return (), {ways[0].name: Verdict(0.25, 1.0) for ways in candidates}

    monkeypatch.setattr("modhifi_cli.engine.plan.lawful", unlawful)
    _, groups, refused = discover(load("Small").model, torch.randn(2, 3, 8, 8))
    assert groups == ()
    assert [(r.name, r.reason) for r in refused] == [
        (name, f"it fails the slicing law: sliced and zeroed logits differ by 2.5e-01 of their scale (modules {both})")
        for name, both in (("first", "first, second"), ("second", "second, head"))
    ]


def test_a_run_is_verified_and_replayed_through_the_same_factory(tmp_path, capsys):
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), dtype=np.uint8))
    words = ["model=module", "model.factory=mynets:densenet", "model.kwargs={layers: [1, 1], growth: 4, classes: 3}",
             "model.preprocess={mean: [0.5, 0.5, 0.5], std: [0.25, 0.25, 0.25], size: 8}"]  # fmt: skip
    data = ["data=arrays", "data.path=images.npz", "evaluation=[]", "check_data=false", "console=json"]
    assert main(["prune", *words, *data, "preset=fast", "sparsity=0.2"]) == 0
    said = capsys.readouterr().out
    assert "made by mynets:densenet (imported from " in said
    (run,) = (tmp_path / "outputs/prune/densenet").iterdir()
    kept = json.loads((run / "model/architecture.json").read_text())["kwargs"]
    assert kept["factory"] == "mynets:densenet" and len(kept["sha256"]) == 64
    assert main(["replay", f"run={run}", "console=json"]) == 2
    assert "names code of your own" in capsys.readouterr().err
    assert main(["replay", f"run={run}", "model.trust=true", "console=json"]) == 0
    assert '"equals_saved_model": true' in capsys.readouterr().out
    with (tmp_path / "mynets.py").open("a") as file:
        file.write("# a remark\n")
    assert main(["verify", f"run={run}", "console=json"]) == 2
    assert "made by code named mynets:densenet" in capsys.readouterr().err
    assert main(["verify", f"run={run}", "model.trust=true", "console=json"]) == 0, "in a fresh process that finds the file here"
    assert "code of mynets:densenet" in capsys.readouterr().out


CIFAR = {"mean": [0.49139968, 0.48215841, 0.44653091], "std": [0.24703223, 0.24348513, 0.26158784], "size": 32}
TRAINED = {"densenet": ("cifar10_densenet", 90.23, 84.0), "resnet": ("cifar10_resnet20_conv_shortcut", 91.06, 84.0)}


@pytest.mark.real
@pytest.mark.parametrize("name", TRAINED)
def test_trained_networks_keep_their_accuracy_and_most_of_it_without_30_percent_of_their_flops(name, test_data):
    from modhifi_cli.data import arrays
    from modhifi_cli.settings import config
    from tests.engine.test_prune import pruning

    file, top1, least = TRAINED[name]
    loaded = load(name, weights=str(test_data / f"weights/{file}.safetensors"), preprocess=CIFAR)

    def accuracy(model):
        with torch.inference_mode():
            right = [(model(x).argmax(1) == y).float() for x, y in tests.batches(250)]
        return 100 * float(torch.cat(right).mean())

    tests = arrays.load(
        path=str(test_data / "cifar10/test.npz"), preprocess=loaded.preprocess, labelled=True, num_samples=2000
    )
    assert accuracy(loaded.model) == pytest.approx(top1, abs=1.2), "2,000 of 10,000 images"
    calibration = arrays.load(
        path=str(test_data / "cifar10/train_10000.npz"), preprocess=loaded.preprocess, labelled=False, num_samples=256
    )
    settings = config.compose("prune", ["preset=best"])
    steps = ("scoring", "selection", "compensation", "allocation", "schedule")
    for event in pruning(
        loaded.model, calibration, sparsity=0.3, target="flops", batchnorm=settings["batchnorm"],
        classifier=settings["classifier"], batch_size=128, **{key: config.build(settings[key]) for key in steps},
    ):  # fmt: skip
        last = event
    assert last.achieved["flops"] == pytest.approx(0.3, abs=0.01)
    assert accuracy(loaded.model) > least
