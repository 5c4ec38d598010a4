"""The verbs end to end with runtime=gpu on the pretended card: every evaluation, resume, replay, verify, exports."""

import pytest

from modhifi_cli import load_model
from modhifi_cli.cli import main
from modhifi_cli.evaluation import latency_probe
from modhifi_cli.evaluation.runtimes import NotPortable, process
from modhifi_cli.files import artifacts
from modhifi_cli.graph.surgery import weights_hash
from tests.card import pretend
from tests.decoders import saved
from tests.evaluation.test_language import TEXT
from tests.machines import Machine
from tests.verbs.test_verbs import Stop

pytestmark = pytest.mark.card

SMALL = ["runtime=gpu", "data.num_samples=64", "evaluation_data.num_samples=60", "console=plain"]
QUICK_TIMES = ["evaluation.latency.iterations=2", "evaluation.latency.warmup=1", "evaluation.latency.gpu_batch=8"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def timed_here(monkeypatch):
    """The pretended card is in this process alone, so networks are timed here, as those that cannot be sent are."""

    def elsewhere(*_):
        raise NotPortable("the card is pretended")

    if not pretend.REAL:
        monkeypatch.setattr(process, "_elsewhere", elsewhere)


@pytest.fixture(autouse=True)
def seen():
    with pretend.card() as seen:
        yield seen


def only_run(here, verb):
    (folder,) = [path for path in (here / "outputs" / verb).glob("*/*") if path.is_dir()]
    return folder


def perplexities(run) -> dict[str, float]:
    found = artifacts.read_results(run)["measurements"]
    return {m["model"]: m["value"] for m in found if m["name"] == "token_perplexity"}


def prune(*words: str) -> int:
    return main(["prune", *SMALL, *words])


def test_a_run_is_measured_saved_verified_replayed_and_evaluated(here, seen, capsys):
    assert prune("sparsity=0.4", "export=[onnx,torch_export]", *QUICK_TIMES) == 0
    run = only_run(here, "prune")
    names = {measurement["name"] for measurement in artifacts.read_results(run)["measurements"]}
    assert {"top1", "agreement", "parameters"} < names and any(name.startswith("latency") for name in names)
    assert seen.peak > 0
    assert main(["verify", f"run={run}", "console=plain"]) == 0
    assert main(["replay", f"run={run}", "console=plain"]) == 0
    asked = [word for word in SMALL if not word.startswith("data.")]
    assert main(["evaluate", *asked, *QUICK_TIMES, f"run={run}"]) == 0, capsys.readouterr().err
    assert main(["info", "runtime=gpu", "console=plain"]) == 0


def test_an_interrupted_run_on_the_card_goes_on_to_the_same_weights(here, monkeypatch):
    words = ("sparsity=0.3", "preset=fast", "evaluation=[]")
    with monkeypatch.context() as patched:
        Stop(patched, 2)
        assert prune(*words) == 130
    assert prune(*words, f"resume={only_run(here, 'prune')}") == 0
    resumed = only_run(here, "prune")
    assert prune(*words, "output_dir=other") == 0
    (whole,) = (here / "other" / "prune").glob("*/*")
    assert weights_hash(load_model(resumed)) == weights_hash(load_model(whole))


@pytest.mark.parametrize("target", ["latency", "max_drop"])
def test_targets_that_are_measured_run_on_the_card(target, monkeypatch):
    monkeypatch.setattr(latency_probe, "stopwatch", Machine(fixed=0.01))  # a busy processor is no clock of a card
    words = ["target.batch_size=4", "sparsity=0.2"] if target == "latency" else ["target.value=20"]
    assert prune(f"target={target}", "preset=fast", "evaluation=[]", *words) == 0


@pytest.mark.parametrize("batchnorm", ["stored", "batches"])
def test_a_network_is_healed_on_the_card(batchnorm, here):
    healing = ["healing=distill", "healing.epochs=3", "healing.batch_size=16", f"healing.batchnorm={batchnorm}"]
    assert prune("preset=fast", "sparsity=0.6", "evaluation=[]", *healing) == 0
    healed = artifacts.read_results(only_run(here, "prune"))["healing"]
    assert healed["after"] <= healed["before"] and healed["epochs"] == 4


def test_forgetting_with_its_audit_runs_on_the_card(here):
    small = ["data.num_samples=200", "evaluation_data.num_samples=150", "console=plain", "runtime=gpu"]
    audit = ["audit.relearn.steps=1", "audit.relearn.held_out=20"]
    asked = "evaluation=[forget_retain,forgotten_rank]"
    assert main(["unlearn", *small, *audit, "forget_class=3", "finetune.epochs=1", asked]) == 0
    run = only_run(here, "unlearn")
    assert artifacts.read_results(run)["audit"]["verdict"]
    assert main(["audit", f"run={run}", *small, *audit]) == 0


@pytest.mark.parametrize("source", ["inversion", "class_inversion", "procedural"])
def test_images_are_made_on_the_card(source, here):
    words = {"inversion": ["data.together=8", "data.steps=2", "data.class_weight=0"], "procedural": []}
    words["class_inversion"] = ["data.together=8", "data.steps=2"]
    asked = [f"data={source}", "data.num_samples=8", *words[source]]
    assert main(["synthesize", *asked, "console=plain", "runtime=gpu"]) == 0


STUDIES = {
    "existence": ["study.subsets=10", "layers=[linear]"],
    "counterfactual": ["layers=[layer1]"],
    "noise": ["layers=[linear]"],
    "robustness": ["layers=[linear]"],
    "lipschitz": ["layers=[linear]"],
    "ablation": [],
}


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_runs_on_the_card(name):
    small = ["data.num_samples=96", "evaluation_data.num_samples=40", "console=plain", "runtime=gpu"]
    assert main(["study", f"name={name}", *small, *STUDIES[name]]) == 0


@pytest.fixture
def words(here):
    saved(here / "dense")
    (here / "calibration.txt").write_text(TEXT)
    (here / "evaluation.txt").write_text(TEXT[::-1])
    return [
        "model=hf", "model.path=dense", "data=text", "data.path=calibration.txt", "data.sequences=16",
        "data.length=20", "evaluation_data=text", "evaluation_data.path=evaluation.txt", "evaluation_data.length=20",
        "console=plain", "runtime=gpu",
    ]  # fmt: skip


def test_a_language_model_is_pruned_measured_verified_and_evaluated(here, words, capsys):
    quick = ["evaluation.generation.prompt_tokens=8", "evaluation.generation.new_tokens=4"]
    asked = "evaluation=[token_perplexity,size,generation]"
    kind = ["model.dtype=bfloat16", "sparsity=0.3", "components=[mlp,attention]"]
    assert main(["prune", *words, *kind, asked, *quick]) == 0
    run = only_run(here, "prune")
    assert main(["verify", f"run={run}", "console=plain"]) == 0
    assert main(["replay", f"run={run}", "console=plain"]) == 0
    assert main(["evaluate", f"run={run}", "runtime=gpu", "console=plain", asked, *quick]) == 0, capsys.readouterr().err
    first, again = (perplexities(only_run(here, verb)) for verb in ("prune", "evaluate"))
    assert first == again, "in the precision of the run"


def test_a_language_model_is_healed_on_the_card(here, words):
    healing = ["healing=distill", "healing.epochs=1", "healing.lr=1e-4"]
    assert main(["prune", *words, "sparsity=0.3", "evaluation=[token_perplexity]", *healing]) == 0
    healed = artifacts.read_results(only_run(here, "prune"))["healing"]
    assert healed["after"] <= healed["before"] and healed["epochs"] == 2


def test_text_is_generated_on_the_card(here, words):
    kept = [word for word in words if not word.startswith("data")]
    made = ["data=generated", "data.sequences=8", "data.length=16"]
    assert main(["prune", *kept, *made, "sparsity=0.2", "evaluation=[token_perplexity]"]) == 0
