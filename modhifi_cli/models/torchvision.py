"""Classification, segmentation and detection networks of torchvision, with the library's weights and preprocessing.

Networks that do not answer an image batch with one tensor stand in an adapter (`image_batch.py`). Weights are asked for
by the library's own names (``IMAGENET1K_V1``), ``default`` being its recommendation; each set of weights brings the
preprocessing it was trained for.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.models.image_batch import DetectionParts, SegmentationMap
from modhifi_cli.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD, adjusted, named_classes
from modhifi_cli.models.weights import fit_weights_, library_weights_missing, load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

# The published weights of these two expect the input transformed inside the network, and their auxiliary classifiers
# serve training only.
_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "transform_input": True, "init_weights": True},
    "inception_v3": {"aux_logits": False, "transform_input": True, "init_weights": True},
}
# Networks whose forward is made to fit, by the room of the library that holds them.
_ADAPTED = ("detection", "segmentation")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")


def names() -> dict[str, list[str]]:
    """Names of the image networks by what they do: ``classification``, ``detection``, ``segmentation``."""
    import torchvision.models as library

    found = {"classification": library.list_models(module=library)}
    return found | {kind: library.list_models(module=getattr(library, kind)) for kind in _ADAPTED}


def kind_of(name: str) -> str | None:
    """What a network does, or None for an unknown name."""
    return next((kind for kind, known in names().items() if name in known), None)


def build(*, name: str, num_classes: int | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """An untrained network in evaluation mode.

    Args:
        name: torchvision's name of a classification, detection or segmentation network, ``resnet50``.
        num_classes: Number of classes; None means the library's.
        options: Further arguments of torchvision's constructor.

    Raises:
        ConfigError: If the name is unknown or the constructor refuses an option.
    """
    import torchvision

    kind = kind_of(name)
    if kind is None:
        known = [each for found in names().values() for each in found]
        raise ConfigError(f"model.name: torchvision has no image network '{name}', {nearest(name, known)}")
    arguments = {**_OPTIONS.get(name, {}), **(options or {})}
    if kind in _ADAPTED:
        arguments = {"weights_backbone": None, **arguments}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        network = torchvision.models.get_model(name, weights=None, **arguments).eval()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options: torchvision's {name} does not take {arguments} ({error}).") from error
    adapter = {"detection": DetectionParts, "segmentation": SegmentationMap}.get(kind)
    return network if adapter is None else adapter(network).eval()


def load(
    *,
    name: str,
    weights: str = "default",
    seed: int = 0,
    num_classes: int | None = None,
    preprocess: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
) -> LoadedModel:
    """A torchvision network of classification, detection or segmentation.

    Args:
        name: torchvision's name, ``resnet50``.
        weights: ``"default"``, one of the library's names for this network (``"IMAGENET1K_V1"``), ``"random"``, or a
            file.
        seed: Of random weights.
        num_classes: Number of logits; None means the library's, 1,000.
        preprocess: Fields of the preprocessing to replace. With a file or random weights the library's default weights'
            preprocessing is the starting point.
        options: Further arguments of torchvision's constructor.
        classes: Names of the classes in the order of the logits; None: the library's where it knows them.

    Raises:
        ConfigError: If the name, the weights' name or an option is unknown, `num_classes` contradicts the library's
            weights, or `classes` are not as many as the logits.
        DataError: If the library cannot fetch its weights, or the file cannot be read or does not fit.
    """
    import torchvision

    with seeded_initialisation(seed):
        model = build(name=name, num_classes=num_classes, options=options)
    published = torchvision.models.get_model_weights(name)
    if weights not in ("random",) and isinstance(model, DetectionParts) and not Path(weights).exists():
        raise ConfigError(
            f"model.weights: published weights of detection networks are not read, since {name} comes with them in "
            "another form (frozen BatchNorm); give model.weights=FILE or random."
        )
    chosen = published.DEFAULT if weights == "default" else getattr(published, weights, None)
    if weights == "random":
        account = f"random (seed {seed})"
    elif chosen is not None:
        account = _load_published_(model, chosen, name=name, num_classes=num_classes)
    elif weights.isidentifier() and weights.isupper() and not Path(weights).exists():
        known = [member.name for member in published]
        raise ConfigError(f"model.weights: {name} has no published weights '{weights}', {nearest(weights, known)}")
    else:
        account = load_weights_(_library_network(model), weights)
    described = chosen or published.DEFAULT
    categories = tuple(described.meta["categories"])
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(_preprocess(described, model), preprocess),
        architecture={
            "builder": "modhifi_cli.models.torchvision.build",
            "kwargs": {"name": name, "num_classes": num_classes, "options": dict(options or {})},
        },
        weights=account,
        classes=named_classes(classes, num_classes or len(categories))
        or (categories if num_classes in (None, len(categories)) else None),
    )


def _library_network(model: nn.Module) -> nn.Module:
    """The library's own network, whose weights files name its tensors."""
    return model.network if isinstance(model, DetectionParts | SegmentationMap) else model


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
    fit_weights_(_library_network(model), tensors, source=f"torchvision {chosen}", ignored=_AUXILIARY)
    return f"torchvision {chosen}"


def _preprocess(published: Any, model: nn.Module) -> Preprocess:
    transforms = published.transforms()
    if isinstance(model, DetectionParts):  # these resize and normalise inside, which the adapter leaves out
        inside = model.network.transform
        size = inside.fixed_size or (inside.min_size[-1], inside.min_size[-1])
        return Preprocess(
            size=(int(size[1]), int(size[0])), mean=tuple(inside.image_mean), std=tuple(inside.image_std), resize=None
        )
    resize = transforms.resize_size[0]
    crop = getattr(transforms, "crop_size", transforms.resize_size)[0]  # segmentation is not cropped
    return Preprocess(
        size=(crop, crop),
        mean=tuple(getattr(transforms, "mean", IMAGENET_MEAN)),
        std=tuple(getattr(transforms, "std", IMAGENET_STD)),
        resize=resize,
        interpolation=transforms.interpolation.value,
    )
