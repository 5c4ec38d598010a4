"""A small finished run of the embedded network, and what is compared with it."""

from pathlib import Path

QUICK = (
    "data=digits", "data.num_samples=24", "scoring=energy", "selection=top_k", "compensation=none", "allocation=uniform",
    "target=components", "evaluation=[]", "evaluation_data=none", "check_data=false", "measure_dense=false",
    "console=plain", "runtime.batch_size=24", "batchnorm=stored",
)  # fmt: skip


def make(folder: Path, *words: str) -> Path:
    """Prune the embedded network within seconds; the run's folder."""
    from modhifi_cli.cli import main

    code = main(["prune", *QUICK, "sparsity=0.3", f"output_dir={folder}", *words])
    assert code == 0, f"the run that is attacked could not be made: exit code {code}"
    return only(folder)


def readers(run: Path) -> dict[str, list[str]]:
    """Commands that read a run, within a second each."""
    own = {"evaluate": ["evaluation=[size]"], "replay": [], "report": []}
    return {verb: [verb, f"run={run}", "console=plain", *words] for verb, words in own.items()}


def only(folder: Path, pattern: str = "prune/embedded/*") -> Path:
    """The only run below a folder."""
    (found,) = folder.glob(pattern)
    return found


def weights(run: Path) -> str:
    """Hash of the weights that a run folder gives."""
    from modhifi_cli.files import artifacts
    from modhifi_cli.graph.surgery import weights_hash

    return weights_hash(artifacts.load_model(run))
