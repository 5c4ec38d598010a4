"""What goes to the hubs and comes from them, against a stand-in on loopback: executed in fresh processes, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.decoders import saved
from tests.evaluation.test_language import TEXT
from tests.hub.server import serving

REPOSITORY = Path(__file__).resolve().parents[2]
_TEXTS = {
    "Salesforce/wikitext": ("wikitext-2-raw-v1", ("validation", "test")),
    "allenai/c4": ("en", ("validation",)),
}


def _dataset(place: Path, config: str, splits: dict[str, list[dict]]) -> None:
    (place / config).mkdir(parents=True)
    told = "".join(f"  - split: {split}\n    path: {config}/{split}.jsonl\n" for split in splits)
    (place / "README.md").write_text(f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{told}---\n")
    for split, rows in splits.items():
        (place / config / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The stand-in, with a tiny decoder, two texts and the questions of one task."""
    root = tmp_path_factory.mktemp("hub")
    saved(root / "models" / "ada" / "tiny")
    lines = [line for line in TEXT.split(". ") if line] * 40
    for name, (config, splits) in _TEXTS.items():
        _dataset(root / "datasets" / name, config, {split: [{"text": line} for line in lines] for split in splits})
    question = {
        "id": "1", "question": "What is round?", "answerKey": "B",
        "choices": {"text": ["a box", "a ball"], "label": ["A", "B"]},
    }  # fmt: skip
    rows = [question | {"id": str(number)} for number in range(6)]
    _dataset(root / "datasets" / "allenai" / "ai2_arc", "ARC-Easy", {name: rows for name in ("train", "validation", "test")})
    with serving(root) as (address, asked):
        yield root, address, asked


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(hub, home):
    """Type a command, or some Python, as a user who is connected to nothing but the stand-in."""

    def typed(*words: str, **environment: str) -> subprocess.CompletedProcess:
        dropped = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
        clean = {key: value for key, value in os.environ.items() if key not in dropped and not key.lower().endswith("proxy")}
        return subprocess.run(
            [sys.executable, *(("-m", "modhifi_cli") if words[0] != "-c" else ()), *words],
            capture_output=True, text=True, check=False, cwd=home,
            env=clean | {"HF_ENDPOINT": hub[1], "HF_HOME": str(home / "hf"), "PYTHONPATH": str(REPOSITORY),
                         "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"} | environment,
        )  # fmt: skip

    return typed


def succeeded(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, f"{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
    return done.stdout


@pytest.fixture(scope="module")
def pruned(hub, home):
    return home / "outputs" / "prune" / "tiny"


@pytest.mark.parametrize("data", ["wikitext2", "c4"])
def test_a_decoder_and_its_text_come_from_the_hub(run, hub, pruned, data):
    text = [f"data={data}", "data.sequences=8", "data.length=20"]
    if data == "c4":
        text.append("data.hub={path: allenai/c4, name: en, split: validation}")
    words = ["prune", "model=hf", "model.path=ada/tiny", *text, "sparsity=0.2", "evaluation=[]", "console=plain"]
    succeeded(run(*words))
    assert any("ada/tiny/resolve" in line for line in hub[2])
    newest = sorted(pruned.iterdir())[-1]
    told = json.loads((newest / "results.json").read_text())
    assert "revision" in told["weights"] and told["calibration"]["sequences"] == 8


def test_tasks_of_lm_eval_come_from_the_hub(run, pruned):
    words = ["evaluate", "run=last", "evaluation=[lm_eval]", "evaluation.lm_eval.tasks=[arc_easy]", "measure_dense=false"]
    assert "lm eval/arc easy/acc" in succeeded(run(*words, "console=plain"))


def test_push_uploads_what_the_other_side_loads(run, hub, pruned):
    planned = succeeded(run("push", "run=last", "repo=ada/small", "dry_run=true", "console=plain"))
    assert "would upload" in planned and not (hub[0] / "models" / "ada" / "small").exists()
    refused = run("push", "run=last", "repo=ada/small")
    assert refused.returncode == 2 and "nobody is logged in to the hub" in refused.stderr
    succeeded(run("push", "run=last", "repo=ada/small", "console=plain", HF_TOKEN="hf_a_token_of_a_test"))
    there = hub[0] / "models" / "ada" / "small"
    newest = sorted(pruned.iterdir())[-1] / "model"
    assert {file.name for file in there.iterdir()} == {file.name for file in newest.iterdir()}
    script = "import modhifi_cli, sys; print(sum(p.numel() for p in modhifi_cli.load_model('ada/small').parameters()))"
    assert int(succeeded(run("-c", script))) > 1000
    missing = run("-c", "import modhifi_cli; modhifi_cli.load_model('ada/absent')")
    assert "ada/absent: no such folder here, and the hub does not give it" in missing.stderr


def test_push_without_a_connection_says_what_it_would_upload(run, pruned):
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "hf_a_token_of_a_test"}
    done = run("push", "run=last", "repo=ada/small", **offline)
    assert done.returncode == 2 and "the hub cannot be reached" in done.stderr and "would be uploaded" in done.stderr
    assert done.stderr.count("\n") == 1


def test_published_weights_of_torchvision_come_from_its_download_cache(run, home):
    import torchvision

    cache = home / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    name = torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), cache / name)
    words = ["prune", "model=resnet18", "data=procedural", "data.num_samples=16", "sparsity=0.1", "preset=fast"]
    words += ["evaluation=[size]", "model.preprocess={size: 32, resize: 32}", "console=plain", "measure_dense=false"]
    succeeded(run(*words, TORCH_HOME=str(home / "torch")))
    (folder,) = (home / "outputs" / "prune" / "resnet18").iterdir()
    assert "ResNet18_Weights.IMAGENET1K_V1" in json.loads((folder / "results.json").read_text())["weights"]
