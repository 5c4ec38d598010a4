"""Token perplexity of language models on evaluation text, and how near the edited network's predictions are."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from modhifi_cli.errors import NumericsError
from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.graph.answers import respond
from modhifi_cli.records import ImageSource, Measurement, Progress

_TOKENS_AT_ONCE = 2048  # logits of so many tokens over a vocabulary of 128,000 take 1 GB
_NOT_SCORED = -100


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
    """Perplexity of the next token, exp of the mean negative log-likelihood, over every scored token.

    The first token of a window has no context and is not scored, nor is what a window shares with the one before.
    This is *token* perplexity: comparable between networks with the same tokenizer, window length and stride only.

    Args: see `modhifi_cli.evaluation.Measure`; only `evaluation_data` is read.

    Returns:
        ``token_perplexity`` per network, ≥ 1; and for every network but the first ``token_agreement``, % of scored
        tokens with the same most likely prediction, and ``token_kl``, mean KL(reference ‖ network), nats. Empty for
        networks that read images, and without evaluation text.

    Raises:
        NumericsError: If logits are NaN or infinite.
    """
    if example.is_floating_point() or evaluation_data is None or not models:
        return ()
    reference = next(iter(models))
    loss, same, divergence = (dict.fromkeys(models, 0.0) for _ in range(3))
    scored = 0
    windows, done = len(evaluation_data), 0
    progress(Progress("token_perplexity", "evaluation_data", 0, windows))
    with ready_to_measure(models, device):
        for tokens, labels in evaluation_data.batches(max(1, min(batch_size, _TOKENS_AT_ONCE // example.shape[1]))):
            for part, wanted in zip(*(t.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])) for t in (tokens, labels))):
                part, wanted = part.to(device), wanted.to(device)[:, 1:].flatten()
                chosen = (wanted != _NOT_SCORED).nonzero().flatten()
                wanted = wanted[chosen]
                first: Tensor | None = None
                for name, model in models.items():
                    with torch.inference_mode():
                        logits = respond(model, part)[:, :-1].flatten(0, 1)[chosen].float()
                        predicted = logits.log_softmax(1)
                        total = float(functional.nll_loss(predicted, wanted, reduction="sum"))
                        if total != total or total == float("inf"):
                            raise NumericsError(
                                f"{name}: expected finite logits for token_perplexity, got NaN or infinity; "
                                "check the weights, or run in float32 (model.dtype=float32)."
                            )
                        loss[name] += total
                        if name == reference:
                            first = predicted
                        else:
                            same[name] += int((predicted.argmax(1) == first.argmax(1)).sum())
                            divergence[name] += float((first.exp() * (first - predicted)).sum(1).clamp(min=0).sum())
                scored += len(wanted)
                done += len(part)
                progress(Progress("token_perplexity", "evaluation_data", done, windows))
    protocol = {
        "scored_tokens": scored,
        "length": evaluation_data.protocol.get("length"),
        "stride": evaluation_data.protocol.get("stride"),
        "bos": evaluation_data.protocol.get("bos"),
        "device": str(device),
        "data": dict(evaluation_data.protocol),
    }
    found = []
    for name in models:
        mean = torch.tensor(loss[name] / scored, dtype=torch.float64)
        found.append(Measurement(name, "token_perplexity", float(mean.exp()), "", protocol))
        if name != reference:
            against = protocol | {"reference": reference}
            found.append(Measurement(name, "token_agreement", 100 * same[name] / scored, "%", against))
            found.append(Measurement(name, "token_kl", divergence[name] / scored, "nats", against))
    return tuple(found)
