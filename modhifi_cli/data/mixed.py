"""Images of several sources as one set, by weight and well stirred."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modhifi_cli.data.making import Making
from modhifi_cli.data.procedural import made_samples
from modhifi_cli.data.sources import sha256_of_samples
from modhifi_cli.errors import ConfigError, is_number
from modhifi_cli.records import ImageSource, Preprocess, TextInput


class MixedImages:
    """Images of several sources in one seeded order; an `ImageSource`.

    Args:
        sources: The parts.
        names: What to call them.
        seed: Of the order.
        protocol: Facts beside those of the parts.
    """

    def __init__(self, sources: Sequence[ImageSource], names: Sequence[str], *, seed: int, **protocol: Any) -> None:
        self._sources = tuple(sources)
        owners = torch.repeat_interleave(torch.arange(len(sources)), torch.tensor([len(one) for one in sources]))
        order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(seed))
        self._order: list[int] = owners[order].tolist()
        digests = [str(one.protocol.get("sha256", "")) for one in sources]
        self.protocol: Mapping[str, Any] = {
            "source": "mixed",
            "path": " + ".join(f"{len(one)} {name}" for name, one in zip(names, sources, strict=True)),
            "num_samples": len(owners),
            "available": len(owners),
            "seed": seed,
            "sha256": sha256_of_samples(text.encode() for text in [*digests, str(seed)]),
            "parts": [dict(one.protocol) for one in sources],
            **protocol,
        }
        self.classes = None

    def __len__(self) -> int:
        """Number of images."""
        return len(self._order)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """As `ImageSource.batches`, without labels unless every part has its own."""
        streams = [_one_by_one(source, batch_size) for source in self._sources]
        for start in range(0, len(self._order), batch_size):
            pairs = [next(streams[owner]) for owner in self._order[start : start + batch_size]]
            labels = [label for _, label in pairs]
            told = None if any(label is None for label in labels) else torch.stack(labels)
            yield torch.stack([image for image, _ in pairs]), told


def load(
    *,
    preprocess: Preprocess | TextInput,
    labelled: bool,
    making: Making,
    sources: Sequence[Mapping[str, Any]],
    labels: str | None = None,
    num_samples: int | str | None = "auto",
    seed: int = 0,
) -> MixedImages:
    """Images of several sources.

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for.
        making: For parts that are made from the network.
        sources: Each ``{"name": …, "weight": …, "source": function as a source's load}``.
        labels: ``"given"`` if every part brings its own; otherwise they are the network's predictions.
        num_samples: How many in all, ``"auto"`` and None are 512; every part gives its share by weight, at least one.
        seed: Of the order; the parts have their own.

    Raises:
        ConfigError: If a weight is no number above 0, or the network reads text.
        ModHiFiError: Whatever a part raises.
    """
    if isinstance(preprocess, TextInput):
        raise ConfigError("data=mixed mixes images, and this network reads text; choose data=text or data=generated.")
    count = made_samples(num_samples)
    weights = np.array([_weight(one) for one in sources], float)
    if count < len(weights):
        raise ConfigError(
            f"data.num_samples={count} is less than one image of each of {len(weights)} sources; raise it."
        )
    shares = np.maximum(np.floor(count * weights / weights.sum()).astype(int), 1)
    while shares.sum() != count:  # what rounding left goes where most is lacking
        step = 1 if shares.sum() < count else -1
        lacking = step * (count * weights / weights.sum() - shares)
        shares[np.argmax(np.where((step > 0) | (shares > 1), lacking, -np.inf))] += step
    made = []
    for one, share in zip(sources, shares.tolist(), strict=True):
        build: Callable[..., ImageSource] = one["source"]
        takes = inspect.signature(build).parameters
        given = {"making": making} if "making" in takes else {}
        mode = labels if labels in (None, "given") else "model"
        made.append(build(preprocess=preprocess, labelled=labelled, labels=mode, num_samples=share, **given))
    names = [str(one["name"]) for one in sources]
    return MixedImages(made, names, seed=seed, weights=weights.tolist())


def _weight(source: Mapping[str, Any]) -> float:
    weight = source.get("weight", 1.0)
    if not is_number(weight) or not 0 < weight < float("inf"):
        raise ConfigError(f"data.sources: the weight of {source['name']} must be a number above 0, got {weight!r}.")
    return float(weight)


def _one_by_one(source: ImageSource, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for images, labels in source.batches(batch_size):
        for number, image in enumerate(images):
            yield image, None if labels is None else labels[number]
