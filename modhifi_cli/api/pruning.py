"""Pruning from Python: a network and samples go in, a smaller network and a record come out; no files, no printing."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.api.bar import Listener, listening
from modhifi_cli.api.given import Batches, Forward, Given, is_decoder, names, ready
from modhifi_cli.api.results import Pruned
from modhifi_cli.api.words import own_words
from modhifi_cli.errors import ConfigError
from modhifi_cli.evaluation.latency_table import LatencyTable
from modhifi_cli.graph.components import ComponentGroup, Refusal, complement
from modhifi_cli.records import Edit, Progress, last_of
from modhifi_cli.settings import config, recipes

_TARGETS = ("auto", "params", "flops", "components", "latency")


@own_words
def prune(
    model: nn.Module,
    batches: Batches,
    *,
    sparsity: float = 0.4,
    target: str = "auto",
    preset: str = "best",
    exclude: str | Sequence[str] = (),
    components: str | Sequence[str] = "mlp",
    round_to: int | str = "auto",
    settings: Sequence[str] = (),
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    num_samples: int | str | None = "auto",
    check_data: bool = True,
    in_place: bool = False,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> tuple[nn.Module, Pruned]:
    """Remove the components that carry least of each layer's output, and repair the rest in closed form.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: A trained network. What it gives beside or instead of logits counts as a whole: maps, several heads, lists,
            dictionaries. Or a causal language model of transformers.
        batches: Unlabelled calibration samples as the network wants them: a tensor ``[samples, …]`` (images, sound,
            volumes, tables) or anything that gives such batches (a ``DataLoader``), each a tensor, a tuple whose first is
            read, or a dictionary; labels and what else stands beside them are not looked at. For a language model texts
            (with `tokenizer`), or ids of tokens ``[sequences, length]`` int64.
        sparsity: Share that is removed, in [0, 1).
        target: Of what: ``"auto"`` (FLOPs, of a language model parameters of its decoder layers), ``"params"``,
            ``"flops"``, ``"components"``, or ``"latency"``, time measured where the network is.
        preset: A recipe of the command line by name: ``"best"``, ``"paper"``, ``"fast"``, ``"magnitude_batchnorm"`` …
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        components: Of a language model: ``"mlp"`` (hidden neurons), ``"attention"`` (heads), or both.
        round_to: Widths are multiples of it; ``"auto"``: of what suits each group where it runs.
        settings: Further settings in the command line's words, such as ``["compensation=joint", "selection=top_k"]``.
        tokenizer: Of a language model, where `batches` are texts.
        length: Tokens of a window cut from texts; None is 1,024, or as many as the network takes.
        batch_size: Samples a forward; None is 64 images or 8 windows.
        device: Where the forwards run; None: where the network is. The new network is on it (a language model stays
            where it was; its layers visit the device).
        seed: For everything that is drawn.
        num_samples: Calibration samples at most; ``"auto"`` is 2,000 images or 128 windows; None takes all.
        check_data: Look at the images first, and keep the stored BatchNorm statistics where they are too poor.
        in_place: Change `model` itself and return it, instead of a copy.
        forward: Your function of model and batch, ``forward(model, batch)``, where the network does not simply take what
            is read of a batch: several inputs, masks, what of its answer counts. It is handed whole batches.
        inputs: What is read of a batch that is a dictionary (its key) or a tuple (its place); None guesses.
        progress: None shows a bar, False nothing; a function is called with a `Progress` at every step.

    Returns:
        The new network in evaluation mode, of the same class with smaller layers, and what was done.

    Raises:
        ConfigError: If a setting is unknown or out of range, or the target cannot be reached.
        DataError: If `batches` holds no samples that fit.
        NumericsError: If weights or activations are not finite.
        UnsupportedModelError: If the network cannot be traced or holds nothing that can be pruned.
    """
    chosen = _chosen(model, sparsity, target, preset, settings)
    given = ready(
        model, batches, device, most=num_samples, in_place=in_place, forward=forward, inputs=inputs, tokenizer=tokenizer,
        length=length, seed=seed,
    )  # fmt: skip
    chosen["runtime"] |= {"batch_size": batch_size or (8 if given.reads_text else 64), "seed": seed}
    left_alone = names(exclude) or tuple(chosen["exclude"])
    chosen |= {"components": names(components), "exclude": given.inside.inner(left_alone), "round_to": round_to}
    with listening(progress, "pruning") as listen:
        return _pruned(given, chosen, check_data, listen)


def _chosen(
    model: nn.Module, sparsity: float, target: str, preset: str, settings: Sequence[str]
) -> dict[str, Any]:
    """All settings of a run, as the command line composes them from the same words."""
    if target not in _TARGETS:
        raise ConfigError(
            f"target must be {', '.join(_TARGETS[:-1])} or {_TARGETS[-1]}, got '{target}'; a share that has to be searched "
            "for (max_drop) is for the command line."
        )
    if not isinstance(preset, str) or preset not in config.preset_names():
        known = ", ".join(config.preset_names())
        raise ConfigError(f"preset: there is no recipe {preset!r}; known: {known}.")
    kind = ["model=hf", "model.path=given", "data=text", "data.path=given"] if is_decoder(model) else []
    words = [*kind, f"preset={preset}", f"target={target}", f"sparsity={sparsity}", *settings]
    chosen = config.steps("prune", words)
    if chosen.get("outside"):
        raise ConfigError(f"preset={preset} is another library's method; compare with it on the command line.")
    return chosen


def _pruned(given: Given, chosen: dict[str, Any], check_data: bool, listen: Listener) -> tuple[nn.Module, Pruned]:
    from modhifi_cli.engine.healing import check_samples
    from modhifi_cli.engine.plan import Plan, Summary
    from modhifi_cli.engine.prune import prune_
    from modhifi_cli.graph.counting import count

    edited, inside, price = given.network, given.inside, config.build(chosen["target"])
    counted_on = given.example if not given.reads_text else given.example.to(next(edited.parameters()).device)
    before, warnings, dense = count(edited, counted_on), list(inside.folded), None
    if chosen.get("healing"):
        check_samples(len(given.samples))
    if chosen.get("healing") or price.timed:
        dense = copy.deepcopy(edited)
    if check_data and not given.reads_text:
        chosen["batchnorm"] = _batchnorm(given, chosen, listen, warnings)
    recipe, budget = recipes.recipe(chosen, reads_text=given.reads_text), recipes.budget(chosen, price)
    walk = recipes.walk(edited, chosen, given.samples, given.device, reads_text=given.reads_text)
    plan, summary, table, edits = None, None, None, []
    for event in prune_(walk, recipe, budget):
        if isinstance(event, Plan):
            plan = event
        elif isinstance(event, Edit):
            edits.append(event)
        elif isinstance(event, Summary):
            summary = event
        elif isinstance(event, LatencyTable):
            table = event
        elif isinstance(event, Progress):
            listen(event)
    assert plan is not None and summary is not None, "the task ended without a summary"
    if dense is not None and chosen.get("healing"):
        _heal_(given, dense, chosen, edits, listen, warnings)
    after, achieved = count(edited, counted_on), dict(summary.achieved)
    if dense is not None and table is not None:
        achieved["latency"] = _saved(dense, edited, given, price, table, listen)
    sizes = {group.name: group.components for group in plan.groups}
    kept = {inside.outer(name): numbers for name, numbers in _kept(sizes, edits).items()}
    sizes = {inside.outer(name): size for name, size in sizes.items()}
    return inside.network(edited), Pruned(
        removed={name: complement(numbers, sizes[name]) for name, numbers in kept.items()},
        kept=kept,
        refused=tuple(inside.refusal(each) for each in plan.refused),
        achieved=achieved,
        before={"parameters": before.parameters, "macs": before.macs},
        after={"parameters": after.parameters, "macs": after.macs},
        edits=tuple(inside.edit(edit) for edit in edits),
        warnings=(*warnings, *summary.warnings),
    )


def _heal_(
    given: Given, dense: nn.Module, chosen: Mapping[str, Any], edits: list[Edit], listen: Listener, warnings: list[str]
) -> None:
    """Train the pruned network towards the dense one's own answers; `edits` and `warnings` grow."""
    from modhifi_cli.engine.healing import Healed, about, heal_

    recipe, seed = config.build(chosen["healing"]), chosen["runtime"]["seed"]
    for event in heal_(given.network, dense, given.samples, recipe=recipe, edits=edits, device=given.device, seed=seed):
        if isinstance(event, Edit):
            edits.append(event)
        elif isinstance(event, Progress):
            listen(event)
        elif isinstance(event, Healed):
            warnings += [*event.warnings, *((about(event),) if event.trained else ())]


def _saved(
    dense: nn.Module, edited: nn.Module, given: Given, price: Any, table: LatencyTable, listen: Listener
) -> float:
    """Share of the dense network's time that the new one really saves here."""
    from modhifi_cli.evaluation.forward import ready_to_measure
    from modhifi_cli.evaluation.latency_probe import Saved, saved_share, stopwatch_in

    with ready_to_measure({"dense": dense, "edited": edited}, given.device):
        events = saved_share(
            dense, edited, given.example, batch=int(table.protocol["batch"]), rounds=2 * price.rounds,
            max_seconds=float(price.max_seconds), stopwatch=stopwatch_in(price.serve, given.device),
        )  # fmt: skip
        return last_of(events, Saved, listen).share


@own_words
def groups(
    model: nn.Module,
    batches: Batches = (),
    *,
    exclude: str | Sequence[str] = (),
    components: str | Sequence[str] = ("mlp", "attention"),
    forward: Forward | None = None,
    inputs: str | int | None = None,
) -> tuple[tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    """What can be removed of a network: its groups of coupled components, and what is left alone with the reason.

    Args:
        model: A network, or a language model; left as it was.
        batches: Samples as of `prune`, of which two are looked at; a language model needs none.
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        components: Of a language model, as of `prune`.
        forward, inputs: As of `prune`.

    Returns:
        The groups in forward order, with positions in the coordinates of the network as it is, and what is left alone.
        Features of queries and keys (`product` is true) are among them; `prune` cuts those in ``preset="best"`` or
        with ``settings=["query_key=true"]``.

    Raises:
        ConfigError: If `model` is no network, or an excluded module does not exist.
        DataError: If `batches` holds no samples that fit.
        UnsupportedModelError: If the network cannot be traced, or a language model holds nothing that can be pruned.
    """
    from modhifi_cli.engine.plan import discover, example_of

    if is_decoder(model):
        return _parts(model, names(exclude), names(components))
    given = ready(model, batches, None, most=2, forward=forward, inputs=inputs)
    inside, example = given.inside, example_of(given.samples, given.device)
    _, found, refused = discover(given.network, example, exclude=inside.inner(names(exclude)), products=True)
    return tuple(inside.group(group) for group in found), tuple(inside.refusal(each) for each in refused)


def _parts(
    model: nn.Module, exclude: Sequence[str], components: Sequence[str]
) -> tuple[tuple[ComponentGroup, ...], tuple[Refusal, ...]]:
    from modhifi_cli.graph.decoder import find_parts

    decoder = find_parts(model, components=tuple(components), exclude=exclude)
    return tuple(part.group for part in decoder.parts), tuple(decoder.refused)


@own_words
def score(
    model: nn.Module,
    batches: Batches,
    *,
    scoring: str = "singleton",
    exclude: str | Sequence[str] = (),
    settings: Sequence[str] = (),
    batch_size: int = 64,
    device: torch.device | str | None = None,
    seed: int = 0,
    num_samples: int | str | None = "auto",
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> dict[str, Tensor]:
    """How much each component of each group matters, without cutting anything.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: A trained network that takes an image batch; left as it was.
        batches: Images as of `prune`.
        scoring: ``"singleton"`` (fidelity of a component alone), ``"saliency"``, ``"energy"``, ``"fluctuation"``,
            ``"magnitude_l1"``, ``"magnitude_l2"`` or ``"random"``.
        exclude: Modules to leave alone: a name, or several; what lies inside them, too.
        settings: Further settings in the command line's words.
        batch_size: Images a forward.
        device: Where the forwards run; None: where the network is.
        seed: For scores that draw.
        num_samples: Images at most; ``"auto"`` is 2,000, None takes all.
        forward, inputs: As of `prune`.
        progress: As of `prune`.

    Returns:
        Group → ``[components]`` float64: the mean over all that vote, larger is more worth keeping.

    Raises:
        ConfigError, DataError, NumericsError, UnsupportedModelError: As `prune`.
    """
    from modhifi_cli.engine.scores import component_scores

    chosen = config.steps("prune", [f"scoring={scoring}", *settings])
    if is_decoder(model):
        raise ConfigError("score: neurons of language models are scored while their layers are cut; use prune.")
    given = ready(model, batches, device, most=num_samples, forward=forward, inputs=inputs)
    with listening(progress, "scoring") as listen:
        events = component_scores(
            given.network,
            calibration=given.samples,
            scoring=config.build(chosen["scoring"]),
            exclude=given.inside.inner(names(exclude)),
            batch_size=batch_size,
            device=given.device,
            seed=seed,
            gathering=config.build(chosen["statistics"]),
        )
        scores: dict[str, Tensor] = last_of(events, dict, listen)
    return {given.inside.outer(name): values for name, values in scores.items()}


def _batchnorm(given: Given, chosen: Mapping[str, Any], listen: Listener, warnings: list[str]) -> str:
    """What is done with BatchNorm after a look at the images, as the command line decides it; `warnings` grows."""
    from modhifi_cli.engine.quality import Quality, assess

    asked, batch_size = chosen["batchnorm"], chosen["runtime"]["batch_size"]
    events = assess(given.network, given.samples, batch_size=batch_size, device=given.device)
    found = last_of(events, Quality, listen)
    warnings += found.warnings
    return "stored" if asked == "reestimate" and not found.may_reestimate else asked


def _kept(sizes: Mapping[str, int], edits: Sequence[Edit]) -> dict[str, Tensor]:
    """Dense numbers of what every group keeps after all passes."""
    kept = {name: torch.arange(count) for name, count in sizes.items()}
    for edit in edits:
        if edit.name in kept and edit.removed.numel():
            kept[edit.name] = kept[edit.name][edit.kept]
    return kept
