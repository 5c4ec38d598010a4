"""What README and docs/ say is true: links lead somewhere, commands compose or run, marks have their formula.

A fenced block under ``<!-- run -->`` is run as it stands: with ``with PACKAGES`` where they are installed, with ``slowly`` by
.ci/long. Every other command names files, hubs or hours that a test does
not have; it is composed with all its settings checked, which is what happens before a run reads its first file.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from modhifi_cli.settings import completion, config
from tests.settings.test_configs import fill

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "modhifi_cli" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
_BLOCK = re.compile(r"(?P<run><!-- run(?P<how>[^>]*) -->\n)?^```(?P<kind>\w*)\n(?P<body>.*?)^```$", re.M | re.S)
_MARK = re.compile(r"method\.md[ ,(]+(M\d+|D\d'?|section \d|\d)\b(?!\.)")


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks():
    for page in PAGES:
        for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
            yield page, found["kind"], found["body"], "" if not found["run"] else "run" + found["how"]


def commands(body: str) -> list[str]:
    lines = body.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.startswith("modhifi ")]


# The commands of the reference are those of the YAML headers, which tests/settings/test_configs.py composes.
COMPOSED = sorted(
    {
        (name(page), line)
        for page, kind, body, run in blocks()
        if not run and page.name != "settings.md"
        for line in commands(body)
    }
)
RUN = sorted({(name(page), line) for page, kind, body, run in blocks() if run for line in commands(body)})
SNIPPETS = [
    pytest.param(name(page), body, run, id=f"{name(page)}:{number}", marks=[pytest.mark.slow] if run == "run slowly" else [])
    for number, (page, kind, body, run) in enumerate(blocks())
    if run and kind == "python"
]


@pytest.mark.parametrize(("page", "command"), COMPOSED, ids=lambda value: value)
def test_a_command_of_the_documentation_composes(page, command):
    verb, *words = shlex.split(command, comments=True)[1:]
    overrides = [word for word in words if not word.startswith("-")]
    if verb == "completion":
        assert words[0] in completion.SCRIPTS
    elif verb.startswith("-"):
        assert verb == "--help"
    elif verb == "list":
        assert all(word.partition("=")[2] in config.groups() for word in overrides)
    elif "--help" not in words:
        assert verb in config.verbs()
        overrides = [word for word in overrides if not word.startswith(("hydra/", "hydra.", "--"))]
        config.compose(verb, fill([word for word in overrides if word != "job"]))


@pytest.mark.parametrize(("page", "command"), RUN, ids=lambda value: value)
def test_a_command_marked_to_run_runs(page, command, tmp_path):
    words = [sys.executable, "-m", "modhifi_cli", *shlex.split(command, comments=True)[1:], "console=plain"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("page", "code", "how"), SNIPPETS)
def test_a_snippet_marked_to_run_runs(page, code, how, tmp_path):
    for package in how.partition(" with ")[2].split():
        pytest.importorskip(package, reason="not among the project's own packages")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name)
def test_a_notebook_runs_from_top_to_bottom(notebook, tmp_path):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_to_a_file_of_the_project(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not re.match(r"\w+:", target):
            assert (page.parent / target).resolve().exists(), target


def test_every_page_of_docs_can_be_reached_from_its_index():
    seen, waiting = set(), [ROOT / "docs" / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            targets = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
            waiting += [(page.parent / target).resolve() for target in targets]
    assert {name(page) for page in (ROOT / "docs").rglob("*.md")} <= {name(page) for page in seen}


def test_the_readme_is_short_and_its_sentences_too():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    prose = _BLOCK.sub("", text)
    lines = [line for line in prose.splitlines() if line and not line.startswith(("|", "#", "!", "<"))]
    sentences = re.split(r"(?<=[.:;?!])\s+", " ".join(re.sub(r"\]\([^)]*\)", "]", line) for line in lines))
    long = [sentence for sentence in sentences if len(sentence.split()) > 25]
    assert not long


def test_every_mark_of_a_formula_leads_to_it():
    method = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    cited = {}
    for path in [*(ROOT / "modhifi_cli").rglob("*.py"), *(ROOT / "configs").rglob("*.yaml"), *PAGES]:
        for mark in _MARK.findall(path.read_text(encoding="utf-8")):
            cited.setdefault(mark, []).append(name(path))
    assert len(cited) > 8, "the marks are not found any more"
    for mark, places in cited.items():
        written = f"## {mark[-1]}." if mark[0] not in "MD" else f"**({mark})"
        assert written in method, f"{mark}, cited in {places[0]}"


def test_the_reference_of_settings_is_what_the_yaml_files_say():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "make_settings.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
