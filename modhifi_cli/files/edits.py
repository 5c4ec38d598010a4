"""Edits on disk: one file each while a run goes on, gathered into ``edits.json`` and ``edits.safetensors`` at its end."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modhifi_cli.errors import DataError
from modhifi_cli.files.disk import as_json, read_json, read_metadata, read_tensors
from modhifi_cli.records import Edit, EditState, ModuleEdit


def load_edits(run: str | os.PathLike[str]) -> tuple[tuple[Edit, ...], str | None]:
    """Edits of a finished or interrupted run, in order, and the hash of the dense weights that they apply to.

    Raises:
        DataError: If files are missing or damaged.
    """
    folder = Path(run)
    if (folder / "edits.json").exists():
        described = read_json(folder / "edits.json", "a saved run")
        tensors = read_tensors(folder / "edits.safetensors")
        edits = []
        if not isinstance(described.get("edits"), list):
            raise DataError(f"{folder / 'edits.json'}: damaged, it has no list of edits; restore the run folder.")
        for index, about in enumerate(described["edits"]):
            prefix = f"{index}/"
            own = {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
            edits.append(unpack_edit(own, about, folder / "edits.safetensors"))
        return tuple(edits), described.get("dense_sha256")
    if not (folder / "edits").is_dir():
        raise DataError(f"{folder}: not a run folder (it has neither edits.json nor edits/).")
    edits, dense_hash = [], None
    for path in sorted((folder / "edits").glob("*.safetensors")):
        tensors, metadata = read_tensors(path), read_metadata(path)
        try:
            about = json.loads(metadata["edit"])
            dense_hash = metadata["dense_sha256"]
        except (KeyError, json.JSONDecodeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove it and what follows it to resume before it.") from error
        edits.append(unpack_edit(tensors, about, path))
    return tuple(edits), dense_hash


def pack_edit(edit: Edit) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An edit as named tensors and a JSON-able description."""
    tensors = {"kept": edit.kept, "removed": edit.removed}
    modules = []
    for index, module in enumerate(edit.modules):
        plain: dict[str, Any] = {}
        for field in dataclasses.fields(module):
            value = getattr(module, field.name)
            if isinstance(value, Tensor):
                tensors[f"{index}.{field.name}"] = value
            elif field.name == "tensors":
                tensors |= {f"{index}.tensors.{name}": tensor for name, tensor in value.items()}
            elif value is not None:
                plain[field.name] = value
        modules.append(plain)
    facts = json.loads(json.dumps(dict(edit.facts), default=as_json))
    described = {"name": edit.name, "iteration": edit.iteration, "modules": modules, "facts": facts}
    return tensors, {**described, "state": dataclasses.asdict(edit.state)}


def unpack_edit(tensors: Mapping[str, Tensor], described: Mapping[str, Any], path: Path) -> Edit:
    try:
        modules = []
        for index, plain in enumerate(described["modules"]):
            given: dict[str, Any] = dict(plain)
            replaced: dict[str, Tensor] = {}
            prefix = f"{index}."
            for key, value in tensors.items():
                if key.startswith(prefix):
                    rest = key[len(prefix) :]
                    if rest.startswith("tensors."):
                        replaced[rest[len("tensors.") :]] = value
                    else:
                        given[rest] = value
            modules.append(ModuleEdit(**given, tensors=replaced))
        return Edit(
            name=described["name"],
            iteration=described["iteration"],
            modules=tuple(modules),
            kept=tensors["kept"],
            removed=tensors["removed"],
            facts=described["facts"],
            state=_unpack_state(described),
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged edit ({error}); restore the run folder.") from error


def _unpack_state(described: Mapping[str, Any]) -> EditState:
    """The state of a saved edit; earlier versions kept it among the facts."""
    if "state" in described:
        return EditState(str(described["state"]["step"]), tuple(described["state"]["stale"]))
    facts, name = described["facts"], described["name"]
    step = "dense" if facts.get("step") == "dense_reference" else name if name in ("batchnorm", "classifier") else "cut"
    return EditState(step, tuple(facts.get("stale_batchnorms", ())))
