"""Settings of a run as the tasks take them: the method's steps, recipe, budget and walk, and what an audit asks.

The verbs and the functions for Python build here, so that the same words are the same run. Tasks are imported where
they are built: nobody needs all of them.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modhifi_cli.settings.targets import build

if TYPE_CHECKING:
    from modhifi_cli.auditing.audit import AuditSettings
    from modhifi_cli.engine.team import Team
    from modhifi_cli.engine.token_walk import DecoderOptions
    from modhifi_cli.engine.walk import Budget, Recipe, Walk
    from modhifi_cli.records import ImageSource

_STEPS = ("scoring", "selection", "compensation", "allocation", "schedule")
_ATTACKS = ("probe", "relearn", "membership", "verdict", "further")


def steps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The method's steps by their names: scoring, selection, compensation, allocation and schedule.

    What comes after them is read here, too, so that a wrong number of the healing is told before any work.
    """
    if settings.get("healing"):
        build(settings["healing"])
    return {key: build(settings[key]) for key in _STEPS}


def even_widths(settings: Mapping[str, Any]) -> bool:
    """Whether all layers of a language model are cut alike: the allocation looks at no error curves."""
    return not getattr(build(settings["allocation"]), "needs_curves", False)


def recipe(settings: Mapping[str, Any], *, reads_text: bool) -> "Recipe":
    """The method of a run; the head of a language model is no linear layer behind a pooling, and stays as it is."""
    from modhifi_cli.engine.walk import Recipe

    classifier = "keep" if reads_text else settings["classifier"]
    return Recipe(**steps(settings), classifier=classifier, seed=settings["runtime"]["seed"])


def budget(settings: Mapping[str, Any], price: Any) -> "Budget":
    """What shall be removed.

    Args:
        settings: Of the run.
        price: What `sparsity` counts, as ``target`` is built.
    """
    from modhifi_cli.engine.walk import Budget
    from modhifi_cli.evaluation.runtimes import runtime

    block = runtime(settings["runtime"]["serve"]).BLOCK
    return Budget(float(settings["sparsity"]), price, settings["round_to"], block)


def decoder_options(settings: Mapping[str, Any]) -> "DecoderOptions":
    """What of a language model is pruned, and how its layers are walked."""
    return build(settings["decoder"], components=tuple(settings["components"]))


def walk(
    model: nn.Module,
    settings: Mapping[str, Any],
    calibration: "ImageSource",
    device: torch.device,
    *,
    reads_text: bool,
    team: "Team | None" = None,
) -> "Walk":
    """A network on its calibration data, walked as its kind asks for.

    Args:
        model: The network, which the walk edits.
        settings: Of the run.
        calibration: Images, or windows of tokens.
        device: Where forwards run.
        reads_text: Whether it is a language model.
        team: Other processes of the same run, or None.
    """
    runtime = settings["runtime"]
    given: dict[str, Any] = {
        "exclude": tuple(settings["exclude"]), "batch_size": runtime["batch_size"], "device": device, "team": team,
    }  # fmt: skip
    if reads_text:
        from modhifi_cli.engine.token_walk import TokenWalk

        return TokenWalk(model, calibration, options=decoder_options(settings), **given)
    from modhifi_cli.engine.image_walk import ImageWalk

    gathering = build(settings["statistics"])
    return ImageWalk(
        model, calibration, batchnorm=settings["batchnorm"], gathering=gathering, seed=runtime["seed"],
        query_key=settings.get("query_key", False), **given,
    )  # fmt: skip


def audit_settings(audit: Mapping[str, Any]) -> "AuditSettings":
    """What an audit does, from the ``audit`` group; runs from before there were further attacks have none.

    Raises:
        ConfigError: If one is out of range.
    """
    from modhifi_cli.auditing.audit import AuditSettings

    return AuditSettings(**{part: build(audit[part]) for part in _ATTACKS if audit.get(part)})
