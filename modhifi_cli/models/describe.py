"""A network at hand as a `LoadedModel`: how it is built again when only its weights and widths were kept."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from modhifi_cli.errors import ConfigError
from modhifi_cli.records import LoadedModel


def described(
    model: nn.Module,
    *,
    factory: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> LoadedModel:
    """What a network's own maker says of it, or what its user does.

    Args:
        model: The network; what is described is its dense form.
        factory: ``package.module:function`` that makes it, for networks that do not say it themselves.
        kwargs: The factory's arguments.
        preprocess: As in ``model.preprocess`` of ``model=module``.
        classes: Names in the order of the logits.
        tokenizer: Of a decoder.
        name: Short name; None takes the class's.

    Raises:
        ConfigError: If neither the network nor its user says how it is made.
    """
    from modhifi_cli.models import hf, module, timm

    name = name or type(model).__name__.lower()
    if getattr(model, "config", None) is not None and hasattr(model, "generate"):
        return hf.described(model, tokenizer, name)
    if factory is None and getattr(model, "pretrained_cfg", None):
        return timm.described(model, preprocess, classes, name)
    if factory is None:
        raise ConfigError(
            f"save: {type(model).__name__} does not say how it is built; give factory='package.module:function', such as "
            "'torchvision.models.resnet:resnet18', and preprocess."
        )
    return module.described(model, factory, kwargs or {}, preprocess, classes, name)
