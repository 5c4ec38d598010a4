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


LONGEST, MOST_PARAMETERS = 60, 8
# What a docstring says where a signature is the user's interface.
REASON = "One parameter for each"


def functions(tree: ast.AST) -> list[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Every function with the text that may give a reason: its docstring, or for ``__init__`` the class's."""
    found = []
    for node in ast.walk(tree):
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, (ast.FunctionDef, ast.AsyncFunctionDef)):
                told = ast.get_docstring(inner) or ""
                if inner.name == "__init__" and isinstance(node, ast.ClassDef):
                    told += ast.get_docstring(node) or ""
                found.append((inner, told))
    return found


def lines_of_code(function: ast.FunctionDef | ast.AsyncFunctionDef, source: list[str]) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function) is not None
    docstring = range(first.lineno, first.end_lineno + 1) if documented else range(0)
    lines = range(function.lineno, function.end_lineno + 1)
    return sum(
        bool(source[line - 1].strip()) and not source[line - 1].lstrip().startswith("#")
        for line in lines
        if line not in docstring
    )


def parameters_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    named = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return len(named) - (named[:1] in (["self"], ["cls"])) + (given.vararg is not None) + (given.kwarg is not None)


def too_much(text: str) -> list[str]:
    source, found = text.splitlines(), []
    for function, told in functions(ast.parse(text)):
        lines, parameters = lines_of_code(function, source), parameters_of(function)
        if lines > LONGEST:
            found.append(f"{function.name} has {lines} lines of code; split it by meaning")
        if parameters > MOST_PARAMETERS and REASON not in told:
            found.append(f"{function.name} has {parameters} parameters; put into one record what belongs together")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_function_is_long_and_none_has_many_parameters_without_a_reason(path):
    assert not too_much(path.read_text(encoding="utf-8"))


def test_long_functions_and_long_signatures_are_seen():
    body = "\n".join(f"    x = {number}" for number in range(LONGEST))
    assert too_much(f"def f():\n{body}\n") == ["f has 61 lines of code; split it by meaning"]
    assert not too_much(f'def f():\n    """Told\n\n    in lines."""\n    # or in remarks\n\n{body[body.index(chr(10)) + 1 :]}\n')
    wide = "(self, a, b, c, d, e, *f, g, **h)"
    assert not too_much(f"def f{wide}: ...\n")
    assert too_much(f"class A:\n    def f{wide.replace('g', 'g, i')}: ...\n")[0].startswith("f has 9 parameters")
    reason = f'"""{REASON} key of the YAML."""'
    assert not too_much(f"class A:\n    {reason}\n    def __init__{wide.replace('g', 'g, i')}: ...\n")
    assert too_much(f"class A:\n    {reason}\n    def f{wide.replace('g', 'g, i')}: ...\n")
