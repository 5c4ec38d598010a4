"""What the files of a language model's folder may not say, since transformers would act on it.

A configuration can name code (``auto_map``), another repository, a kernel to fetch, an adapter, or files elsewhere; the
library follows all of these. A folder that was written here says them in one case: where layers differ in width, the
file of `modhifi_cli.models.uneven` lies beside the weights and ``config.json`` names it. That file is never run here. It
is let through as this package writes it, and in a folder that this user made on this machine as it was written then.
"""

import os
import re
from collections.abc import Collection, Mapping
from typing import Any

from modhifi_cli.errors import DataError, is_number
from modhifi_cli.files.manifest import NAME, Checked, made_here

_STRANGE = ("adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin", "quantize_config.json")
_KEYS = re.compile(
    r"auto_map|remote_code|quantization_config|base_model_name_or_path|kernel|custom_generate|custom_pipelines"
    r"|attn_implementation|experts_implementation|adapter"
)
_FILE_KEYS = re.compile(r"_file$|_path$|_dir$|^file|^path")
_ORDINARY = (None, False, "eager", "sdpa", [], {})
_PLAIN_NAME = re.compile(r"[\w.-]+")
_DEEPEST = 64


def refuse_reaching(files: Checked) -> None:
    """Refuse a folder whose files would make transformers import, fetch or open something else.

    Args:
        files: Of the ``model`` folder.

    Raises:
        DataError: Naming file and key.
    """
    present = {entry.name for entry in os.scandir(files.folder)}
    ours = _own_code(files, present)
    strange = next((name for name in sorted(present - {ours}) if _is_strange(name)), None)
    if strange is not None:
        raise DataError(f"{files.folder / strange}: a saved network has no such file; remove it if you know it.")
    stray = next((name for name in files.strangers() if name.endswith((".json", ".safetensors", ".model", ".jinja"))), None)
    if stray is not None:
        raise DataError(f"{files.folder / stray}: was not written with the network; remove it.")
    for name in sorted(present):
        if name.endswith(".json") and name != NAME:
            told = files.object(name)
            if name == "config.json" and ours is not None:
                told = {key: value for key, value in told.items() if key != "auto_map"}
            if name.endswith(".index.json"):
                _check_index(told, f"{files.folder / name}", present)
            elif name != "tokenizer.json":  # plain data; its vocabulary holds any word
                _check(told, f"{files.folder / name}", 0)


def _is_strange(name: str) -> bool:
    return name in _STRANGE or name.endswith((".py", ".bin", ".pt"))


def _own_code(files: Checked, present: Collection[str]) -> str | None:
    """The name of the file of code that belongs to layers of unequal widths; None where none lies there.

    Raises:
        DataError: If the file is not what this package writes, or the configuration names other code.
    """
    from modhifi_cli.models import uneven

    if uneven.FILE not in present or "config.json" not in present:
        return None
    told = files.object("config.json")
    kind = str(told.get("model_type")).removeprefix(uneven.PREFIX)
    if kind not in uneven.FAMILIES or told.get("auto_map") != uneven.auto_map(kind):
        return None
    if files.text(uneven.FILE) != uneven.code_of(kind) and not made_here(files.folder):
        raise DataError(
            f"{files.folder / uneven.FILE}: is not the code that this version of modhifi writes, and the folder was "
            "not made by you on this machine; get the folder anew from whoever made it, or prune the network again."
        )
    return uneven.FILE


def _check(told: Any, where: str, depth: int) -> None:
    if depth > _DEEPEST:
        raise DataError(f"{where}: nested too deep; restore the run folder.")
    if isinstance(told, list):
        for one in told:
            _check(one, where, depth + 1)
    if not isinstance(told, Mapping):
        return
    for key, value in told.items():
        # A convolution's size opens nothing; by other names a 1 may be a yes.
        if _KEYS.search(key) and value not in _ORDINARY and not ("kernel" in key and is_number(value)):
            raise DataError(
                f"{where}: '{key}' would make transformers import or fetch something, which a folder may not ask for; "
                "remove it if you know it."
            )
        if _FILE_KEYS.search(key) and isinstance(value, str) and _leads_out(value):
            raise DataError(f"{where}: '{key}' names {value[:80]!r}, outside the folder; remove it.")
        _check(value, where, depth + 1)


def _leads_out(value: str) -> bool:
    return re.search(r"[/\\~:]|\.\.", value) is not None


def _check_index(told: Mapping[str, Any], where: str, present: set[str]) -> None:
    named = told.get("weight_map")
    names = set(named.values()) if isinstance(named, Mapping) and all(isinstance(v, str) for v in named.values()) else None
    if names is None or not all(_PLAIN_NAME.fullmatch(name) and name in present for name in names):
        raise DataError(f"{where}: damaged, it names files that are not in the folder; restore the run folder.")
