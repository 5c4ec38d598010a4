"""What keys that hold one number, name or list must be. Keys of a `_target_` are the business of its function."""

import re
from collections.abc import Callable, Mapping
from typing import Any

from modhifi_cli.errors import ConfigError, is_number, is_whole
from modhifi_cli.settings.words import ABSENT, select

SEARCHED = None  # in place of a share that the run shall find
# Keys that hold one number or name, with what they must be. Keys of a `_target_` are the business of its function.
_NUMBERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "sparsity": (
        "a number with 0 <= sparsity < 1 (none with target=max_drop)",
        lambda v: v is SEARCHED or (_is_number(v) and 0 <= v < 1),
    ),
    "round_to": ("a whole number from 1, or auto", lambda v: v == "auto" or (is_whole(v) and v >= 1)),
    "tolerance": ("a number above 0 and at most 0.1", lambda v: _is_number(v) and 0 < v <= 0.1),
    "components": (
        "mlp, attention, experts or several, such as [mlp,attention]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(one in ("mlp", "attention", "experts") for one in v),
    ),
    "query_key": ("true or false", lambda v: isinstance(v, bool)),
    "batchnorm": ("reestimate or stored", lambda v: v in ("reestimate", "stored")),
    "classifier": ("keep, refit or auto", lambda v: v in ("keep", "refit", "auto")),
    "exclude": ("a list of module names, such as [layer4,fc]", lambda v: _is_names(v)),
    "runtime.device": (
        "cpu, cuda or cuda:N", lambda v: isinstance(v, str) and re.fullmatch(r"cpu|cuda(:\d+)?", v) is not None,
    ),
    "runtime.dtype": (
        "float32, float64, bfloat16 or float16", lambda v: v in ("float32", "float64", "bfloat16", "float16"),
    ),
    "runtime.matmul": ("highest or high", lambda v: v in ("highest", "high")),
    "runtime.threads": ("a whole number from 1 to 4096, or null", lambda v: v is None or (is_whole(v) and 1 <= v <= 4096)),
    "runtime.batch_size": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "runtime.seed": ("a whole number from 0", lambda v: is_whole(v) and v >= 0),
    "console.style": ("rich, plain or json", lambda v: v in ("rich", "plain", "json")),
    "data.labels": ("auto, given or model", lambda v: v in ("auto", "given", "model")),
    "schedule.iterations": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "methods": ("a list of presets, such as [paper,magnitude_batchnorm]", lambda v: _is_names(v) and len(v) > 0),
    "budgets": (
        "a list of shares with 0 <= budget < 1, such as [0.2,0.4]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(_is_number(share) and 0 <= share < 1 for share in v),
    ),
    "seeds": (
        "a list of whole numbers from 0, such as [0,1,2]",
        lambda v: isinstance(v, list) and len(v) > 0 and all(is_whole(seed) and seed >= 0 for seed in v),
    ),
    "forget_class": (
        "a number or name of a class, or a list of them, such as [3,5]",
        lambda v: all(is_whole(one) or isinstance(one, str) for one in (v if isinstance(v, list) else [v])),
    ),
    "layers": (
        "auto, 'last N', or a list of layers such as [layer3]",
        lambda v: isinstance(v, str) and v != "" or _is_names(v) and len(v) > 0,
    ),
    "forget_target": ("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "retain_drop": ("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1),
    "verb": ("the name of a verb, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
    "most": ("a whole number from 1", lambda v: is_whole(v) and v >= 1),
    "minutes": ("a number of minutes above 0, or null", lambda v: v is None or (_is_number(v) and v > 0)),
    "check_data": ("true or false", lambda v: isinstance(v, bool)),
    "dry_run": ("true or false", lambda v: isinstance(v, bool)),
    "form": ("array or folder", lambda v: v in ("array", "folder")),
    "cache": ("use, show or clean", lambda v: v in ("use", "show", "clean")),
    "output_dir": ("a folder", lambda v: isinstance(v, str) and v != ""),
    "audit.reference": (
        "a weights file or a run folder, or null", lambda v: v is None or (isinstance(v, str) and v != ""),
    ),
    "library": ("torchvision, timm or transformers", lambda v: isinstance(v, str) and v != ""),
    "pattern": ("a name with * and ?, or a list of such names", lambda v: _is_pattern(v)),
    "again": ("a name with * and ?, a list of such names, or null", lambda v: v is None or _is_pattern(v)),
    "one_per_file": ("true or false", lambda v: isinstance(v, bool)),
    "onnx": ("true or false", lambda v: isinstance(v, bool)),
    "share": ("a share above 0 and below 1", lambda v: _is_number(v) and 0 < v < 1),
    "jobs": ("a whole number from 1, or auto", lambda v: v == "auto" or (is_whole(v) and v >= 1)),
    "memory": ("gigabytes, above 0", lambda v: _is_number(v) and v > 0),
    "timeout": ("seconds, above 0", lambda v: _is_number(v) and v > 0),
    "unverified": ("true or false", lambda v: isinstance(v, bool)),
    "measure_dense": ("true or false", lambda v: isinstance(v, bool)),
    "run": ("a run folder, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
    "runs": ("a list of run folders, such as [DIR1,DIR2]", lambda v: _is_names(v)),
    "resume": ("the folder of an interrupted run, or null", lambda v: v is None or (isinstance(v, str) and v != "")),
}  # fmt: skip


def check_serving(plain: Mapping[str, Any]) -> None:
    """The runtimes that are named exist, are installed and run on the device: found now, not after the pruning.

    Raises:
        ConfigError: With the setting and what to do.
    """
    from modhifi_cli.evaluation.runtimes import runtime

    device = str(select(plain, "runtime.device")).partition(":")[0]
    serve, listed = select(plain, "runtime.serve"), select(plain, "evaluation.latency.runtimes")
    asked = {
        "runtime.serve": () if serve is ABSENT else (serve,),
        "evaluation.latency.runtimes": listed if isinstance(listed, list) else (),
    }
    for place, names in asked.items():
        for name in names:
            runtime(name, place=place, device_type=device)


def check_numbers(plain: Mapping[str, Any]) -> None:
    """Refuse the first value that is not what its key must be.

    Args:
        plain: Settings of a verb.

    Raises:
        ConfigError: With the key, what it must be and what came.
    """
    for key, (expected, fits) in _NUMBERS.items():
        value = select(plain, key)
        if value is not ABSENT and not fits(value):
            raise ConfigError(f"{key} must be {expected}; got {value!r:.100}.")


def _is_number(value: Any) -> bool:
    return is_number(value) and value == value


def _is_pattern(value: Any) -> bool:
    return isinstance(value, str) and value != "" or _is_names(value) and len(value) > 0


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)
