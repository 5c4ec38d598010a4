"""The core works without the extras, and what misses a package says which extra brings it."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from modhifi_cli.errors import EXTRAS, ConfigError, need_packages, package_missing
from modhifi_cli.models import hf
from modhifi_cli.settings import config
from modhifi_cli.settings.explain import explain

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The name on the package index of an import name, where the two differ by more than a dash.
INDEX_NAMES = {
    "hydra_plugins.hydra_joblib_launcher": "hydra-joblib-launcher",
    "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher",
    "hydra_plugins.hydra_optuna_sweeper": "hydra-optuna-sweeper",
}


def names_of(requirements):
    return {requirement.split(">")[0].split("=")[0].split("<")[0] for requirement in requirements}


@pytest.mark.parametrize("package", EXTRAS)
def test_every_optional_package_is_brought_by_the_extra_that_errors_name(package):
    wanted = INDEX_NAMES.get(package, package)
    brought = names_of(PROJECT["optional-dependencies"][EXTRAS[package]])
    assert wanted in brought or wanted.replace("_", "-") in brought
    assert wanted not in names_of(PROJECT["dependencies"])


def test_the_extra_all_holds_every_extra_of_users():
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(everything[len("modhifi[") : -1].split(",")) == set(EXTRAS.values())


@pytest.mark.parametrize("package", EXTRAS)
def test_a_missing_package_is_one_sentence_with_its_extra(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        need_packages("what=was_typed", package)
    message = str(caught.value)
    assert message.startswith("what=was_typed needs the package ") and message.count(". ") == 0
    assert f"pip install 'modhifi[{EXTRAS[package]}]'" in message
    assert message == str(package_missing("what=was_typed", package))


def test_a_gguf_file_without_its_reader_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"model\.gguf needs the package gguf, .* 'modhifi\[language\]'"):
        hf.load(gguf=str(tmp_path / "model.gguf"))


def test_an_outside_pruner_without_its_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    monkeypatch.delitem(sys.modules, "modhifi_cli.rivals.torch_pruning", raising=False)
    with pytest.raises(ConfigError, match=r"outside=torch_pruning_.* 'modhifi\[rivals\]'"):
        importlib.import_module("modhifi_cli.rivals.torch_pruning")


def test_the_core_prunes_with_none_of_the_extras_installed(tmp_path):
    hidden = [*EXTRAS, "torch_pruning", "pandas"]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({hidden!r}))\n"
        "from modhifi_cli.cli import main\n"
        f"sys.exit(main(['prune', 'preset=fast', 'sparsity=0.3', 'console=plain', 'evaluation=[top1]']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "top-1" in done.stdout


@pytest.mark.parametrize("kind, package", [("onnx", "onnxscript"), ("gguf", "gguf")])
def test_an_export_without_its_package_is_refused_before_the_run(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"export\.{kind} needs the package {package}, .* 'modhifi\[{EXTRAS[package]}\]'"):
        config.compose("prune", [f"export=[{kind}]"])


@pytest.mark.parametrize("group, choice, package", [
    ("hydra/launcher", "joblib", "hydra_plugins.hydra_joblib_launcher"),
    ("hydra/launcher", "submitit_slurm", "hydra_plugins.hydra_submitit_launcher"),
    ("hydra/sweeper", "optuna", "hydra_plugins.hydra_optuna_sweeper"),
])  # fmt: skip
def test_a_launcher_or_sweeper_without_its_plugin_names_the_extra(group, choice, package):
    from hydra.errors import MissingConfigException

    error = MissingConfigException(f"no {choice}", f"{group}/{choice}")
    said = str(explain(error, "prune", [f"{group}=ours"]))
    assert said == str(package_missing(f"this {group}", package)) and f"'modhifi[{EXTRAS[package]}]'" in said
