"""The law of the house: a room imports only from rooms above it, and heavy libraries only where they are used."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "modhifi_cli"

# Room → layer. Rooms of one layer are siblings and do not import each other.
LAYERS = {
    "errors": 0,
    "records": 0,
    "roles": 0,
    "numerics": 1,
    "graph": 2,
    "models": 3,
    "data": 3,
    "evaluation": 3,
    "engine": 4,
    "unlearning": 5,
    "auditing": 5,
    "studies": 5,
    "rivals": 5,
    "files": 6,
    "pages": 6,
    "settings": 6,
    "console": 6,
    "verbs": 7,
    "cli": 7,
    "api": 7,
    "__main__": 7,
    "__init__": 7,
}
# Layer 7 is one room in three files, and errors is above records.
ALLOWED_SIBLINGS = {
    ("cli", "verbs"), ("__main__", "cli"), ("records", "errors"), ("roles", "records"), ("cli", "__init__"),
}  # fmt: skip
HEAVY = (
    "torchvision", "timm", "transformers", "datasets", "lm_eval", "pandas", "onnx", "onnxruntime", "sklearn",
    "matplotlib",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            found.append((node.module or "", node.lineno))
            if node.module == "modhifi_cli":
                found += [(f"modhifi_cli.{alias.name}", node.lineno) for alias in node.names]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_room_imports_only_rooms_above_it(path):
    room = room_of(path)
    assert room in LAYERS, f"{room} has no layer; add it to LAYERS and to the table of the design"
    for name, line in imports(ast.parse(path.read_text(encoding="utf-8"))):
        parts = name.split(".")
        if parts[0] != "modhifi_cli" or len(parts) == 1:
            continue
        other = parts[1]
        if other == room or other not in LAYERS or (room, other) in ALLOWED_SIBLINGS or room == "__init__":
            continue
        assert LAYERS[other] < LAYERS[room], f"{path.name}:{line} imports {name}, which is not above {room}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_heavy_libraries_are_imported_where_they_are_used(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        for name, line in imports(node) if isinstance(node, (ast.Import, ast.ImportFrom)) else []:
            assert name.split(".")[0] not in HEAVY, f"{path.name}:{line} imports {name} at the top"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_only_settings_know_hydra_and_only_console_and_cli_print(path):
    room = room_of(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if room != "settings":
        for name, line in imports(tree):
            assert name.split(".")[0] not in ("hydra", "omegaconf"), f"{path.name}:{line} imports {name}"
    if room not in ("console", "cli", "files"):
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert not [node.lineno for node in calls if node.func.id == "print"], f"{path.name} prints"


def test_nothing_is_called_utils():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "misc", "common")]
