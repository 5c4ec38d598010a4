"""Scores of all components of a network as it stands, without cutting anything."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from modhifi_cli.engine.edit import Run, consumer_of, filters_of, look, weighted_consumers
from modhifi_cli.engine.gathering import Gathered, Gathering
from modhifi_cli.engine.image_walk import Activations
from modhifi_cli.engine.prune import discover, example_of, limit_bytes
from modhifi_cli.errors import ConfigError
from modhifi_cli.graph.components import ComponentGroup, Layout
from modhifi_cli.numerics.compensation import NoCompensation
from modhifi_cli.numerics.selection import TopK
from modhifi_cli.records import ImageSource, Progress


def component_scores(
    model: nn.Module,
    *,
    calibration: ImageSource,
    scoring: Callable,
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
    if getattr(scoring, "needs_labels", False):
        raise ConfigError(f"{type(scoring).__name__} tells classes apart and scores while it prunes; choose another.")
    gathering = gathering or Gathering()
    device = torch.device(device)
    model.to(device).eval()
    segments, groups, _ = discover(model, example_of(calibration, device), exclude=exclude)
    walker = Activations(
        model, segments, calibration, batch_size=batch_size, device=device, limit_bytes=limit_bytes(gathering)
    )
    run = Run(
        model, segments, walker, Layout(model, groups), scoring, TopK(), NoCompensation(), False, gathering, seed
    )  # fmt: skip
    gathered: dict[str, Gathered] = {}
    slots = {slot.module: slot for group in groups for slot in weighted_consumers(run, group)}
    if scoring.needs_statistics and slots:
        yield from look(run, tuple(slots.values()), gathered, "scores")
    yield {group.name: _scores(run, group, number, gathered) for number, group in enumerate(groups)}


def _scores(run: Run, group: ComponentGroup, number: int, gathered: dict[str, Gathered]) -> Tensor:
    alive = run.layout.alive(group)
    consumers = [consumer_of(run, slot, alive, gathered) for slot in weighted_consumers(run, group)]
    producers = [weights for slot in group.producers if (weights := filters_of(run, slot, alive)) is not None]
    generator = torch.Generator().manual_seed(run.seed + 7_919 * number)
    votes = run.scoring(consumers, producers, generator=generator).votes
    return torch.cat([rows.cpu() for rows in votes]).mean(0)
