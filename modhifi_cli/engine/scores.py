"""Scores of all components of a network as it stands, without cutting anything."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from modhifi_cli.engine.gathering import Gathered, Gathering
from modhifi_cli.engine.image_walk import ImageWalk
from modhifi_cli.engine.site import consumers_of, producers_of
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.components import ComponentGroup
from modhifi_cli.records import ImageSource, Progress
from modhifi_cli.roles import Scoring


def component_scores(
    model: nn.Module,
    *,
    calibration: ImageSource,
    scoring: Scoring,
    exclude: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    seed: int = 0,
    gathering: Gathering | None = None,
) -> Iterator[Progress | dict[str, Tensor]]:
    """Score every component of every group of the dense network, from one walk over the images.

    Args:
        model: Network in evaluation mode; moved to `device`, else left as found.
        calibration: Images.
        scoring: A score that needs no classes.
        exclude: Names of modules to leave alone.
        batch_size: Images a forward.
        device: Where the forwards run.
        seed: For scores that draw.
        gathering: How statistics are gathered.

    Yields:
        Progress, and at last group name → ``[components]`` float64: the mean over all voters (live outputs of all
        consumers, or criteria), larger is more worth keeping.

    Raises:
        ConfigError: If the score needs classes.
        NumericsError: If activations are not finite, or a layer is dead.
        UnsupportedModelError: If the network cannot be traced.
    """
    if scoring.needs_labels:
        raise ConfigError(f"{type(scoring).__name__} tells classes apart and scores while it prunes; choose another.")
    walk = ImageWalk(
        model, calibration, exclude=exclude, batchnorm="stored", batch_size=batch_size, device=device, gathering=gathering,
        seed=seed,
    )  # fmt: skip
    gathered: dict[str, Gathered] = {}
    slots = {slot.module: slot for part in walk.parts for slot in walk.consumers(part)}
    if scoring.needs_statistics and slots:
        gathered = yield from walk.look(tuple(slots.values()), "scores", hold_out=False)
    yield {part.name: _scores(walk, scoring, part, number, seed, gathered) for number, part in enumerate(walk.parts)}


def _scores(
    walk: ImageWalk, scoring: Scoring, part: ComponentGroup, number: int, seed: int, gathered: dict[str, Gathered]
) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 7_919 * number)
    consumers = consumers_of(walk, part, gathered)
    votes = scoring(consumers, producers_of(walk, part, consumers), generator=generator).votes
    return torch.cat([rows.cpu() for rows in votes]).mean(0)
