"""What is taken where nobody gives data: a set made from the network itself, by the method that suits it.

Networks with BatchNorm statistics get images inverted from them, other networks that read images procedural ones (where
classes are asked for, such as for unlearning, images that they call those classes), and language models text of their own.
"""

import dataclasses
from typing import TypeVar

from modhifi_cli.data import class_inversion, generated, inversion, procedural
from modhifi_cli.data.making import Making
from modhifi_cli.data.sources import ArrayImages
from modhifi_cli.data.text import TokenWindows
from modhifi_cli.records import ImageSource, Preprocess, TextInput

Source = TypeVar("Source", ArrayImages, TokenWindows)

# How such data has served where it could be checked (modhifi_cli/README.md, "Data from nothing").
SERVED = {
    "inversion": "on CIFAR-10 256 such images kept 1 point less than real ones on ResNet-20 (92.1 % dense) at 30 % of "
    "the channels and 4 less at 50 %, on ResNet-56 as much as real ones; your own images are better: data=folder "
    "data.path=FOLDER",
    "generated": "calibrated on such text SmolLM2-135M without 20 % of its neurons has a perplexity 11 % lower on C4 "
    "than calibrated on WikiText, and 17 % higher on WikiText; text like yours is better: data=text data.path=FILE",
    "class_inversion": "how well such images serve has not been measured on a network trained on photographs; your own "
    "are better: data=folder data.path=FOLDER",
    "procedural": "on ResNet-20 and CIFAR-10 (92.1 % dense) 512 such images kept 13 points less than 512 real "
    "ones at 30 % of the channels; your own images are far better: data=folder data.path=FOLDER",
}


def load(
    *,
    preprocess: Preprocess | TextInput,
    labelled: bool,
    making: Making,
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
    cache: str | None = "auto",
) -> ImageSource:
    """Calibration data from nothing but the network.

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for.
        making: The network, and who listens.
        labels: As of every source.
        num_samples: How many images, or sequences of text; ``"auto"`` is what the chosen source makes.
        seed: Of everything that is drawn.
        cache: As in `inversion.load`.

    Raises:
        ModHiFiError: Whatever the chosen source raises.
    """
    if isinstance(preprocess, TextInput):
        chosen, told = "generated", "text sampled from itself"
    elif inversion.statistics_of(making.model):
        chosen = "inversion"
        told = "images inverted from its BatchNorm statistics"
    elif labelled:
        chosen = "class_inversion"
        told = "images made from its own answers, all classes equally often"
    else:
        chosen = "procedural"
        told = "procedural images (it has no BatchNorm statistics to invert)"
    sentence = f"no data= was given, so {making.name} is calibrated on {told}; {SERVED[chosen]}"
    making.note(sentence)
    if chosen == "generated":
        source = generated.load(
            preprocess=preprocess, labelled=labelled, making=making, sequences=num_samples, seed=seed, cache=cache
        )
    elif chosen in ("inversion", "class_inversion"):
        source = {"inversion": inversion, "class_inversion": class_inversion}[chosen].load(
            preprocess=preprocess,
            labelled=labelled,
            labels=labels,
            making=making,
            num_samples=num_samples,
            seed=seed,
            cache=cache,
        )
    else:
        source = procedural.load(
            preprocess=preprocess, labelled=labelled, labels=labels, num_samples=num_samples, seed=seed
        )
    return with_account(source, chosen=sentence)


def with_account(source: Source, **facts: object) -> Source:
    """A source whose protocol says more."""
    return dataclasses.replace(source, protocol={**source.protocol, **facts})
