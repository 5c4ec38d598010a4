"""A finished run as the beginning of another: pruned, measured and exported again, by short names, with other weights."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import modhifi_cli
from modhifi_cli.cli import main
from modhifi_cli.files import artifacts, earlier_run
from tests.decoders import saved
from tests.tasks import stranger

FAST = ["preset=fast", "evaluation=[size]", "console=plain", "data.num_samples=64"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in which the embedded network was pruned once."""
    folder = tmp_path_factory.mktemp("again")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert main(["prune", *FAST, "sparsity=0.3"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)
    return home


def runs(home, verb="prune"):
    return sorted((home / "outputs" / verb).glob("*/*"), key=lambda path: path.name)


def test_a_pruned_network_is_pruned_again_and_measured_by_its_short_name(home, capsys):
    first = runs(home)[0]
    assert main(["prune", "model=run", f"model.run={first.name[:15]}", "data=digits", *FAST, "sparsity=0.2"]) == 0
    second = runs(home)[-1]
    sizes = [sum(p.numel() for p in modhifi_cli.load_model(run).parameters()) for run in (first, second)]
    assert sizes[1] < 0.85 * sizes[0]
    said = capsys.readouterr().out
    assert "load it with:" in said and f"modhifi_cli.load_model('{os.path.relpath(second, home)}')" in said
    assert f"network of run {first.name}" in artifacts.read_results(second)["weights"]
    assert main(["verify", "run=last", "console=plain"]) == 0
    assert main(["evaluate", "model=run", "model.run=last", "evaluation=[size]", "console=plain"]) == 0
    page = (second / "report.html").read_text()
    assert "modhifi_cli.load_model" in page and ".incomplete" not in page


def test_fine_tuned_weights_go_on_top_of_a_run(home, tmp_path, capsys):
    first = runs(home)[0]
    state = load_file(first / "model" / "weights.safetensors")
    name = next(key for key, tensor in state.items() if tensor.dim() == 4)
    save_file({key: tensor * 1.5 if key == name else tensor for key, tensor in state.items()}, tmp_path / "tuned.safetensors")
    tuned = earlier_run.load(str(first), weights=str(tmp_path / "tuned.safetensors"))
    assert torch.equal(tuned.model.state_dict()[name], state[name] * 1.5) and "tuned.safetensors" in tuned.weights
    again = ["model=run", f"model.run={first}", "evaluation=[size]", "console=plain"]
    assert main(["evaluate", *again, f"model.weights={tmp_path / 'tuned.safetensors'}"]) == 0
    words = ["model=run", f"model.run={first}", f"model.weights={tmp_path / 'absent.pt'}", "evaluation=[size]"]
    assert main(["evaluate", *words]) == 2
    assert "absent.pt" in capsys.readouterr().err


def test_weights_trained_in_place_are_other_weights_and_can_be_named(home, tmp_path, capsys):
    copied = Path(shutil.copytree(runs(home)[0], tmp_path / "copied"))
    file = copied / "model" / "weights.safetensors"
    trained = {key: tensor * 1.5 if tensor.dim() == 4 else tensor for key, tensor in load_file(file).items()}
    save_file(trained, file)
    assert main(["verify", f"run={copied}", "console=plain"]) == 2
    error = capsys.readouterr().err
    assert "holds other weights than were saved" in error and "damaged" not in error and error.count("\n") == 1
    assert f"model.weights={file}" in error
    words = ["evaluate", "model=run", f"model.run={copied}", "evaluation=[size]", "console=plain"]
    assert main(words) == 2
    assert main([*words, f"model.weights={file}"]) == 0
    assert main(["export", f"run={copied}", "export=[torch_export]", f"weights={file}", "console=plain"]) == 0
    key = next(key for key, tensor in trained.items() if tensor.dim() == 4)
    assert torch.equal(earlier_run.load(str(copied), weights=str(file)).model.state_dict()[key], trained[key])


def test_export_afterwards_and_a_stranger_opens_the_folder(home, tmp_path, capsys):
    first = runs(home)[0]
    assert main(["export", f"run={first}", "export=[plain,onnx]", "console=plain"]) == 0
    assert "checked with" in capsys.readouterr().out
    made = artifacts.read_results(first)["exports"]
    assert [row["format"] for row in made] == ["plain", "onnx"] and made[0]["bytes"] > 1000
    assert main(["export", f"run={first}", "export=[plain]", "console=plain"]) == 0
    assert sorted(row["format"] for row in artifacts.read_results(first)["exports"]) == ["onnx", "plain"]
    stored = load_file(first / "verification.safetensors")
    script = (
        "sys.path.insert(0, sys.argv[1])\n"
        "from network import load, prepare, ABOUT\n"
        "from safetensors.torch import load_file, save_file\n"
        "import torch\n"
        "x = load_file(sys.argv[2])['inputs']\n"
        "c, h, w = x.shape[1:]\n"
        "assert prepare(torch.zeros(2, h, w, c, dtype=torch.uint8)).shape == (2, c, h, w)\n"
        "save_file({'logits': load()(x).contiguous()}, sys.argv[3])\n"
    )
    read = (first / "export" / "network", first / "verification.safetensors")
    stranger(script, *read, tmp_path / "out", folder=tmp_path)
    torch.testing.assert_close(load_file(tmp_path / "out")["logits"], stored["logits"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words, said", [
    (["export", "run=last"], "say which formats, such as export=[onnx]; there are gguf"),
    (["export", "run=last", "export=[gguf]"], "is for language models, and this network reads images"),
    (["export", "run=nothing", "export=[onnx]"], "run=nothing: no such folder, and no run under outputs begins so"),
    (["push", "run=last", "repo=name"], "repo=name: expected USER/NAME"),
])  # fmt: skip
def test_mistakes_are_one_sentence(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_run_further_back_than_there_are_is_told_how_many_there_are(home, capsys):
    there = len(runs(home))
    assert main(["prune", "model=run", "model.run=last-99"]) == 2
    told = "is one finished run" if there == 1 else f"are {there} finished runs"
    assert f"model.run=last-99: there {told} with a network under outputs; give a folder" in capsys.readouterr().err


def test_an_interrupted_run_is_no_beginning(home, capsys):
    folder = home / "outputs" / "prune" / "embedded" / "20990101-000000-1_x.incomplete"
    folder.mkdir()
    try:
        assert main(["export", "run=20990101", "export=[onnx]"]) == 2
        assert "this run was ended before anything was saved; start it again" in capsys.readouterr().err
    finally:
        folder.rmdir()


def test_a_pruned_decoder_is_pruned_again_and_written_as_gguf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "dense")
    (tmp_path / "dense" / "README.md").write_text("---\ntags: [a]\nlicense: apache-2.0\n---\n# A network\n")
    from tests.evaluation.test_language import TEXT

    (tmp_path / "text.txt").write_text(TEXT)
    text = ["data=text", "data.path=text.txt", "data.sequences=8", "data.length=20", "evaluation=[]", "console=plain"]
    assert main(["prune", "model=hf", "model.path=dense", *text, "sparsity=0.2", "preset=best_uneven"]) == 0
    assert main(["prune", "model=run", "model.run=last", *text, "sparsity=0.2", "preset=best_uneven"]) == 0
    first, second = runs(tmp_path)
    sizes = [sum(p.numel() for p in modhifi_cli.load_model(run).parameters()) for run in (first, second)]
    assert sizes[1] < sizes[0]
    assert main(["export", "run=last", "export=[gguf]", "export.gguf.vocabulary=none", "console=plain"]) == 0
    assert (second / "export" / "model.gguf").is_file()
    card = (second / "model" / "README.md").read_text()
    assert "trust_remote_code=True" in card and str(tmp_path) not in card and "Licence:" in card
    assert "license: apache-2.0" in card and "Licence: apache-2.0, as the base says." in card
    for file in (second / "model").glob("*.json"):
        assert str(tmp_path) not in file.read_text(), f"{file.name} goes to the hub and names a folder of this machine"
    opening = json.loads((second / "model" / "architecture.json").read_text())["opens"]
    assert opening["by"] == "transformers with trust_remote_code"


def test_saved_networks_are_loaded_again(tmp_path):
    import timm
    import torchvision

    network = torchvision.models.resnet18(weights=None).eval()
    loader = torch.randn(8, 3, 32, 32)
    small, _ = modhifi_cli.prune(network, loader, sparsity=0.3, preset="fast", check_data=False)
    given = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    modhifi_cli.save(small, tmp_path / "a", factory="torchvision.models.resnet:resnet18", preprocess=given)
    again = modhifi_cli.load_model(tmp_path / "a", allow="torchvision.models.resnet:resnet18")
    assert torch.equal(again(loader), small(loader))
    from modhifi_cli.errors import ConfigError

    with pytest.raises(ConfigError, match="does not say how it is built; give factory="):
        modhifi_cli.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "b")
    modhifi_cli.save(timm.create_model("resnet10t", num_classes=3).eval(), tmp_path / "c")
    assert modhifi_cli.load_model(tmp_path / "c")(loader).shape == (8, 3)
