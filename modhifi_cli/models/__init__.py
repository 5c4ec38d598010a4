"""Where networks come from: one file per source or family, each with `load` (a `LoadedModel`) and `build` (untrained).

Nothing heavy is imported here; libraries are imported inside the functions that use them.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from modhifi_cli.errors import DataError

if TYPE_CHECKING:
    from torch import nn

_PREFIX = "modhifi_cli.models."


def build_architecture(architecture: Mapping[str, Any]) -> "nn.Module":
    """The network that an architecture description stands for, dense, with untrained weights, in evaluation mode.

    The description comes from a file, so only functions inside `modhifi_cli.models` are ever called.

    Args:
        architecture: ``{"builder": "modhifi_cli.models.X.build", "kwargs": {...}}``; other keys are not looked at.

    Raises:
        DataError: If the description names no builder of this package, or one that refuses its arguments.
    """
    builder = architecture.get("builder") if isinstance(architecture, Mapping) else None
    kwargs = architecture.get("kwargs", {}) if isinstance(architecture, Mapping) else {}
    if not isinstance(builder, str) or not builder.startswith(_PREFIX) or not isinstance(kwargs, Mapping):
        raise DataError(
            f"architecture description: expected a builder under {_PREFIX}* with kwargs, got {builder!r}; "
            "the file is damaged or was not written by modhifi, save the model again."
        )
    module_name, _, function_name = builder.rpartition(".")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise DataError(
            f"architecture description: builder {builder} does not exist in this version of modhifi ({error}); "
            "install the version that wrote the file."
        ) from error
    try:
        model = function(**kwargs)
    except TypeError as error:
        raise DataError(
            f"architecture description: {builder} does not take {dict(kwargs)} ({error}); "
            "the file is damaged or was written by another version of modhifi."
        ) from error
    return model.eval()
