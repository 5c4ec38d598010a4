"""TensorBoard: what a run measured as scalars, its groups and trials as curves, its command as hyperparameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modhifi_cli.errors import DataError, need_packages
from modhifi_cli.files.disk import make_folder
from modhifi_cli.records import Results


@dataclass(frozen=True)
class TensorBoard:
    """Writes event files that TensorBoard reads.

    Attributes:
        folder: Holds one folder a run.

    Raises:
        ConfigError: If the package is not installed: said before the run, not after it.
    """

    folder: str

    def __post_init__(self) -> None:
        need_packages("tracker=tensorboard", "tensorboard")

    def write(self, run: Path, results: Results, words: Mapping[str, str]) -> Path:
        """Write what a finished run measured, and return where.

        Args:
            run: Its folder, ``…/VERB/NETWORK/NAME``.
            results: Of it.
            words: Settings of its command, key → value.

        Raises:
            DataError: If the folder cannot be written.
        """
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        place = Path(self.folder, *run.parts[-3:])
        make_folder(place)
        measured = _measured(results)
        try:
            with SummaryWriter(str(place)) as writer:
                for name, value in measured.items():
                    writer.add_scalar(name, value, 0)
                for name, values in _curves(results).items():
                    for step, value in enumerate(values):
                        writer.add_scalar(name, value, step)
                for summary in hparams({"verb": results.verb, "model": results.model, **words}, measured):
                    writer.file_writer.add_summary(summary)
        except OSError as error:
            raise DataError(f"tracker.folder: {place} cannot be written ({error}); give another folder.") from error
        return place


def _measured(results: Results) -> dict[str, float]:
    """Measured terms by network and shares removed, each under one name for all runs."""
    found = {f"{one.name}/{one.model}": float(one.value) for one in results.measurements}
    audited = (results.audit or {}).get("measurements", ())
    found |= {f"{one['name']}/{one['model']}": float(one["value"]) for one in audited}
    return found | {f"removed/{name}": 100 * float(share) for name, share in results.achieved.items()}


def _curves(results: Results) -> dict[str, list[float]]:
    """Share kept along the groups in forward order, and every number of the trials along the trials."""
    shares = [group["kept"] / (group["kept"] + group["removed"]) for group in results.groups if "removed" in group]
    found = {"groups/kept": shares} if shares else {}
    for key in dict.fromkeys(key for trial in results.trials for key in trial):
        numbers: list[Any] = [trial.get(key) for trial in results.trials]
        if all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
            found[f"trials/{key}"] = numbers
    return found
