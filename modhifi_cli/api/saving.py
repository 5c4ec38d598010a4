"""Networks on disk from Python: opening what a run or `save` wrote, and writing a network that was made narrower."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from modhifi_cli.api.words import own_words


@own_words
def load_model(
    place: str | os.PathLike[str], *, allow: str | bool = False, unverified: bool = False
) -> nn.Module:
    """The network that a run or `save` wrote, or one on the Hugging Face hub, on the CPU in evaluation mode.

    Args:
        place: A folder, which wins, or ``"USER/NAME"`` on the hub.
        allow: ``"package.module:function"``, the user's own code that makes this network, as the folder names it; True
            for whatever it names. A folder runs no code otherwise.
        unverified: Whether a folder without checksums, as older versions wrote them, may be read.

    Raises:
        ConfigError: If a name on the hub is given, and the package that fetches from there is not installed.
        DataError: If there is no such folder and no such name on the hub, or what is there is no saved network, is damaged,
            or would run code that was not allowed.
    """
    from modhifi_cli.files import artifacts, hub

    folder = Path(place)
    if not folder.is_dir() and hub.is_name(str(place)):
        folder = hub.fetched(str(place))
    return artifacts.load_model(folder, allow=allow, unverified=unverified)


@own_words
def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    factory: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    preprocess: Mapping[str, Any] | None = None,
    classes: Sequence[str] | None = None,
    tokenizer: Any = None,
    name: str | None = None,
) -> None:
    """Write a network that this package has made narrower, so that `load_model` opens the folder.

    Args:
        model: A decoder of transformers, a network of timm, or any other together with its factory.
        folder: Where to write; made if absent.
        factory: ``"package.module:function"`` that makes the dense network, such as ``"torchvision.models.resnet:resnet18"``;
            not needed for decoders and networks of timm.
        kwargs: The factory's arguments.
        preprocess: ``{"size": …, "mean": […], "std": […]}`` of a network for images; needed for it but of timm.
        classes: Names in the order of the logits.
        tokenizer: Of a decoder.
        name: Short name; None takes the class's.

    Raises:
        ConfigError: If what is needed to build the network again is not said.
        DataError: If the folder cannot be written, or the saved network does not build again with these widths.
    """
    from modhifi_cli.files import artifacts
    from modhifi_cli.models.describe import described

    loaded = described(
        model, factory=factory, kwargs=kwargs, preprocess=preprocess, classes=classes, tokenizer=tokenizer, name=name
    )
    artifacts.save_model(Path(folder), loaded, model)
    artifacts.load_model(folder, allow=factory or False)
