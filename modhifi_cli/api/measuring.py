"""Measuring from Python: one network, or several methods and budgets side by side."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from modhifi_cli.api.bar import Listener, listening
from modhifi_cli.api.given import Batches, Forward, Given, ready
from modhifi_cli.api.pruning import prune
from modhifi_cli.api.results import Compared, Measured, Pruned
from modhifi_cli.api.words import own_words
from modhifi_cli.errors import ConfigError, NumericsError
from modhifi_cli.evaluation import agreement, size, token_perplexity, top1
from modhifi_cli.evaluation.forward import RememberedLogits
from modhifi_cli.pages import many


@own_words
def evaluate(
    model: nn.Module,
    batches: Batches,
    *,
    dense: nn.Module | None = None,
    tokenizer: Any = None,
    length: int | None = None,
    num_samples: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> Measured:
    """Measure a network: size, accuracy where there are labels, perplexity of text, agreement with a dense network.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: A classifier or a language model; left as it was.
        batches: Images, with labels (pairs) or without; of a language model texts or ids of tokens.
        dense: The network to compare with.
        tokenizer, length: As of `prune`; texts are read from their beginning, window after window.
        num_samples: Samples at most; None takes all.
        batch_size: Samples a forward; None is 64 images or 8 windows.
        device: Where the forwards run; None: where the network is.
        forward, inputs, progress: As of `prune`.

    Returns:
        ``parameters``, ``macs`` (of one sample), ``file_bytes``; with labels ``top1`` and ``top5`` (more than five
        classes), %; with `dense` ``agreement``, % of images with its answer, and ``kl``, nats; of a language model
        ``token_perplexity``, and with `dense` ``token_agreement``, %, and ``token_kl``, nats a token.

    Raises:
        DataError: If `batches` holds no samples that fit, or a label is outside of the classes.
        NumericsError: If logits are not finite.
        UnsupportedModelError: If the network gives no logits ``[batch, classes]``.
    """
    given = ready(
        model, batches, device, most=num_samples, forward=forward, inputs=inputs, tokenizer=tokenizer, length=length,
        scored=True,
    )  # fmt: skip
    with listening(progress, "measuring") as listen:
        return _measured(given, None if dense is None else given.of(dense), batch_size, listen)


def _measured(given: Given, dense: nn.Module | None, batch_size: int | None, listen: Listener) -> Measured:
    """What `evaluate` gives; `dense` is walked as it is."""
    models = {"model": given.network}
    if dense is not None:
        models = {"dense": dense, **models}
    example, labels = next(iter(given.samples.batches(1)))
    beside: dict[str, Any] = {
        "evaluation_data": given.samples, "calibration_data": None, "example": example, "device": given.device,
        "batch_size": batch_size or (8 if given.reads_text else 64), "progress": listen,
    }  # fmt: skip
    alone = {"model": given.network}
    found = [*size.measure(models=alone, **beside)]
    if given.reads_text:
        found += token_perplexity.measure(models=models, **beside)
    elif labels is not None:
        found += top1.measure(models=alone, **beside)
    if dense is not None and not given.reads_text:
        found += agreement.measure(models=models, **beside)
    return Measured({measurement.name: measurement.value for measurement in found if measurement.model == "model"})


@own_words
def compare(
    model: nn.Module,
    batches: Batches,
    evaluation: Batches,
    *,
    methods: Sequence[str] = ("best", "paper", "magnitude_batchnorm"),
    budgets: Sequence[float] = (0.2, 0.4, 0.6),
    target: str = "auto",
    settings: Sequence[str] = (),
    tokenizer: Any = None,
    length: int | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    num_samples: int | str | None = "auto",
    forward: Forward | None = None,
    inputs: str | int | None = None,
    progress: Listener | bool | None = None,
) -> Compared:
    """Prune by several methods to several budgets from the same samples, and measure all of them on the same ones.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: As of `prune`; left as it was.
        batches: Calibration samples as of `prune`.
        evaluation: What is measured on: images with labels (top-1) or without (agreement alone), or texts or token ids.
        methods: Names of presets.
        budgets: Shares of the target that are removed.
        target, settings, tokenizer, length, batch_size, device, seed, num_samples, forward, inputs: As of `prune`.
        progress: As of `prune`.

    Returns:
        A row a method and budget with the finding; the networks are kept with it. What one combination cannot do is
        told among ``failed``, and the others go on.

    Raises:
        ConfigError: If a setting is unknown or out of range.
        DataError: If there are no samples that fit.
        UnsupportedModelError: If nothing in the network can be pruned.
    """
    shared: dict[str, Any] = {
        "tokenizer": tokenizer, "length": length, "device": device, "forward": forward, "inputs": inputs,
    }  # fmt: skip
    for budget in budgets:
        if not isinstance(budget, int | float) or not 0 <= budget < 1:
            raise ConfigError(f"budgets: expected shares with 0 <= budget < 1, such as [0.2, 0.4]; got {budget!r}.")
    if not methods or isinstance(methods, str):
        raise ConfigError(f"methods: expected names of presets, such as ['best', 'paper']; got {methods!r}.")
    batches = _held(batches)
    given = ready(model, evaluation, scored=True, **shared)
    # Every comparison asks the dense network for the same images.
    dense = given.network if given.reads_text else RememberedLogits(given.network)
    with listening(progress, "measuring") as listen:
        before = _measured(given, None, batch_size, listen)
    runs, failed, networks = [], [], {}
    name = type(model).__name__
    for method, budget in itertools.product(methods, budgets):
        try:
            network, done = prune(
                model, batches, preset=method, sparsity=budget, target=target, settings=settings, seed=seed,
                num_samples=num_samples, batch_size=batch_size, progress=progress, **shared,
            )  # fmt: skip
        except NumericsError as error:
            failed.append(f"{method}, {budget:g}: {error}")
            runs.append(many.Run(method, budget, model=name, status="failed", message=str(error)))
            continue
        networks[method, budget] = network
        with listening(progress, "measuring") as listen:
            measured = _measured(replace(given, network=given.of(network)), dense, batch_size, listen)
        values = _removed(done) | measured
        runs.append(many.Run(method, budget, values=values, dense=before, model=name))
    rows = tuple(many.grouped(runs))
    plain = tuple({"method": row.method, "budget": row.budget, **row.mean} for row in rows)
    return Compared(plain, many.finding(rows, before), dict(before), networks, tuple(failed), rows)


def _held(batches: Batches) -> Batches:
    """Batches that can be gone through again: what gives them once only is put into a list."""
    return list(batches) if iter(batches) is batches else batches


def _removed(done: Pruned) -> dict[str, float]:
    return {f"removed_{name}": 100 * share for name, share in done.achieved.items()}
