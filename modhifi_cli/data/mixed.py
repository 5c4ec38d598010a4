"""Images or text of several sources as one set, by weight and well stirred."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from modhifi_cli.data.making import Making
from modhifi_cli.data.procedural import made_samples
from modhifi_cli.data.sources import sha256_of_samples
from modhifi_cli.data.text import SEQUENCES, TokenWindows
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
    sequences: int | str | None = "auto",
    seed: int = 0,
) -> MixedImages | TokenWindows:
    """Images of several sources for a network that sees, windows of several texts for one that reads.

    Args:
        preprocess: What the network wants.
        labelled: Whether labels are asked for.
        making: For parts that are made from the network.
        sources: Each ``{"name": …, "weight": …, "source": function as a source's load}``.
        labels: ``"given"`` if every part brings its own; otherwise they are the network's predictions. Text has none.
        num_samples: How many images in all, ``"auto"`` and None are 512; every part gives its share by weight, at least
            one.
        sequences: How many windows of text in all, ``"auto"`` and None are 128; their lengths are the parts' own.
        seed: Of the order; the parts have their own.

    Raises:
        ConfigError: If a weight is no number above 0, if a part is no source for this network, if there are fewer
            samples than parts, or if windows of text differ in length.
        ModHiFiError: Whatever a part raises.
    """
    reads = isinstance(preprocess, TextInput)
    key = "sequences" if reads else "num_samples"
    count = made_samples(sequences, key=key, auto=SEQUENCES) if reads else made_samples(num_samples)
    shares = _shares(count, sources, key)
    made = []
    for one, share in zip(sources, shares, strict=True):
        build: Callable[..., Any] = one["source"]
        takes = inspect.signature(build).parameters
        if key not in takes:
            raise ConfigError(
                f"data.sources: this network reads {'text' if reads else 'images'}, and {one['name']} is no source of "
                "any; leave it out."
            )
        given: dict[str, Any] = {"making": making} if "making" in takes else {}
        if not reads:
            given["labels"] = labels if labels in (None, "given") else "model"
        made.append(build(preprocess=preprocess, labelled=labelled, **{key: share}, **given))
    names = [str(one["name"]) for one in sources]
    weights = [_weight(one) for one in sources]
    if reads:
        return _mixed_windows(made, names, preprocess, seed=seed, weights=weights)
    return MixedImages(made, names, seed=seed, weights=weights)


def _mixed_windows(
    sources: Sequence[TokenWindows], names: Sequence[str], text: TextInput, *, seed: int, **protocol: Any
) -> TokenWindows:
    """The windows of several texts in one seeded order.

    Raises:
        ConfigError: If they differ in length: layers go through windows side by side.
    """
    lengths = [len(one.windows[0]) for one in sources]
    if len(set(lengths)) > 1:
        raise ConfigError(
            f"data.sources: windows must have one length, and those of the sources have {', '.join(map(str, lengths))} "
            "tokens; set length in each."
        )
    together = [window for one in sources for window in one.windows]
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed)).tolist()
    windows = [together[number] for number in order]
    return TokenWindows(
        windows,
        [0] * len(windows),
        {
            "source": "mixed",
            "path": " + ".join(
                f"{len(one)} of {one.protocol.get('path', name)}" for name, one in zip(names, sources, strict=True)
            ),
            "sequences": len(windows),
            "length": len(windows[0]),
            "tokens": sum(len(window) for window in windows),
            "sha256": sha256_of_samples(window.numpy().tobytes() for window in windows),
            "seed": seed,
            "parts": [dict(one.protocol) for one in sources],
            **protocol,
        },
        text,
    )


def _shares(count: int, sources: Sequence[Mapping[str, Any]], key: str) -> list[int]:
    """How many of `count` samples each source gives: by weight, at least one."""
    weights = np.array([_weight(one) for one in sources], float)
    if count < len(weights):
        what = "sequence" if key == "sequences" else "image"
        raise ConfigError(f"data.{key}={count} is less than one {what} of each of {len(weights)} sources; raise it.")
    shares = np.maximum(np.floor(count * weights / weights.sum()).astype(int), 1)
    while shares.sum() != count:  # what rounding left goes where most is lacking
        step = 1 if shares.sum() < count else -1
        lacking = step * (count * weights / weights.sum() - shares)
        shares[np.argmax(np.where((step > 0) | (shares > 1), lacking, -np.inf))] += step
    return shares.tolist()


def _weight(source: Mapping[str, Any]) -> float:
    weight = source.get("weight", 1.0)
    if not is_number(weight) or not 0 < weight < float("inf"):
        raise ConfigError(f"data.sources: the weight of {source['name']} must be a number above 0, got {weight!r}.")
    return float(weight)


def _one_by_one(source: ImageSource, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for images, labels in source.batches(batch_size):
        for number, image in enumerate(images):
            yield image, None if labels is None else labels[number]
