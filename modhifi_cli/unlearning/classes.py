"""Which classes shall be forgotten, and what is known of the calibration images with them in mind."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modhifi_cli.engine.gathering import held_out_images
from modhifi_cli.errors import ConfigError, DataError, nearest
from modhifi_cli.unlearning.method import Samples

LEAST_SAMPLES = 5  # of the forget classes, and of the others: with fewer nothing can be fitted and judged apart


def forget_classes(asked: Any, classes: Sequence[str] | None, logits: int) -> tuple[int, ...]:
    """The classes to forget, sorted, from numbers or names, one or several.

    Args:
        asked: A number, a name, or a list of them.
        classes: Names in the order of the logits, or None.
        logits: Number of logits.

    Raises:
        ConfigError: If a class does not exist, none is named, or none would be left.
    """
    wanted = list(asked) if isinstance(asked, list | tuple) else [asked]
    if not wanted:
        raise ConfigError("forget_class: name at least one class, by number or name, such as forget_class=3.")
    known = f"0 to {logits - 1}" + (f" ({_named(classes)})" if classes else "")
    found = set()
    for one in wanted:
        number = _class_number(one, classes)
        if number is None or not 0 <= number < logits:
            hint = nearest(one, classes) if isinstance(one, str) and classes else ""
            if isinstance(one, str) and not one.isdecimal() and not classes:
                hint = "The network names none: give the number, or set model.classes=[…] in the order of the logits."
            raise ConfigError(f"forget_class: there is no class {one!r}; the classes are {known}. {hint}".strip())
        found.add(number)
    if len(found) == logits:
        raise ConfigError(
            f"forget_class: {len(found)} of {logits} classes shall be forgotten, so none is left to keep; name fewer, "
            "or use a network with more classes."
        )
    return tuple(sorted(found))


def samples_of(logits: Tensor, labels: Tensor, forget: Sequence[int], *, hold_out: bool) -> Samples:
    """What is known of the images.

    Args:
        logits: Of the dense network, ``[images, classes]`` on the CPU.
        labels: ``[images]`` int64.
        forget: Classes to forget, sorted.
        hold_out: Whether every fifth image of either kind is kept for judging.
    """
    labels = labels.cpu()
    chosen = torch.tensor(list(forget))
    is_forget = torch.isin(labels, chosen)
    others = logits.clone()
    others[:, chosen] = -torch.inf
    resembles = torch.where(is_forget, others.argmax(1), labels)
    fitted = torch.ones(len(labels), dtype=torch.bool)
    if hold_out:
        # Every fifth image of either kind judges, so that a rare forget class is judged too.
        for kind in (is_forget, ~is_forget):
            numbers = kind.nonzero().flatten()
            fitted[numbers[held_out_images(torch.arange(len(numbers)))]] = False
    return Samples(labels, is_forget, fitted, resembles, tuple(forget), logits.shape[1], logits.float())


def count_samples(labels: Tensor, forget: Sequence[int]) -> tuple[int, int]:
    """How many images are of the forget classes, and how many of the others.

    Raises:
        DataError: If either are fewer than `LEAST_SAMPLES`.
    """
    is_forget = torch.isin(labels.cpu(), torch.tensor(list(forget)))
    counts = int(is_forget.sum()), int((~is_forget).sum())
    made = ", or have images of the class made from the network (data=mixed, see docs/howto/unlearn.md)"
    for kind, count, hint in zip(("forget", "retain"), counts, (made, ""), strict=True):
        if count < LEAST_SAMPLES:
            raise DataError(
                f"data: unlearning needs at least {LEAST_SAMPLES} {kind} samples, got {count} among {len(labels)} "
                f"images (forget_class={list(forget)}); give more images, or raise data.num_samples{hint}."
            )
    return counts


def check_every_class(samples: Samples) -> None:
    """Refuse samples that lack a class that stays, for a method that rebuilds features from the means of all classes.

    Raises:
        DataError: With how many are lacking: images of such a class would be answered as one of the others.
    """
    seen = torch.bincount(samples.labels[samples.fitted & ~samples.forget], minlength=samples.classes) > 0
    stay = samples.classes - len(samples.forget_classes)
    if int(seen.sum()) < stay:
        raise DataError(
            f"data: method=collapse rebuilds late features from the mean of every class that stays, and there are "
            f"images of {int(seen.sum())} of {stay}; give images of all of them, or use method=contrast_few."
        )


def _named(classes: Sequence[str], most: int = 30) -> str:
    shown = ", ".join(f"{number} {name}" for number, name in enumerate(classes[:most]))
    return shown + (", …" if len(classes) > most else "")


def _class_number(one: Any, classes: Sequence[str] | None) -> int | None:
    if isinstance(one, bool):
        return None
    if isinstance(one, int):
        return one
    if isinstance(one, str) and classes and one in classes:
        return classes.index(one) if isinstance(classes, tuple | list) else list(classes).index(one)
    if isinstance(one, str) and one.isdigit():
        return int(one)
    return None
