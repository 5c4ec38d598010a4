"""Decoders whose weights stay in their files: pages are read when a layer is looked at, and may be dropped again.

A network of 70 billion parameters then needs no copy of itself in the host's memory, and a second one of the same folder
(the dense network beside the pruned one) needs none either. What is written to lies in memory from then on, never in the
file.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_INDEX = "model.safetensors.index.json"


def mapped(folder: Path, config: Any, dtype: torch.dtype | str) -> nn.Module | None:
    """The decoder of a folder with its weights mapped from safetensors files.

    Args:
        folder: As `save_pretrained` writes it.
        config: Its configuration.
        dtype: Of the weights; ``"auto"`` takes the configuration's.

    Returns:
        None where the files do not hold exactly the network's own tensors in that type, so that whoever knows how to
        convert them has to read them: another precision, other names, quantised weights.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    stored = _tensors(folder)
    wanted = config.dtype if dtype == "auto" else dtype
    if not stored or wanted is None or type(config) not in AutoModelForCausalLM._model_mapping:
        return None
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    raised = [getattr(kind, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    if any(raised) and wanted != torch.float32:  # some layers are to be read in another precision
        return None
    with no_init_weights():  # allocated, never touched: takes no memory until the mapped tensors take its place
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    own = model.state_dict()
    if stored.keys() - own.keys() or any(not _alike(stored[name], own[name]) for name in stored):
        return None
    model.load_state_dict(stored, strict=False, assign=True)
    model.tie_weights()
    places = {tensor.data_ptr() for tensor in stored.values()}
    if any(tensor.data_ptr() not in places for tensor in model.state_dict().values()):
        return None
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, mapped; nothing where there are none, or they repeat a name."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        index = json.loads((folder / _INDEX).read_text(encoding="utf-8")) if (folder / _INDEX).is_file() else None
        names = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
        if any(Path(name).name != name or not (folder / name).is_file() for name in names):
            return {}
        parts = [load_file(folder / name) for name in names]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return {}  # transformers says what is wrong with them
    found = {name: tensor for part in parts for name, tensor in part.items()}
    return found if len(found) == sum(map(len, parts)) else {}


def _alike(stored: Tensor, own: Tensor) -> bool:
    return stored.shape == own.shape and stored.dtype == own.dtype
