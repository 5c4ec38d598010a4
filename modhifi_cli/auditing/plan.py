"""Which images an audit looks at: those that train a probe, those it is asked about, and what all networks say of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from modhifi_cli.auditing.depths import Depth, Reading
from modhifi_cli.errors import ConfigError, DataError, is_number, need_whole

LEAST = 10  # images of a class on either side, below which a probe says nothing
NETWORKS = ("dense", "edited", "head_only", "reference")  # in the order of every table


@dataclass(frozen=True)
class Probe:
    """How features are read out.

    Attributes:
        samples: Calibration images of a class that a probe is trained on, at most.
        held_out: Images of a class that it is asked about, at most.
        classes: Classes in all, at most: the forgotten ones and others at even distances.
        depths: Places in the network, at most.
        features: Features of a place after averaging its map.
        strength: Inverse ridge of the linear probe.
        iterations: Limit of its solver.
    """

    samples: int = 100
    held_out: int = 1000
    classes: int = 20
    depths: int = 4
    features: int = 256
    strength: float = 1.0
    iterations: int = 200

    def __post_init__(self) -> None:
        least = {"samples": LEAST, "held_out": LEAST, "classes": 2, "depths": 1, "features": 1, "iterations": 1}
        for name, smallest in least.items():
            need_whole(f"audit.probe.{name}", getattr(self, name), smallest)
        if not is_number(self.strength) or not self.strength > 0:
            raise ConfigError(f"audit.probe.strength must be a number above 0; got {self.strength!r}.")


@dataclass
class Plan:
    """Which images train a probe and which it is asked about; `asked` is filled while evaluation images go by.

    Attributes:
        classes: That a probe knows, sorted.
        forget: The forgotten ones.
        train: Numbers of the calibration images that train, sorted; likewise `train_labels`.
        asked: Numbers of evaluation images (of calibration images where there are none), sorted; likewise
            `asked_labels`.
        held_back: Whether those asked are calibration images.
        limit: Images of a class that are asked, at most.
        kept: Calibration images whose features are kept: those that train, and those asked where they are held back.
    """

    classes: list[int]
    forget: tuple[int, ...]
    train: Tensor
    train_labels: Tensor
    asked: Tensor
    asked_labels: Tensor
    held_back: bool
    limit: int
    kept: Tensor

    @classmethod
    def make(
        cls, labels: Tensor, forget: tuple[int, ...], names: Sequence[str] | None, probe: Probe, *, held_back: bool
    ) -> "Plan":
        """Choose the images.

        Args:
            labels: Of the calibration images, ``[images]`` int64 on the CPU.
            forget: The classes that shall be forgotten.
            names: Class names, or None.
            probe: How many.
            held_back: Whether there are no evaluation images, so that calibration images have to be asked.

        Raises:
            DataError: If there are too few images of a forgotten class, or of all others.
        """
        needed = 2 * LEAST if held_back else LEAST
        counts = labels.bincount().tolist()
        for number in forget:
            have = counts[number] if number < len(counts) else 0
            if have < needed:
                raise DataError(
                    f"audit: class {_named(number, names)} has {have} calibration images, a probe needs at least "
                    f"{needed}{' without evaluation data' if held_back else ''}; give more labelled images of it "
                    "(data.num_samples, or another source)."
                )
        others = [n for n, have in enumerate(counts) if have >= needed and n not in forget]
        room = max(1, probe.classes - len(forget))
        if not others:
            raise DataError(
                f"audit: no class but the forgotten has {needed} calibration images, which a probe needs; give more "
                "labelled images (data.num_samples, or another source)."
            )
        if len(others) > room:
            others = [others[number * len(others) // room] for number in range(room)]
        chosen = sorted([*forget, *others])
        train, asked = [], []
        for number in chosen:
            own = (labels == number).nonzero().flatten()
            train.append(own[::2][: probe.samples] if held_back else own[: probe.samples])
            asked.append(own[1::2][: probe.held_out] if held_back else own[:0])
        train_at, asked_at = torch.cat(train).sort().values, torch.cat(asked).sort().values
        return cls(
            classes=chosen,
            forget=forget,
            train=train_at,
            train_labels=labels[train_at],
            asked=asked_at,
            asked_labels=labels[asked_at],
            held_back=held_back,
            limit=probe.held_out,
            kept=torch.cat([train_at, asked_at]).sort().values,
        )

    def of_calibration(self, start: int, batch_size: int) -> Tensor:
        """Numbers, within the batch that begins at `start`, of the images whose features are kept."""
        return self.kept[(self.kept >= start) & (self.kept < start + batch_size)] - start

    def of_evaluation(self, labels: Tensor | None, start: int) -> Tensor:
        """The same for evaluation images, the first of every class that a probe knows."""
        if labels is None:
            raise DataError("evaluation_data: an audit needs a label for every image, got images without labels.")
        labels = labels.cpu()
        had = {cls: int((self.asked_labels == cls).sum()) for cls in self.classes}
        rows = torch.cat([(labels == cls).nonzero().flatten()[: self.limit - had[cls]] for cls in self.classes])
        rows = rows.sort().values
        self.asked = torch.cat([self.asked, rows + start])
        self.asked_labels = torch.cat([self.asked_labels, labels[rows]])
        return rows

    def check_held_out(self, names: Sequence[str] | None) -> None:
        """Raise where there are too few held-out images of a forgotten class, or of all others."""
        for number in self.forget:
            have = int((self.asked_labels == number).sum())
            if have < LEAST:
                raise DataError(
                    f"audit: class {_named(number, names)} has {have} evaluation images, a probe needs at least "
                    f"{LEAST} held-out ones; give more labelled images of it (evaluation_data)."
                )
        if not bool((~self.absent(self.asked_labels)).any()):
            raise DataError(
                "audit: there are evaluation images of the forgotten classes only; give those of others too."
            )

    def absent(self, labels: Tensor) -> Tensor:
        """Which labels are of forgotten classes, bool."""
        return torch.isin(labels, torch.tensor(self.forget))


@dataclass(frozen=True)
class Seen:
    """What all networks said over all images; the head-only control is derived.

    Attributes:
        plan: Which images probes see.
        count: Classes of the networks.
        labels: ``calibration``, and ``evaluation`` where there is any → ``[images]`` int64.
        readings: The same → network → what it said.
        depths: Network → where it was read.
    """

    plan: Plan
    count: int
    labels: Mapping[str, Tensor]
    readings: Mapping[str, Mapping[str, Reading]]
    depths: Mapping[str, Sequence[Depth]]

    @property
    def forget(self) -> tuple[int, ...]:
        """The forgotten classes."""
        return self.plan.forget

    @property
    def names(self) -> list[str]:
        """The networks, the control among them."""
        return [name for name in NETWORKS if name == "head_only" or name in self.depths]

    @property
    def judged(self) -> str:
        """The images that the edit has not seen, or those it has where there are no others."""
        return "evaluation" if "evaluation" in self.labels else "calibration"

    @cached_property
    def scores(self) -> dict[str, dict[str, Tensor]]:
        """Images → network → logits ``[images, classes]``; those of the control's forgotten classes cannot win."""
        found = {}
        for where, readings in self.readings.items():
            removed = readings["dense"].logits.clone()
            removed[:, list(self.forget)] = -torch.inf
            found[where] = {name: reading.logits for name, reading in readings.items()} | {"head_only": removed}
        return found

    def sets(self, model: str, depth: str) -> tuple[Tensor, Tensor]:
        """Features ``[images, features]`` of the images that train a probe and of those it is asked about."""
        plan, features = self.plan, self.readings["calibration"][model].features[depth]
        train = features[torch.searchsorted(plan.kept, plan.train)]
        if plan.held_back:
            return train, features[torch.searchsorted(plan.kept, plan.asked)]
        return train, self.readings["evaluation"][model].features[depth]


def _named(cls: int, names: Sequence[str] | None) -> str:
    return str(cls) if names is None else f"{cls} ({names[cls]})"
