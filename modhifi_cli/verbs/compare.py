"""`modhifi compare`: several methods on one protocol."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.verbs import comparison, pieces
from modhifi_cli.verbs.prune import prune


def compare(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    pieces.require_data(settings)

    def shared(kept: Path) -> comparison.Shared:
        return comparison.Shared(
            settings,
            load=functools.partial(pieces.sources, console=console),
            source=functools.partial(pieces.image_source, console=console),
            wants_labels=pieces.wants_labels,
            measure=pieces.measure,
            device=pieces.device_of(settings),
            dtype=pieces.dtype_of(settings),
            kept=kept,
        )

    return comparison.compare(
        settings,
        facts["overrides"],
        console,
        shared=shared,
        prune=prune,
        portable=pieces.portable,
        command=pieces.command_line("compare", facts["overrides"]),
    )
