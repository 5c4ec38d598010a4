"""How close the edited network's answers are to the dense one's, without any label."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from modhifi_cli.errors import UnsupportedModelError
from modhifi_cli.evaluation.forward import logits_of_batches, ready_to_measure
from modhifi_cli.records import ImageSource, Measurement, Progress


def measure(
    *,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
) -> tuple[Measurement, ...]:
    """Share of images with the reference network's answer, and the mean divergence from its probabilities.

    The first network is the reference. Held-out images are used where they are given; otherwise the calibration
    images, which the edit has seen, so that the numbers flatter it: `protocol["held_out"]` says which.

    Args: see `modhifi_cli.evaluation.Measure`.

    Returns:
        For every network but the first ``agreement``, % of images with the same largest logit, 0 … 100, and ``kl``,
        the mean over images of KL(reference ‖ network) = Σ_c p_c (log p_c − log q_c), nats, ≥ 0. Empty with one
        network or without images; `token_perplexity` says the same of networks that read text.

    Raises:
        NumericsError: If logits are NaN or infinite.
        UnsupportedModelError: If the networks do not have the same number of classes.
    """
    held_out = evaluation_data is not None
    source = evaluation_data if held_out else calibration_data
    if source is None or len(models) < 2 or not example.is_floating_point():
        return ()
    reference, *others = models
    same = dict.fromkeys(others, 0)
    divergence = dict.fromkeys(others, 0.0)
    samples = 0
    batches = logits_of_batches(
        models,
        source,
        place="evaluation_data" if held_out else "calibration_data",
        stage="agreement",
        device=device,
        batch_size=batch_size,
        progress=progress,
    )
    with ready_to_measure(models, device):
        for logits, _ in batches:
            for name in others:
                if logits[name].shape != logits[reference].shape:
                    raise UnsupportedModelError(
                        f"{name}: agreement needs as many classes as '{reference}' has ({logits[reference].shape[1]}), "
                        f"got {logits[name].shape[1]}; compare networks with the same classes, "
                        "or leave agreement out of evaluation=[…]."
                    )
                same[name] += int((logits[name].argmax(dim=1) == logits[reference].argmax(dim=1)).sum())
                divergence[name] += float(kl_divergence(logits[reference], logits[name]).sum())
            samples += len(logits[reference])
    protocol = {
        "reference": reference,
        "held_out": held_out,
        "samples": samples,
        "batch_size": batch_size,
        "device": str(device),
        "data": dict(source.protocol),
    }
    return tuple(
        measurement
        for name in others
        for measurement in (
            Measurement(name, "agreement", 100 * same[name] / samples, "%", {**protocol, "same": same[name]}),
            Measurement(name, "kl", divergence[name] / samples, "nats", protocol),
        )
    )


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL divergence of the softmax of `other` from the softmax of `reference`, per image.

    Args:
        reference: Logits, ``[batch, classes]`` float64.
        other: Logits, ``[batch, classes]`` float64.

    Returns:
        ``[batch]`` float64, nats, ≥ 0 (rounding below zero is cut off).
    """
    log_p, log_q = reference.log_softmax(dim=1), other.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1).clamp(min=0.0)
