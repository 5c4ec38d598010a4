"""Batches of the user's own: a function that gives what the network reads, a ``DataLoader`` say, named by its module.

The samples stay as they are given: nothing is decoded, resized or normalised. Where the network takes several inputs or
something else than images (``model.example``), its wrapper packs each batch.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from modhifi_cli.data.sources import PAPER_SAMPLES, labels_to_read, settings_group
from modhifi_cli.data.tensors import TensorImages, from_batches
from modhifi_cli.errors import ConfigError, DataError, first_line
from modhifi_cli.records import Preprocess


def load(
    *,
    factory: str,
    preprocess: Preprocess,
    labelled: bool,
    labels: str | None = None,
    num_samples: int | str | None = None,
    found: Callable[[str], Callable[..., Any]] | None = None,
    packed: Callable[[Any], tuple[Any, Tensor | None]] | None = None,
) -> TensorImages:
    """Samples, and labels if asked for, from batches.

    Args:
        factory: ``package.module:name`` of a function without arguments that gives batches: tensors, tuples (inputs, labels,
            …) or dictionaries.
        preprocess: Of the model; not applied.
        labelled: Whether labels are read.
        labels: For calibration samples: ``"auto"``, ``"given"`` or ``"model"`` (`labels_to_read`); None for others.
        num_samples: The first so many; None takes all, ``"auto"`` up to 2,000.
        found: Gives the user's function by its name.
        packed: Takes a batch apart into what the network reads, as one tensor, and its labels.

    Raises:
        ConfigError: If the function is not found or fails.
        DataError: If it gives something else than batches, no labels where they are needed, or fewer samples than asked for.
    """
    group = settings_group(labelled=labelled, labels=labels)
    reads = labels_to_read(labelled=labelled, labels=labels)
    if found is None or packed is None:
        raise ConfigError(f"{group}=batches takes batches for a network that reads them; choose another source for text.")
    most = PAPER_SAMPLES if num_samples == "auto" else num_samples
    try:
        given = found(factory)()
    except (ConfigError, DataError):
        raise
    except Exception as error:  # the user's own code may raise anything
        text = first_line(error, "no message").rstrip(".")
        raise ConfigError(
            f"{group}.factory={factory}: it failed with {type(error).__name__}: {text}; it is called without arguments and "
            "gives batches."
        ) from error
    if not hasattr(given, "__iter__"):
        raise DataError(f"{group}.factory={factory}: expected batches one after the other, got a {type(given).__name__}.")

    def part(batch: Any) -> tuple[Any, Tensor | None]:
        inputs, truth = packed(batch)
        return inputs, None if reads == "never" else truth

    source = from_batches(given, most=most, part=part)
    if isinstance(num_samples, int) and len(source) < num_samples:
        raise DataError(f"{group}.num_samples={num_samples}: {factory} gives {len(source)} samples; ask for fewer.")
    if reads == "required" and source.labels is None:
        raise DataError(f"{group}: {factory} gives no labels; give pairs of inputs and labels, or a key 'label'.")
    source.protocol = {**source.protocol, "factory": factory}
    return source
