"""The baseline of type errors falls and never rises."""

import importlib.util
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def check_types():
    spec = importlib.util.spec_from_file_location("check_types", ROOT / "scripts" / "check_types.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OUTPUT = """modhifi_cli/graph/law.py:3: error: bad  [misc]
modhifi_cli/graph/law.py:3: note: really
modhifi_cli/records.py:7: error: bad  [misc]
"""


def test_a_room_without_a_baseline_may_have_no_type_error():
    wrong, _ = check_types().judge(OUTPUT, {"graph": 1})
    assert wrong == ["records: 1 type errors, 0 allowed; mend what was added."]


def test_fewer_errors_than_the_baseline_can_be_written_down():
    wrong, lowered = check_types().judge(OUTPUT, {"graph": 2, "records": 1, "audit": 4})
    assert (wrong, lowered) == ([], {"graph": 1, "records": 1})


def test_a_baseline_is_never_raised():
    assert check_types().judge(OUTPUT, {})[1] == {}


def test_the_linters_of_the_commit_hook_are_those_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (ruff,) = (name for name in project["optional-dependencies"]["lint"] if name.startswith("ruff"))
    assert ruff in (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert ruff in (ROOT / "constraints" / "tested.txt").read_text(encoding="utf-8")
