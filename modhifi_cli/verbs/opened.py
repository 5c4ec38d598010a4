"""A finished run that a verb reads, with what the user said about it: ``unverified`` and ``model.trust``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import artifacts
from modhifi_cli.records import Edit, LoadedModel
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces


@dataclass(frozen=True)
class OpenedRun:
    """A run folder.

    Attributes:
        folder: Where it lies.
        trust: Whether the user said that it may name code of their own and files outside.
        unverified: Whether the user said that it may have no checksums.
    """

    folder: Path
    trust: bool
    unverified: bool

    def settings(self, *keys: str) -> dict[str, Any]:
        """Those of the run's settings that are about to be used, if a folder may say them.

        Raises:
            ConfigError: If one leads out of the folder and nobody allowed it.
            DataError: If ``config.yaml`` is damaged.
        """
        before = pieces.settings_of(self.folder, unverified=self.unverified)
        self.refuse_reaching(before, *keys)
        return {key: before[key] for key in keys if key in before}

    def refuse_reaching(self, before: Mapping[str, Any], *keys: str) -> None:
        """Refuse what the run's settings may not say under these keys.

        Raises:
            ConfigError: As `settings`.
        """
        config.refuse_reaching(before, keys, made_here=artifacts.made_here(self.folder), trust=self.trust)

    def without_reaching(self, before: Mapping[str, Any]) -> dict[str, Any]:
        """The settings without the data that they may not name: a new run of ours shall not vouch for them."""
        kept = dict(before)
        for key in ("data", "evaluation_data"):
            try:
                self.refuse_reaching(kept, key)
            except ConfigError:
                kept[key] = None
        return kept

    def build(self, node: Mapping[str, Any]) -> Any:
        """What a node of the run's settings stands for; the user's own code only if it was allowed."""
        named = node["_target_"]
        return config.build(node, allow=(named,) if self.trust else ())

    def network(self, weights: str | None = None) -> LoadedModel:
        """The saved network, or with the weights of a file in place of its own, perhaps the saved file trained since."""
        loaded = artifacts.load_saved(self.folder, allow=self.trust, unverified=self.unverified, replaced=weights)
        return loaded if weights is None else artifacts.with_weights(loaded, weights)

    def edits(self) -> tuple[tuple[Edit, ...], str | None]:
        """The edits, and the hash of the dense weights they apply to."""
        return artifacts.load_edits(self.folder, unverified=self.unverified)

    def record(self) -> dict[str, Any]:
        """What was allowed, for the results of whoever read the run."""
        return {"trusted": self.trust, "unverified": self.unverified}


def open_run(
    settings: Mapping[str, Any],
    console: Console,
    *,
    needs: Sequence[str] = ("config.yaml", "results.json", "edits.json", "edits.safetensors", "model"),
) -> OpenedRun:
    """The run that ``run=DIR`` names, whole; a change of the user's own code that makes its network is told.

    Raises:
        DataError: If it is interrupted, lacks files, or holds links.
    """
    folder = artifacts.run_folder(settings["run"], needs=needs)
    opened = OpenedRun(folder, bool(settings.get("trust")), bool(settings.get("unverified")))
    changed = artifacts.code_changed(folder, allow=opened.trust)
    if changed is not None:
        console.warning(changed)
    if opened.unverified and not (folder / artifacts.CHECKSUMS).exists():
        console.warning(f"{folder} has no checksums: whether its files are what was written, nobody can tell")
    return opened
