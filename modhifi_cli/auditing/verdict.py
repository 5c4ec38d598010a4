"""The audit's verdict in words: what is forgotten at the output, and what is still readable inside.

Forget accuracy alone decides nothing here: removing one row of the classifier makes it zero and leaves everything
inside. What counts is how much of the way an edit goes from that control to a network that never knew the class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from modhifi_cli.errors import ConfigError, is_number

NOT_FORGOTTEN = "not forgotten"
OUTPUT_ONLY = "forgotten at the output only"
UNDECIDED = "forgotten at the output; these tests cannot tell about the inside"
INSIDE = "forgotten at the output and, by these tests, inside"

HALF = 0.5  # of the gap between the control and the network that never knew the class


@dataclass(frozen=True)
class Limits:
    """When something counts.

    Attributes:
        forgotten: Forget accuracy up to which the classes count as forgotten at the output, %.
        retain_drop: Points of retain accuracy below the dense network from which on nothing inside counts.
    """

    forgotten: float = 5.0
    retain_drop: float = 1.0

    def __post_init__(self) -> None:
        for name in ("forgotten", "retain_drop"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value <= 100:
                raise ConfigError(f"audit.verdict.{name} must be a number from 0 to 100; got {value!r}.")


@dataclass(frozen=True)
class Criterion:
    """One figure about the inside, on its way from the control to a network that never knew the classes.

    Attributes:
        name: What was measured.
        unit: ``%`` or ``steps``.
        head_only: The control: the classifier's rows removed, nothing else.
        edited: The edited network.
        target: The reference, or chance where there is none.
        resolution: Smallest gap between control and target that means something, in `unit`.
        edited_more: Whether the edited network's figure is at least `edited` (steps that did not suffice).
        target_more: The same for the target.
    """

    name: str
    unit: str
    head_only: float
    edited: float
    target: float
    resolution: float
    edited_more: bool = False
    target_more: bool = False

    @property
    def informative(self) -> bool:
        """Whether control and target differ by more than the resolution."""
        return abs(self.target - self.head_only) > self.resolution

    @property
    def closed(self) -> float | None:
        """Share of the gap that the edit closes: 0 at the control, 1 at the target; None without a gap."""
        return (self.edited - self.head_only) / (self.target - self.head_only) if self.informative else None

    @property
    def met(self) -> bool | None:
        """Whether at least half of the gap is closed; None without a gap."""
        return None if self.closed is None else self.closed >= HALF


@dataclass(frozen=True)
class Verdict:
    """What the audit says.

    Attributes:
        level: One of the four in this module.
        sentences: The grounds, in plain words.
        criteria: The figures about the inside.
        compared_with: ``reference``, or ``chance`` where there is none.
    """

    level: str
    sentences: tuple[str, ...]
    criteria: tuple[Criterion, ...]
    compared_with: str


def judge(
    *,
    forget: dict[str, float],
    retain: dict[str, float],
    criteria: Sequence[Criterion],
    images: str,
    reference: bool,
    limits: Limits = Limits(),
) -> Verdict:
    """The verdict from the figures.

    Args:
        forget: Accuracy on the forgotten classes of ``dense``, ``edited`` and ``head_only``, %.
        retain: The same on the other classes.
        criteria: The figures about the inside, at least one.
        images: What images the accuracies were measured on, for the sentence.
        reference: Whether the target of the criteria is a retrained reference; otherwise it is chance.
        limits: When something counts.
    """
    target = "reference" if reference else "chance"
    drop = retain["dense"] - retain["edited"]
    at_output = forget["edited"] <= limits.forgotten
    damaged = drop > limits.retain_drop
    sentences = [
        f"At the output: on {images} the edited network still names {forget['edited']:.1f} % of the forget images "
        f"rightly ({forget['dense']:.1f} % before; up to {limits.forgotten:g} % counts as forgotten) and "
        f"{retain['edited']:.1f} % of the others ({retain['dense']:.1f} % before).",
        f"The control, removing the classifier's rows and nothing else, reaches {forget['head_only']:.1f} % and "
        f"{retain['head_only']:.1f} %, so figures at the output prove nothing about the inside.",
    ]
    sentences += [
        _told(criterion, "the end of the attack" if criterion.unit == "steps" and not reference else target)
        for criterion in criteria
    ]
    if damaged:
        sentences.append(
            f"The other classes lost {drop:.1f} points, more than the {limits.retain_drop:g} allowed: what a damaged "
            "network no longer shows does not count as forgotten inside."
        )
    met = [criterion.met for criterion in criteria]
    if not at_output:
        level = NOT_FORGOTTEN
    elif damaged or False in met:
        level = OUTPUT_ONLY
    elif True in met:
        level = INSIDE
    else:
        level = UNDECIDED
    if not reference:
        sentences.append(
            "There is no retrained reference, so readouts were compared with chance and relearning with the end of the "
            "attack; features that serve the other classes well need reach neither, and audit.reference gives the fair "
            "comparison."
        )
    return Verdict(level, tuple(sentences), tuple(criteria), "reference" if reference else "chance")


def _told(criterion: Criterion, target: str) -> str:
    def figure(value: float, more: bool = False) -> str:
        exact = f"{value:.1f} %" if criterion.unit == "%" else f"{value:g} {criterion.unit}"
        return f"more than {exact}" if more else exact

    figures = (
        f"Inside, {criterion.name}: control {figure(criterion.head_only)}, edited "
        f"{figure(criterion.edited, criterion.edited_more)}, {target} {figure(criterion.target, criterion.target_more)}"
    )
    if criterion.closed is None:
        return f"{figures}; control and {target} are too near each other for this figure to tell anything."
    how = "at least " if criterion.edited_more else "at most " if criterion.target_more else ""
    word = "half or more" if criterion.met else "less than half"
    return f"{figures}; the edit closes {how}{_whole(100 * criterion.closed)} % of the gap, {word}."


def _whole(value: float) -> str:
    """Rounded, without a minus in front of nothing."""
    return f"{round(value)}"
