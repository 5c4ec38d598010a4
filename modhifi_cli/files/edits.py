"""Edits on disk: one file each while a run goes on, gathered into ``edits.json`` and ``edits.safetensors`` at its end.

Each carries its SHA-256, in its name while the run goes on and in the run's list of checksums afterwards.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modhifi_cli.errors import DataError
from modhifi_cli.files import manifest
from modhifi_cli.files.disk import (
    FORMAT_VERSION,
    as_json,
    as_metadata,
    as_tensors,
    read_bytes,
    refuse_links,
    to_bytes,
    write_bytes,
    write_json,
)
from modhifi_cli.records import Edit, EditState, ModuleEdit

FOLDER = "edits"  # of an interrupted run


def load_edits(run: str | os.PathLike[str], *, unverified: bool = False) -> tuple[tuple[Edit, ...], str | None]:
    """Edits of a finished or interrupted run, in order, and the hash of the dense weights that they apply to.

    Args:
        run: The folder.
        unverified: Whether a finished run without checksums may be read.

    Raises:
        DataError: If files are missing, damaged or other than were written.
    """
    folder = Path(run)
    listed = os.path.lexists(folder / manifest.NAME)  # of a finished run; its edits/ may be on their way out
    if os.path.lexists(folder / "edits.json") and (listed or not (folder / FOLDER).is_dir()):
        return _gathered(manifest.checked(folder, unverified=unverified))
    if not (folder / FOLDER).is_dir():
        raise DataError(f"{folder}: not a run folder (it has neither edits.json nor edits/).")
    refuse_links(folder / FOLDER)
    edits: list[Edit] = []
    dense_hash = None
    for number, path in enumerate(sorted((folder / FOLDER).glob("*.safetensors"))):
        content = read_bytes(path)
        _check_name(path, number, content)
        tensors, metadata = as_tensors(content, path), as_metadata(content, path)
        try:
            about = json.loads(metadata["edit"])
            dense_hash = metadata["dense_sha256"]
        except (KeyError, ValueError, RecursionError) as error:
            raise DataError(f"{path}: damaged ({error}); remove it and what follows it to resume before it.") from error
        edits.append(unpack_edit(tensors, about, path))
    return tuple(edits), dense_hash


def save_edit(folder: Path, edit: Edit, dense_hash: str) -> None:
    """Put an edit behind those in ``folder/edits``; it is whole or absent, never half.

    Its name ends in the SHA-256 of its content, so that no separate list can get out of step with it.
    """
    tensors, described = pack_edit(edit)
    number = len(list((folder / FOLDER).glob("*.safetensors")))
    metadata = {"edit": json.dumps(described), "dense_sha256": dense_hash, "format_version": str(FORMAT_VERSION)}
    content = to_bytes(tensors, metadata)
    digest = hashlib.sha256(content).hexdigest()
    write_bytes(folder / FOLDER / f"{number:04d}.{digest}.safetensors", content)


def gather_edits(folder: Path) -> None:
    """All edits of ``folder/edits`` as ``edits.safetensors`` and ``edits.json``."""
    edits, dense_hash = load_edits(folder)
    tensors: dict[str, Tensor] = {}
    described = []
    for index, edit in enumerate(edits):
        own, about = pack_edit(edit)
        tensors |= {f"{index}/{key}": value for key, value in own.items()}
        described.append(about)
    write_bytes(folder / "edits.safetensors", to_bytes(tensors))
    told = {"format_version": FORMAT_VERSION, "dense_sha256": dense_hash, "edits": described}
    write_json(folder / "edits.json", told)


def _gathered(files: manifest.Checked) -> tuple[tuple[Edit, ...], str | None]:
    described, tensors = files.object("edits.json"), files.tensors("edits.safetensors")
    place = files.folder / "edits.safetensors"
    if not isinstance(described.get("edits"), list):
        raise DataError(f"{files.folder / 'edits.json'}: damaged, it has no list of edits; restore the run folder.")
    own: list[dict[str, Tensor]] = [{} for _ in described["edits"]]
    for key, tensor in tensors.items():
        number, _, name = key.partition("/")
        if not number.isdecimal() or int(number) >= len(own):
            raise DataError(f"{place}: damaged, '{key}' belongs to no edit; restore the run folder.")
        own[int(number)][name] = tensor
    edits = tuple(unpack_edit(one, about, place) for one, about in zip(own, described["edits"], strict=True))
    return edits, described.get("dense_sha256")


def _check_name(path: Path, number: int, content: bytes) -> None:
    """An edit's name says its place and its content."""
    told, _, digest = path.name.removesuffix(".safetensors").partition(".")
    if not digest:
        raise DataError(
            f"{path}: written by an older version without a checksum, so nobody can tell whether it is what was written; "
            "start a new run."
        )
    if told != f"{number:04d}":
        raise DataError(f"{path}: the edits before it are missing ({number:04d} is next); start a new run.")
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(
            f"{path}: damaged, its sha256 is not the one in its name; remove it and what follows it to resume before it."
        )


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
    """One edit from its tensors and description."""
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
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path}: damaged edit ({error}); restore the run folder.") from error


def _unpack_state(described: Mapping[str, Any]) -> EditState:
    """The state of a saved edit; earlier versions kept it among the facts."""
    if "state" in described:
        return EditState(str(described["state"]["step"]), tuple(described["state"]["stale"]))
    facts, name = described["facts"], described["name"]
    step = "dense" if facts.get("step") == "dense_reference" else name if name in ("batchnorm", "classifier") else "cut"
    return EditState(step, tuple(facts.get("stale_batchnorms", ())))
