"""Which widths a group may take: multiples that what will run the network computes as fast as its neighbours.

A processor's convolutions work on blocks of 8 or 16 channels and leave their fast path where a width does not fill
them; a card's tensor cores want multiples of 8 to 64; a language model is quantised in blocks of 32 to 256 weights,
which its neurons must fill. Rounding costs no accuracy as long as a step stays small beside the group.
"""

from collections.abc import Sequence

import torch

from modhifi_cli.errors import ConfigError, is_whole
from modhifi_cli.graph.components import ComponentGroup

AUTO = "auto"

_ON_A_CPU = (16, 8, 4, 2)  # channels: the widest vectors and blocked layouts first
_ON_A_CARD = (64, 32, 16, 8)
_SHARE = 8  # a step is at most this part of a group
_NEURONS = ((4096, 256), (2048, 128), (1024, 64), (256, 32))  # from so many neurons on, multiples of so many


def check_rounding(round_to: int | str) -> None:
    """Raises ConfigError unless it is a whole number from 1 or ``"auto"``."""
    if round_to != AUTO and not (is_whole(round_to) and round_to >= 1):
        raise ConfigError(f"round_to must be a whole number from 1, or auto; got {round_to!r}.")


def channel_steps(
    groups: Sequence[ComponentGroup], round_to: int | str, device: torch.device | str = "cpu", block: int = 1
) -> list[int]:
    """Components by which each group's width changes.

    Args:
        groups: Of a network that reads images.
        round_to: One number for all, or ``"auto"``: of a component that has several channels (a head, a convolution
            group) so many that whole blocks of channels go.
        device: What will run the network.
        block: Channels that its runtime computes together: no step is smaller in a group that holds two of them, even
            where that is more than an eighth.
    """
    if round_to != AUTO:
        return [int(round_to)] * len(groups)
    blocks = _ON_A_CPU if torch.device(device).type == "cpu" else _ON_A_CARD
    steps = []
    for group in groups:
        # Of the layers that share a group some may have several channels a component: the widest decides.
        # The features of a product count by themselves: their heads lie apart.
        channels = 1 if group.product else max((slot.entries for slot in group.producers), default=1)
        wanted = _largest(blocks, group.components * channels)
        if group.components * channels >= 2 * block and wanted < block:
            steps.append(-(-block // channels))
            continue
        steps.append(_largest(_halves(-(-wanted // channels)), group.components))
    return steps


def neuron_step(neurons: int, round_to: int | str) -> int:
    """Neurons by which the width of a language model's layer changes.

    Args:
        neurons: Of the dense layer.
        round_to: A number, at most the layer's neurons are taken of it, or ``"auto"``: what formats of blocks of 32 to
            256 weights can hold, and at most an eighth of a layer that is too narrow for those.
    """
    if round_to != AUTO:
        return min(int(round_to), neurons)
    for least, step in _NEURONS:
        if neurons >= least:
            return step
    return _largest((16, 8, 4, 2), neurons)


def told(steps: Sequence[int], of: str = "components") -> str:
    """Steps for a sentence: "8 components", or "2 to 16 components"."""
    low, high = min(steps), max(steps)
    return f"{high} {of}" if low == high else f"{low} to {high} {of}"


def refuse_narrow(
    sizes: Sequence[int], names: Sequence[str], round_to: int | str, of: str = "components"
) -> tuple[str, ...]:
    """A warning that names the groups that are narrower than the multiple asked for; nothing where there are none.

    Args:
        sizes: Dense widths of all groups.
        names: Theirs.
        round_to: As asked.
        of: What a group has.

    Raises:
        ConfigError: If all groups are: then nothing could be cut.
    """
    if isinstance(round_to, str) or not sizes:
        return ()
    narrow = [name for name, size in zip(names, sizes, strict=True) if size < round_to]
    if not narrow:
        return ()
    if len(narrow) == len(sizes):
        raise ConfigError(
            f"round_to={round_to}: every group has fewer {of} (the widest {max(sizes)}), so none could be cut; give "
            "round_to=auto or a smaller multiple."
        )
    others = f" and {len(narrow) - 1} more" if len(narrow) > 1 else ""
    return (
        f"round_to={round_to}: {narrow[0]}{others} have fewer {of} and stay whole; give round_to=auto or a smaller "
        "multiple to cut them, too.",
    )


def _largest(blocks: Sequence[int], width: int) -> int:
    """The largest block that is at most an eighth of the width; 1 where none is."""
    return next((block for block in blocks if block * _SHARE <= width), 1)


def _halves(step: int) -> tuple[int, ...]:
    found = []
    while step > 1:
        found.append(step)
        step //= 2
    return tuple(found)
