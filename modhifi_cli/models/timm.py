"""Networks of timm, with the library's weights and the data configuration that they were trained for."""

import contextlib
import math
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from modhifi_cli.errors import ConfigError, nearest
from modhifi_cli.models.preprocessing import adjusted, named_classes
from modhifi_cli.models.weights import fit_weights_, library_weights_missing, load_weights_, seeded_initialisation
from modhifi_cli.records import LoadedModel, Preprocess

BUILDER = "modhifi_cli.models.timm.build"


def build(*, name: str, num_classes: int | None = None, options: Mapping[str, Any] | None = None) -> nn.Module:
    """An untrained network in evaluation mode.

    Args:
        name: timm's name, with or without the tag of its weights: ``resnet26``, ``resnet26.bt_in1k``.
        num_classes: Number of logits; None means the library's.
        options: Further arguments of ``timm.create_model``.

    Raises:
        ConfigError: If the name or its tag is unknown, or the constructor refuses an option.
    """
    import timm

    if not timm.is_model(name):
        raise ConfigError(f"model.name: timm has no network '{name}', {nearest(name, timm.list_models())}")
    arguments = dict(options or {})
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        return timm.create_model(name, pretrained=False, **arguments).eval()
    except RuntimeError as error:
        if "pretrained tag" not in str(error):
            raise
        known = timm.list_pretrained(f"{name.partition('.')[0]}.*")
        raise ConfigError(f"model.name: timm has no weights tagged '{name}', {nearest(name, known)}") from error
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options: timm's {name} does not take {arguments} ({error}).") from error


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
    """A timm network.

    Args:
        name: timm's name, with or without the tag of its weights.
        weights: ``"default"`` (timm's for this name), ``"random"``, or a file.
        seed: Of random weights.
        num_classes: Number of logits; None means the library's.
        preprocess: Fields of the preprocessing to replace; timm's data configuration of this name comes first.
        options: Further arguments of ``timm.create_model``.
        classes: Names of the classes in the order of the logits; None: the library's where it knows them.

    Raises:
        ConfigError: If the name or an option is unknown, `num_classes` contradicts the library's weights, or `classes`
            are not as many as the logits.
        DataError: If the library cannot fetch its weights, or the file cannot be read or does not fit.
    """
    import timm

    with seeded_initialisation(seed):
        model = build(name=name, num_classes=num_classes, options=options)
    published_classes = model.pretrained_cfg.get("num_classes")
    license = None
    if weights == "random":
        account = f"random (seed {seed})"
    elif weights == "default":
        if num_classes not in (None, published_classes):
            raise ConfigError(
                f"model.num_classes: the published weights of {name} have {published_classes} classes, got "
                f"{num_classes}; set model.num_classes=null, or model.weights=FILE or random."
            )
        try:
            with _no_retries_offline():
                published = timm.create_model(name, pretrained=True, **(options or {}))
        # timm passes on what its downloader, its cache and its checkpoint reader raise.
        except Exception as error:
            raise library_weights_missing(library="timm", name=name, error=error) from error
        account = f"timm {published.pretrained_cfg.get('architecture', name)}.{published.pretrained_cfg.get('tag', '')}"
        license = published.pretrained_cfg.get("license")
        fit_weights_(model, published.state_dict(), source=account)
    else:
        account = load_weights_(model, weights)
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(_preprocess(_data_config(model, options or {})), preprocess),
        architecture=_architecture(name, num_classes, dict(options or {})),
        weights=account,
        classes=named_classes(classes, getattr(model, "num_classes", None))
        or (_imagenet_classes(model) if num_classes in (None, published_classes) else None),
        license=license,
    )


@contextlib.contextmanager
def _no_retries_offline() -> Iterator[None]:
    """Without a network the hub client retries each file for half a minute; its offline mode asks the cache alone."""
    import huggingface_hub.constants as hub

    before = hub.HF_HUB_OFFLINE
    host = urllib.parse.urlparse(hub.ENDPOINT).hostname or ""
    # Behind a proxy the name need not resolve here.
    if not urllib.request.getproxies():
        try:
            socket.getaddrinfo(host, None)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


def _data_config(model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """timm's data configuration of a network, at the size of image that the options ask for."""
    import timm

    config = timm.data.resolve_model_data_config(model)
    size = options.get("img_size")
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else size
        config["input_size"] = (config["input_size"][0], height, width)
    return config


def described(
    model: nn.Module, preprocess: Mapping[str, Any] | None, classes: Sequence[str] | None, name: str
) -> LoadedModel:
    """A network of timm at hand, which says itself what it is."""
    config: Any = model.pretrained_cfg  # timm's, which PyTorch takes for a tensor or a module
    return LoadedModel(
        model=model,
        name=name,
        preprocess=adjusted(_preprocess(_data_config(model, {})), preprocess),
        architecture=_architecture(config["architecture"], getattr(model, "num_classes", None), None),
        weights=f"weights given in Python, network timm {config['architecture']}",
        classes=None if classes is None else tuple(classes),
    )


def _architecture(name: str, num_classes: int | None, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"builder": BUILDER, "kwargs": {"name": name, "num_classes": num_classes, "options": options}}


def _preprocess(config: Mapping[str, Any]) -> Preprocess:
    height, width = config["input_size"][1:]
    # "squash" resizes straight to the input; "center" and "border" crop from a larger image.
    squashed = config.get("crop_mode") == "squash" and config["crop_pct"] == 1
    # timm draws "random" among the smooth ones when training; it evaluates with bilinear then.
    interpolation = config["interpolation"] if config["interpolation"] != "random" else "bilinear"
    return Preprocess(
        size=(height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        resize=None if squashed else math.floor(min(height, width) / config["crop_pct"]),
        interpolation=interpolation,
    )


def _imagenet_classes(model: nn.Module) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    return None if subset is None else tuple(ImageNetInfo(subset).label_descriptions())
