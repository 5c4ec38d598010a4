"""The wheel carries what a source tree has beside the code: configs and the embedded network."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling, which comes with the extra [test]")
    folder = tmp_path_factory.mktemp("wheel")
    script = f"import os; os.chdir({str(ROOT)!r}); import hatchling.build as b; print(b.build_wheel({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_configs_and_the_embedded_network(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}
    assert {f"modhifi_cli/{name}" for name in configs} <= names
    assert "modhifi_cli/models/embedded.safetensors" in names
    assert not [name for name in names if name.startswith(("tests", "outputs", "configs"))]


def test_an_installed_wheel_finds_its_configs_from_any_folder(wheel, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    done = subprocess.run(
        [sys.executable, "-m", "modhifi_cli", "prune", "--cfg", "job", "sparsity=0.25"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "sparsity: 0.25" in done.stdout
    code = "import modhifi_cli.settings.config as c; print(c.config_directory())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(found.stdout.strip()) == installed / "modhifi_cli" / "configs"


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_a_built_distribution_installs_and_runs_in_a_fresh_environment(kind, wheel, tmp_path):
    archive = wheel
    if kind == "sdist":
        script = f"import os; os.chdir({str(ROOT)!r}); import hatchling.build as b; b.build_sdist({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
        (archive,) = tmp_path.glob("*.tar.gz")
    # The environment is new; the libraries are those at hand, since downloading PyTorch would take minutes.
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", tmp_path / "venv"], check=True)
    (found,) = {path.parent for path in (tmp_path / "venv").rglob("site-packages/pip")}
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (found / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")
    pip = [tmp_path / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--ignore-installed", archive], capture_output=True, check=True)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ran = subprocess.run(
        [tmp_path / "venv" / "bin" / "modhifi", "list", "group=preset"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0 and "best" in ran.stdout, ran.stderr
    code = "import modhifi_cli; print(modhifi_cli.__file__)"
    where = subprocess.run(
        [tmp_path / "venv" / "bin" / "python", "-c", code],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(tmp_path / "venv")


def test_the_distributions_say_licence_and_authors(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
        names = archive.namelist()
    assert "License-Expression: Apache-2.0" in metadata and "Author: modhifi authors" in metadata
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_an_index_can_show_the_readme(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA")]
    urls = dict(re.findall(r"^Project-URL: (\w+), (\S+)$", metadata, re.M))
    assert "Description-Content-Type: text/markdown" in metadata
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", metadata)
    assert len(links) > 20
    for picture, target in links:
        start = urls["Files" if picture else "Source"] + "/"
        assert target.startswith(start) and (ROOT / target.removeprefix(start)).exists(), target
        assert not picture or target.endswith(".png"), "an index shows drawings only from where they are served as such"


def test_the_release_workflow_builds_what_it_publishes_and_only_from_a_tag_of_this_version():
    from omegaconf import OmegaConf

    workflow = OmegaConf.to_container(OmegaConf.load(ROOT / ".github" / "workflows" / "release.yml"))
    (tag,) = workflow[True if True in workflow else "on"]["push"]["tags"]
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    assert tag == "v*" and publish["needs"] == "build" and publish["permissions"] == {"id-token": "write"}
    scripts = [step["run"] for step in build["steps"] if "run" in step]
    order = [next(place for place, text in enumerate(scripts) if part in text) for part in ("GITHUB_REF_NAME", ".ci/run", "-m build")]
    assert order == sorted(order), "the version is compared and the tests pass before anything is built"
    uploaded = [step["with"] for step in build["steps"] if "upload-artifact" in step.get("uses", "")]
    fetched = [step["with"] for step in publish["steps"] if "download-artifact" in step.get("uses", "")]
    assert uploaded == fetched == [{"name": "dist", "path": "dist/"}]
    assert (ROOT / ".ci" / "run").is_file()
