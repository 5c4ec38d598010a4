"""An earlier run as a starting point: its network, what that reads, and what opens it elsewhere."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from modhifi_cli.files.disk import read_object
from modhifi_cli.files.run_folder import run_folder
from modhifi_cli.files.saved_network import load_saved
from modhifi_cli.records import LoadedModel


def load(
    run: str, weights: str | None = None, name: str | None = None, allow: str | bool = False
) -> LoadedModel:
    """The network of a run as a starting point for another.

    Args:
        run: A finished run's folder, or its ``model`` folder.
        weights: A file with other weights of the same shapes; None takes those that were saved.
        name: For tables and folders; None takes the run's.
        allow: The user's own code that makes the network, ``"package.module:function"``, where it is made so.

    Raises:
        DataError: If it is no finished run, is damaged, or the weights do not fit.
    """
    folder = Path(run)
    if not (folder / "architecture.json").is_file():
        run_folder(folder, needs=("model",))
    loaded = load_saved(folder, allow=allow, replaced=weights)
    loaded = dataclasses.replace(loaded, weights=f"network of run {folder.name}, from {loaded.weights}")
    loaded = loaded if weights is None else with_weights(loaded, weights)
    loaded.model.requires_grad_(False)
    return loaded if name is None else dataclasses.replace(loaded, name=name)


def with_weights(loaded: LoadedModel, weights: str) -> LoadedModel:
    """A network with the weights of a file, such as one that was fine-tuned since; shapes must be the same.

    Raises:
        DataError: If the file cannot be read or does not fit.
    """
    from modhifi_cli.models.weights import load_weights_

    account = f"{load_weights_(loaded.model, weights)}, for the {loaded.weights}"
    tie = getattr(loaded.model, "tie_weights", None)
    if callable(tie):
        tie()
    return dataclasses.replace(loaded, weights=account)


def reads_text(run: str | os.PathLike[str]) -> bool:
    """Whether the network that a run saved is a language model."""
    folder = Path(run)
    inside = folder / "model" if (folder / "model").is_dir() else folder
    return read_object(inside / "architecture.json", "a saved model").get("reads") == "text"


def opening_of(run: Path) -> dict[str, Any]:
    """What opens the saved network of a language model besides this package: ``by``, ``why``, perhaps ``vllm_deci``."""
    described = read_object(run / "model" / "architecture.json", "a saved model")
    by = "transformers" if described.get("native") else "modhifi"
    return described.get("opens") or {"by": by, "why": "" if by == "transformers" else "an older version made it and did not say why"}
