"""Classification networks of torchvision, with the library's weights and preprocessing.

Weights are asked for by the library's own names (``IMAGENET1K_V1``), ``default`` being its recommendation; each set of
weights brings the preprocessing it was trained for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, adjusted
from modhifi_cli.models.weights import fit_weights_, library_weights_missing, load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

# The published weights of these two expect the input transformed inside the network, and their auxiliary classifiers
# serve training only.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")


def build(*, name: str, num_classes: int | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """An untrained network in evaluation mode.

    Args:
        name: torchvision's name of a classification network, ``resnet50``.
        num_classes: Number of logits; None means the library's, 1,000.
        options: Further arguments of torchvision's constructor.

    Raises:
        ConfigError: If the name is unknown or the constructor refuses an option.
    """
    import torchvision

    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        raise ConfigError(f"model.name: torchvision has no classification network '{name}', {nearest(name, names)}")
    arguments = {**_OPTIONS.get(name, {}), **(options or {})}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        return torchvision.models.get_model(name, weights=None, **arguments).eval()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options: torchvision's {name} does not take {arguments} ({error}).") from error


def load(
    *,
    name: str,
    weights: str = "default",
    seed: int = 0,
    num_classes: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """A torchvision classification network.

    Args:
        name: torchvision's name, ``resnet50``.
        weights: ``"default"``, one of the library's names for this network (``"IMAGENET1K_V1"``), ``"random"``, or a
            file.
        seed: Of random weights.
        num_classes: Number of logits; None means the library's, 1,000.
        preprocess: Fields of the preprocessing to replace. With a file or random weights the library's default weights'
            preprocessing is the starting point.
        options: Further arguments of torchvision's constructor.

    Raises:
        ConfigError: If the name, the weights' name or an option is unknown, or `num_classes` contradicts the library's
            weights.
        DataError: If the library cannot fetch its weights, or the file cannot be read or does not fit.
    """
    import torchvision

    with seeded_initialisation(seed):
        model = build(name=name, num_classes=num_classes, options=options)
    published = torchvision.models.get_model_weights(name)
    chosen = published.DEFAULT if weights == "default" else getattr(published, weights, None)
    if weights == "random":
        account = f"random (seed {seed})"
    elif chosen is not None:
        account = _load_published_(model, chosen, name=name, num_classes=num_classes)
    elif weights.isidentifier() and weights.isupper() and not Path(weights).exists():
        known = [member.name for member in published]
        raise ConfigError(f"model.weights: {name} has no published weights '{weights}', {nearest(weights, known)}")
    else:
        account = load_weights_(model, weights)
    described = chosen or published.DEFAULT
    categories = tuple(described.meta["categories"])
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(_preprocess(described), preprocess),
        architecture={
            "builder": "modhifi_cli.models.torchvision.build",
            "kwargs": {"name": name, "num_classes": num_classes, "options": dict(options or {})},
        },
        weights=account,
        classes=categories if num_classes in (None, len(categories)) else None,
    )


def _load_published_(model: nn.Module, chosen: Any, *, name: str, num_classes: int | None) -> str:
    published_classes = len(chosen.meta["categories"])
    if num_classes not in (None, published_classes):
        raise ConfigError(
            f"model.num_classes: the published weights of {name} have {published_classes} classes, got {num_classes}; "
            "set model.num_classes=null, or model.weights=FILE or random."
        )
    try:
        tensors = chosen.get_state_dict(progress=False, check_hash=True)
    # Offline, behind a proxy or with a broken cache the library lets through whatever its downloader raised.
    except Exception as error:
        raise library_weights_missing(library="torchvision", name=f"{name} ({chosen.name})", error=error) from error
    fit_weights_(model, tensors, source=f"torchvision {chosen}", ignored=_AUXILIARY)
    return f"torchvision {chosen}"


def _preprocess(published: Any) -> Preprocess:
    transforms = published.transforms()
    crop, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocess(
        size=(crop, crop),
        mean=tuple(getattr(transforms, "mean", IMAGENET_MEAN)),
        std=tuple(getattr(transforms, "std", IMAGENET_STD)),
        resize=resize,
        interpolation=transforms.interpolation.value,
    )
