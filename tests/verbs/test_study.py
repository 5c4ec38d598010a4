"""`modhifi study` and `modhifi report` end to end on the embedded network."""

import importlib.util
import json
import shutil
import sys

import pytest

from modhifi_cli.cli import main
from tests.conftest import REPOSITORY

SMALL = ["data.num_samples=96", "evaluation_data.num_samples=60", "console=plain", "study.subsets=20"]
LAYERS = "layers=[layer1.0.conv2,linear]"


def study(*words: str) -> int:
    return main(["study", *SMALL, *words])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished study that tests may read but not change."""
    root = tmp_path_factory.mktemp("done")
    assert study("name=existence", LAYERS, f"output_dir={root / 'outputs'}") == 0
    return only(root)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """A finished run that tests may read but not change."""
    root = tmp_path_factory.mktemp("pruned")
    words = ["data.num_samples=64", "evaluation=[top1,size]", "sparsity=0.4", "console=plain"]
    assert main(["prune", *words, f"output_dir={root / 'outputs'}"]) == 0
    (folder,) = (root / "outputs" / "prune" / "embedded").iterdir()
    return folder


@pytest.fixture
def mine(pruned, here):
    """A run of my own that may be damaged."""
    return shutil.copytree(pruned, here / "run")


def only(root):
    (folder,) = (root / "outputs" / "study" / "existence").iterdir()
    return folder


def error_of(capsys) -> str:
    return capsys.readouterr().err


def test_a_study_holds_rows_figures_and_a_page(done):
    names = {path.name for path in done.iterdir()}
    assert names >= {
        "rows.csv", "results.json", "report.md", "report.html", "config.yaml", "environment.json", "existence.json",
        "existence.png", "existence.svg", "needed.json", "needed.png", "needed.svg",
    }  # fmt: skip
    assert len(list((done / "cells").iterdir())) == 4
    text = (done / "report.md").read_text()
    assert "modhifi study" in text and "name=existence" in text and "Fewer than 20 %" in text
    assert len((done / "rows.csv").read_text().splitlines()) == 1 + 2 * (16 + 64)


def test_finished_cells_are_kept_and_new_layers_added(done, here, capsys):
    shutil.copytree(done.parents[2], here / "outputs")
    folder = only(here)
    times = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert study("name=existence", "layers=[layer1.0.conv2,linear,layer1.0.conv1]") == 0
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())
    assert len(list((folder / "cells").iterdir())) == 6
    assert study("name=existence", LAYERS, "study.subsets=10") == 0
    assert len(list((folder / "cells").iterdir())) == 10, "other settings are other cells"


def test_a_damaged_cell_is_computed_anew(done, here):
    shutil.copytree(done.parents[2], here / "outputs")
    cell = next((only(here) / "cells").iterdir())
    before = cell.read_text()
    cell.write_text(before[:100])
    assert study("name=existence", LAYERS) == 0
    assert json.loads(cell.read_text())["rows"] == json.loads(before)["rows"]


def test_a_study_that_ran_out_of_time_says_so_and_goes_on(here, capsys):
    assert study("name=existence", LAYERS, "minutes=1e-9") == 2
    assert "minutes=1e-09: no cell was finished in that time; give more minutes" in error_of(capsys)
    assert study("name=existence", "layers=[linear]") == 0
    assert study("name=existence", LAYERS, "minutes=1e-9") == 0
    assert "2 of 4 cells are not finished" in (only(here) / "report.md").read_text()
    assert study("name=existence", LAYERS) == 0
    assert "not finished" not in (only(here) / "report.md").read_text()


def test_an_interrupted_study_keeps_its_cells_and_goes_on(here, monkeypatch, capsys):
    from modhifi_cli.studies.existence import Existence

    compute = Existence.compute

    def interrupted(self, subject, cell):
        if cell["layer"] == "linear":
            raise KeyboardInterrupt
        return compute(self, subject, cell)

    with monkeypatch.context() as patched:
        patched.setattr(Existence, "compute", interrupted)
        assert study("name=existence", LAYERS) == 130
    assert "1 of 4 cells are finished and kept; the same command goes on with the others" in error_of(capsys)
    assert [path.name for path in only(here).iterdir()] == ["cells"]
    assert len(list((only(here) / "cells").iterdir())) == 1
    assert study("name=existence", LAYERS) == 0
    assert len(list((only(here) / "cells").iterdir())) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["name=existense"], "name=existense: there is no such choice; did you mean 'existence'?"),
        (
            ["layers=[layer1.0.conv9]"],
            "layers: the network has no module 'layer1.0.conv9'; did you mean 'layer1.0.conv",
        ),
        (["layers=[layer1.0.bn1]"], "layers: 'layer1.0.bn1' holds no convolution or linear layer"),
        (["layers=[]"], "layers must be auto, 'last N', or a list of layers"),
        (["minutes=0"], "minutes must be a number of minutes above 0"),
        (["seeds=[]"], "seeds must be a list of whole numbers from 0"),
        (["data.num_samples=8"], "existence: fidelity needs at least 32 images, got 8"),
        (["scoring=magnitude_l2"], "scoring: Magnitude does not look at what a layer reads"),
    ],
)
def test_what_a_user_can_get_wrong_is_one_sentence(words, told, here, capsys):
    assert study(*words) == 2
    assert told in error_of(capsys)


def test_a_report_is_made_again_from_the_folder_alone(mine, done, here, capsys):
    theirs = shutil.copytree(done, here / "study")
    for folder, figure in ((mine, "groups.svg"), (theirs, "existence.svg")):
        names = ("report.md", "report.html", figure)
        before = [(folder / name).read_text() for name in names]
        for name in names:
            (folder / name).unlink()
        assert main(["report", f"run={folder}", "console=plain"]) == 0
        assert [(folder / name).read_text() for name in names] == before


def test_several_runs_or_a_sweep_become_one_page(pruned, mine, here):
    assert main(["report", f"runs=[{pruned},{mine}]", "console=plain"]) == 0
    (folder,) = (here / "outputs" / "report" / "comparison").iterdir()
    assert "2 runs compared" in (folder / "report.md").read_text()
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md"}
    sweep = here / "sweep"
    shutil.copytree(pruned, sweep / "one")
    shutil.copytree(pruned, sweep / "two.incomplete")
    assert main(["report", f"run={sweep}", "console=plain"]) == 0
    assert "1 runs compared" in (sweep / "report.md").read_text()


def damage(name, change):
    def break_(folder):
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return break_


@pytest.mark.parametrize(
    ("break_", "told"),
    [
        (lambda f: (f / "results.json").unlink(), "not a whole run, results.json is missing"),
        (lambda f: f.rename(f.with_name("run.incomplete")), "this run was interrupted"),
    ],
)
def test_a_folder_that_is_no_whole_run_is_told(break_, told, mine, capsys):
    break_(mine)
    assert main(["report", f"run={mine}", "console=plain"]) == 2
    assert told in error_of(capsys)


@pytest.mark.parametrize(
    ("name", "break_", "told"),
    [
        ("results.json", lambda f: (f / "results.json").write_text("{"), "results.json: damaged, not JSON"),
        (
            "config.yaml", lambda f: (f / "config.yaml").write_text("a: [b"),
            "config.yaml: damaged, not a readable YAML mapping",
        ),
        (
            "results.json", damage("results.json", lambda r: r.update(format_version=99)),
            "written in format 99, this version reads up",
        ),
        (
            "results.json", damage("results.json", lambda r: r.pop("verb")),
            "does not say what was done (no 'verb')",
        ),
        ("results.json", damage("results.json", lambda r: r.update(charts=["lost"])), "lost.json is missing"),
    ],
)  # fmt: skip
def test_a_changed_file_is_told_by_its_checksum_and_without_checksums_by_what_is_wrong_with_it(
    name, break_, told, mine, capsys
):
    break_(mine)
    assert main(["report", f"run={mine}", "console=plain"]) == 2
    assert f"{mine / name}: damaged or changed, its sha256 is" in error_of(capsys)
    (mine / "checksums.json").unlink()  # as folders of older versions are
    assert main(["report", f"run={mine}", "console=plain"]) == 2
    assert told in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give run=DIR for one run or a sweep, or runs=[DIR1,DIR2]"),
        (["run=a", "runs=[b]"], "not both"),
        (["run=null", "runs=[nowhere]"], "runs=nowhere: no such folder"),
        (["run=nowhere"], "run=nowhere: no such folder, and no run under outputs begins so"),
        (["runs=[nowhere]"], "runs=nowhere: no such folder, and no run under outputs begins so"),
        (["runs=nowhere"], "runs must be a list of run folders"),
    ],
)
def test_what_a_report_needs_is_told(words, told, capsys):
    assert main(["report", *words, "console=plain"]) == 2
    assert told in error_of(capsys)


def test_pages_in_a_real_browser_fit_the_window_and_load_nothing(pruned, done):
    specification = importlib.util.spec_from_file_location("check_pages", REPOSITORY / "scripts" / "check_pages.py")
    check = importlib.util.module_from_spec(specification)
    sys.modules["check_pages"] = check
    specification.loader.exec_module(check)
    program = check.browser_program()
    if program is None:
        pytest.skip("no browser: install chromium, or name one with CHROMIUM=")
    pytest.importorskip("playwright", reason="pip install playwright drives the browser")
    wrong = [fault for folder in (pruned, done) for fault in check.faults(folder / "report.html", program=program)]
    assert not wrong


QUICK = {
    "counterfactual": ["study.shares=[0.3]", LAYERS],
    "noise": ["study.levels=[0.05]", LAYERS],
    "robustness": ["study.sizes=[32,96]", "layers=[linear]"],
    "lipschitz": ["layers=[linear]"],
    "ablation": ["study.shares=[0.2]"],
}


@pytest.mark.parametrize("name", QUICK)
def test_every_study_runs_on_the_embedded_network_and_says_what_it_found(name, here, capsys):
    words = ["data.num_samples=96", "evaluation_data.num_samples=60", "console=json", *QUICK[name]]
    assert main(["study", f"name={name}", *words]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["findings"] and last["summary"]
    results = json.loads((here / last["folder"] / "results.json").read_text())
    assert results["study"] == name and not results["missing_cells"]
    for chart in results["charts"]:
        assert (here / last["folder"] / f"{chart}.svg").stat().st_size > 1000
        assert json.loads((here / last["folder"] / f"{chart}.json").read_text())["title"].startswith("embedded: ")
