"""An earlier run as a starting point: its network, what that reads, and what opens it elsewhere."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from modhifi_cli.files.disk import read_json
from modhifi_cli.files.run_folder import run_folder
from modhifi_cli.files.saved_network import load_saved
from modhifi_cli.records import LoadedModel


def load(run: str, weights: str | None = None, name: str | None = None) -> LoadedModel:
    """The network of a run as a starting point for another.

    Args:
        run: A finished run's folder, or its ``model`` folder.
        weights: A file with other weights of the same shapes; None takes those that were saved.
        name: For tables and folders; None takes the run's.

    Raises:
        DataError: If it is no finished run, is damaged, or the weights do not fit.
    """
    from modhifi_cli.models.weights import load_weights_

    folder = Path(run)
    if not (folder / "architecture.json").is_file():
        run_folder(folder, needs=("model",))
    loaded = load_saved(folder)
    account = f"network of run {folder.name}, from {loaded.weights}"
    if weights is not None:
        account = f"{load_weights_(loaded.model, weights)}, for the {account}"
        tie = getattr(loaded.model, "tie_weights", None)
        if callable(tie):
            tie()
    model = loaded.model.requires_grad_(False)
    return dataclasses.replace(loaded, model=model, name=name or loaded.name, weights=account)


def reads_text(run: str | os.PathLike[str]) -> bool:
    """Whether the network that a run saved is a language model."""
    folder = Path(run)
    inside = folder / "model" if (folder / "model").is_dir() else folder
    return read_json(inside / "architecture.json", "a saved model").get("reads") == "text"


def opening_of(run: Path) -> dict[str, Any]:
    """What opens the saved network of a language model besides this package: ``by``, ``why``, perhaps ``vllm_deci``."""
    described = read_json(run / "model" / "architecture.json", "a saved model")
    by = "transformers" if described.get("native") else "modhifi"
    return described.get("opens") or {"by": by, "why": "its layers differ in width"}
