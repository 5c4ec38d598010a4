"""Image networks of transformers: from a folder in Hugging Face's layout, or untrained from its configuration.

They answer with a record of several tensors and take ``pixel_values``; here they stand in a wrapper that takes an image
batch and gives the logits, or, where the network names none, everything it says, side by side.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, UnsupportedModelError, first_line
from modhifi_cli.graph.inputs import check_images
from modhifi_cli.models.called import side_by_side
from modhifi_cli.models.hf import quiet
from modhifi_cli.models.preprocessing import adjusted, named_classes
from modhifi_cli.models.weights import fit_weights_, load_weights_, seeded_initialisation, weights_files
from modhifi_cli.records import LoadedModel, Preprocess

_RESAMPLE = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Pictures(nn.Module):
    """The wrapper.

    Args:
        network: A network of transformers that takes ``pixel_values``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[batch, channels, height, width]`` → logits ``[batch, classes]``, or all that is said."""
        answer = self.network(pixel_values=images)
        logits = answer.get("logits") if isinstance(answer, Mapping) else None
        return side_by_side(answer if logits is None else logits, images.shape[0])


def build(*, config: Mapping[str, Any], kind: str) -> nn.Module:
    """An untrained network in evaluation mode.

    Args:
        config: Its configuration with ``model_type``.
        kind: Name of its class in transformers, ``"ViTForImageClassification"``.

    Raises:
        DataError: If the configuration does not hold together, or names no class of transformers.
    """
    import transformers

    made = getattr(transformers, kind, None) if kind.isidentifier() else None
    if not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel):
        raise DataError(f"model.path: transformers has no network '{kind}'; set `architectures` in config.json to its class.")
    values = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with quiet():
            return Pictures(made(transformers.AutoConfig.for_model(config["model_type"], **values))).eval()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, ImportError) as error:
        text = first_line(error).rstrip(".")
        raise DataError(f"model.path: config.json does not make a {kind} ({text}); copy the folder again.") from error


def load(
    *,
    path: str,
    weights: str = "default",
    seed: int = 0,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
) -> LoadedModel:
    """An image network of transformers from a folder.

    Args:
        path: Folder with ``config.json`` (and weights, unless they are random). Nothing is fetched and no code of it runs.
        weights: ``"default"``: those of the folder; ``"random"``; or a file.
        seed: Of random weights.
        preprocess: Fields of the preprocessing to replace; the folder's ``preprocessor_config.json`` comes first.
        classes: Names of the classes in the order of the logits; None: those of the configuration, where it names them.
        name: Short name for tables and folders; None takes the folder's.

    Raises:
        ConfigError: If a setting is wrong.
        DataError: If the folder lacks its configuration or weights, or these do not fit.
        UnsupportedModelError: If the network reads something else than images.
    """
    folder = Path(os.path.expanduser(path))
    config = _json(folder / "config.json", needed=True)
    config.pop("_name_or_path", None)  # where it lay before
    config.pop("text_config", None)  # of the other tower, which a classifier of images does not have
    kinds = config.get("architectures")
    if "model_type" not in config or not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        raise DataError(f"{folder / 'config.json'}: names no model_type and architectures; copy the folder again.")
    with seeded_initialisation(seed):
        model = build(config=config, kind=kinds[0])
    network: Any = model.network  # one of transformers' classes
    if getattr(network, "main_input_name", "pixel_values") != "pixel_values":
        raise UnsupportedModelError(
            f"model=hf_vision: {kinds[0]} reads {network.main_input_name}, not images; use model=hf for a language model, or "
            "modhifi_cli.prune in Python with a function of model and batch (forward=)."
        )
    if weights == "random":
        account = f"random (seed {seed}), configuration of {folder}"
    elif weights == "default":
        account = _load_published_(network, folder)
    else:
        account = load_weights_(network, weights)
    said = _json(folder / "preprocessor_config.json")
    wanted = adjusted(_preprocess(said, config, sized="size" in (preprocess or {})), preprocess)
    example = torch.randn((2, len(wanted.mean), *wanted.size), generator=torch.Generator().manual_seed(0))
    logits = check_images(model, example)
    return LoadedModel(
        model=model,
        name=name or folder.name,
        preprocess=wanted,
        architecture={"builder": "modhifi_cli.models.hf_vision.build", "kwargs": {"config": config, "kind": kinds[0]}},
        weights=account,
        classes=named_classes(classes, logits.shape[1]) or _labels(network, logits.shape[1]),
    )


def _load_published_(network: Any, folder: Path) -> str:
    """The folder's weights, under whatever names the library of the time gave them; the account of them."""
    files = weights_files(folder)
    try:
        with quiet():
            found, told = type(network).from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        text = first_line(error).rstrip(".")
        raise DataError(f"model.path: the weights of {folder} cannot be read ({text}); copy the folder again.") from error
    missing = sorted(told["missing_keys"])
    if missing:
        raise DataError(
            f"model.path: {folder} lacks {len(missing)} weights of {type(network).__name__}, {missing[0]} the first; give the "
            "folder of a whole network, or model.weights=random."
        )
    fit_weights_(network, found.state_dict(), source=str(folder))
    return f"{folder} ({', '.join(file.name for file in files)})"


def _json(file: Path, *, needed: bool = False) -> dict[str, Any]:
    if not file.is_file() and not needed:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"model.path: {file} cannot be read ({type(error).__name__}); give a folder in Hugging Face's layout."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"model.path: {file} holds no settings; give a folder in Hugging Face's layout.")
    return content


def _preprocess(found: Mapping[str, Any], config: Mapping[str, Any], *, sized: bool) -> Preprocess:
    """What the folder says of its images; the configuration's size and 0.5 where it says nothing.

    Args:
        found: Of ``preprocessor_config.json``.
        config: Of ``config.json``.
        sized: Whether the user sets the size, so that the folder's may be anything.
    """
    crop = found.get("crop_size") if found.get("do_center_crop") else None
    height, width = (1, 1) if sized else _size(crop or found.get("size") or config.get("image_size") or 224)
    shorter = found["size"].get("shortest_edge") if isinstance(found.get("size"), Mapping) else None
    channels = config.get("num_channels", 3)
    return Preprocess(
        size=(height, width),
        mean=tuple(found.get("image_mean") or [0.5] * channels),
        std=tuple(found.get("image_std") or [0.5] * channels),
        resize=shorter,
        interpolation=_RESAMPLE.get(found.get("resample", 2), "bilinear"),
    )


def _size(given: Any) -> tuple[int, int]:
    value = given
    if isinstance(given, Mapping):
        edge = given.get("shortest_edge")
        value = [given.get("height", edge), given.get("width", edge)]
    pair = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    if len(pair) != 2 or not all(isinstance(edge, int) and edge > 0 for edge in pair):
        raise ConfigError(f"model.preprocess.size: the folder gives {given!r}, expected pixels; set it yourself.")
    return pair[0], pair[1]


def _labels(network: nn.Module, logits: int) -> tuple[str, ...] | None:
    names = getattr(network.config, "id2label", None) or {}
    found = tuple(str(names[number]) for number in range(logits)) if set(names) == set(range(logits)) else None
    return None if found is None or found == tuple(f"LABEL_{number}" for number in range(logits)) else found
