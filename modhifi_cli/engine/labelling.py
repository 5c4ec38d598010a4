"""Labels of calibration images: the source's own, or the network's predictions.

Only methods that look at classes come here (DisCEdit, TVSPrune, unlearning); a source hands over labels only if it was
opened with them, so that an unlabelled run never reads a label file.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError
from modhifi_cli.graph.inputs import FORWARD_ERRORS, not_taken
from modhifi_cli.records import ImageSource, Progress

MODES = ("auto", "given", "model")


@dataclass(frozen=True)
class Labels:
    """The class of every image of a source, by the image's number.

    Attributes:
        values: ``[images]`` int64 in 0 … classes − 1, on the CPU.
        origin: ``"given"`` by the source or predicted by the ``"model"``.
        classes: Number of the network's logits.
        names: Names of the classes in the order of the logits, or None.
    """

    values: Tensor
    origin: str
    classes: int
    names: Sequence[str] | None = None

    @property
    def counts(self) -> Tensor:
        """Images of each class, ``[classes]`` int64."""
        return torch.bincount(self.values, minlength=self.classes)

    @property
    def account(self) -> str:
        """Where they come from, for a report: ``1,024 images of 10 classes, labels of the source``."""
        whose = "labels of the source" if self.origin == "given" else "the dense network's own predictions"
        seen = int((self.counts > 0).sum())
        return f"{len(self.values):,} images of {seen} of {self.classes} classes, {whose}"


def image_labels(
    model: nn.Module,
    source: ImageSource,
    *,
    mode: str = "auto",
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    names: Sequence[str] | None = None,
    place: str = "data",
) -> Iterator[Progress | Labels]:
    """Labels of all images of a source, as the last thing that is yielded.

    Args:
        model: A classifier with logits ``[batch, classes]``; run on all images only where labels are predicted, and
            otherwise on the first batch alone, to count its logits. Evaluation mode, on `device`; left as found.
        source: The images, opened with labels where they are to be taken (``labelled=True``).
        mode: ``"given"``: the source's; ``"model"``: the class of the largest logit (the first of equal ones);
            ``"auto"``: the source's where it has any, else the model's.
        device: Where the forwards run.
        batch_size: Images a forward.
        names: Names of the classes, handed on in the result.
        place: What the settings call the source, for messages.

    Raises:
        ConfigError: If `mode` is unknown.
        DataError: If there are no images, labels are missing in ``"given"``, or they and the logits differ in number.
        NumericsError: If logits are not finite.
        UnsupportedModelError: If the network does not return ``[batch, classes]``.
    """
    if mode not in MODES:
        raise ConfigError(f"{place}.labels: expected one of {', '.join(MODES)}, got {mode!r}.")
    total = len(source)
    if not total:
        raise DataError(f"{place}: expected at least one image to label, got none; give more images.")
    classes, origin, done = 0, mode, 0
    found: list[Tensor] = []
    for images, labels in source.batches(batch_size):
        if not found:
            classes = _logits(model, images[:2], device).shape[1]
            origin = _origin(mode, labels, place)
            if origin == "given":
                _check_classes(source, classes, place)
        if origin == "given":
            found.append(_checked(labels, classes, place))
        else:
            found.append(_logits(model, images, device).argmax(1).cpu())
        done += len(images)
        yield Progress("labels", place, done, total)
    yield Labels(torch.cat(found), origin, classes, names)


def _origin(mode: str, labels: Tensor | None, place: str) -> str:
    if mode == "given" and labels is None:
        raise DataError(
            f"{place}: labels={mode} asked for, but the images come without labels; give labelled images, or take the "
            f"network's own predictions with {place}.labels=model."
        )
    return "model" if mode == "model" or labels is None else "given"


def _check_classes(source: ImageSource, classes: int, place: str) -> None:
    theirs = getattr(source, "classes", None)
    if theirs is not None and theirs != classes:
        raise DataError(
            f"{place}: the labels count {theirs} classes but the network has {classes} logits; give images labelled "
            f"for this network, or take its own predictions with {place}.labels=model."
        )


def _checked(labels: Tensor | None, classes: int, place: str) -> Tensor:
    if labels is None:
        raise DataError(f"{place}: some images come with labels and some without; label all of them, or none.")
    labels = labels.to(torch.int64).cpu()
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        raise DataError(
            f"{place}: expected labels 0 to {classes - 1} for the network's {classes} logits, got "
            f"{int(labels[wrong][0])}; give images labelled for this network, or take its own predictions with "
            f"{place}.labels=model."
        )
    return labels


def _logits(model: nn.Module, images: Tensor, device: torch.device | str) -> Tensor:
    with torch.inference_mode():
        try:
            output = model(images.to(device))
        except FORWARD_ERRORS as error:
            raise not_taken(model, tuple(images.shape), error) from error
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != len(images):
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"labels of images need logits of shape [{len(images)}, classes] from the network, got {got}; use a "
            "classifier."
        )
    if not bool(torch.isfinite(output).all()):
        raise NumericsError("the network's logits are NaN or infinite, so images cannot be labelled; check the weights.")
    return output
