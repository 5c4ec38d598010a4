"""The YAML files of evaluation/ and export/: package line, target, and parameters that the functions really have."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from modhifi_cli.evaluation import Measure

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted([*(CONFIGS / "evaluation").glob("*.yaml"), *(CONFIGS / "export").glob("*.yaml")])


def _target(settings):
    module, _, name = settings["_target_"].rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_package_line_comes_first(file):
    # Hydra stops looking for it at the first line that is not one, and the keys would land in the group itself.
    first = file.read_text(encoding="utf-8").splitlines()[0]

    assert first == f"# @package {file.parent.name}.{file.stem}"
    assert re.search(r"^#   modhifi \w+ ", file.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_keys_are_parameters_with_the_same_default(file):
    # What a key takes from runtime= is compared by the value that it has where nobody says otherwise.
    runtime = {"runtime": OmegaConf.load(CONFIGS / "runtime" / "cpu.yaml")}
    settings = OmegaConf.to_container(OmegaConf.create(runtime | {"own": OmegaConf.load(file)}), resolve=True)["own"]
    own = {key: value for key, value in settings.items() if not key.startswith("_")}
    parameters = inspect.signature(_target(settings)).parameters

    assert settings.get("_partial_", False) is (file.parent.name == "evaluation")
    written = {key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}
    assert {key: parameters[key].default for key in own} == written
    defaults = {name for name, parameter in parameters.items() if parameter.default is not parameter.empty}
    assert defaults == set(own), "a parameter that no key sets is hidden from users"


@pytest.mark.parametrize("file", [f for f in FILES if f.parent.name == "evaluation"], ids=lambda file: file.stem)
def test_measurement_takes_what_the_pipeline_gives(file):
    parameters = inspect.signature(_target(OmegaConf.load(file))).parameters
    given = set(inspect.signature(Measure.__call__).parameters) - {"self"}

    assert given <= set(parameters)
    assert all(parameters[name].kind is inspect.Parameter.KEYWORD_ONLY for name in given)


def test_lists_of_evaluations_and_exports_compose_side_by_side(tmp_path):
    from hydra import compose, initialize_config_dir

    for group in ("evaluation", "export"):
        (tmp_path / group).mkdir()
        for file in (CONFIGS / group).glob("*.yaml"):
            (tmp_path / group / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "verb.yaml").write_text("defaults:\n- evaluation: [size]\n- export: []\n- _self_\n", encoding="utf-8")
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        some = compose("verb", ["evaluation=[top1,latency]", "evaluation.latency.iterations=5", "export=[onnx]"])
        none = compose("verb", ["evaluation=[]"])

    assert list(some.evaluation) == ["top1", "latency"]
    assert some.evaluation.latency.iterations == 5
    assert some.export.onnx._target_ == "modhifi_cli.files.exports.onnx.Onnx"
    assert "evaluation" not in none and "export" not in none
