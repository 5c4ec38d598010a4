"""Samples from nothing, from Python: images that a network's own statistics ask for, text that it writes itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modhifi_cli.api.bar import Listener, listening
from modhifi_cli.api.given import is_decoder
from modhifi_cli.api.words import own_words
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError
from modhifi_cli.files import cache as kept
from modhifi_cli.graph.folded import copied
from modhifi_cli.records import Preprocess, TextInput
from modhifi_cli.settings import config

_KINDS = ("inversion", "procedural")


@own_words
def synthesize(
    model: nn.Module,
    *,
    data: str = "auto",
    num_samples: int | str = "auto",
    preprocess: Mapping[str, Any] | None = None,
    tokenizer: Any = None,
    length: int | str = "auto",
    settings: Sequence[str] = (),
    cache: bool = True,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Listener | bool | None = None,
) -> Tensor:
    """Calibration samples made from the network alone, ready for `prune` or `unlearn`.

    One parameter for each of the command line's settings that applies here, by its word.

    Args:
        model: A network for images, or a causal language model of transformers; left as it was.
        data: ``"inversion"`` (images whose BatchNorm statistics are the stored ones; follows gradients of pixels),
            ``"procedural"`` (drawn without looking at the network), ``"auto"``: the former; of a language model always
            ``"generated"``, text that it samples.
        num_samples: How many; ``"auto"`` is what the command line takes (512 images, 128 above 96 px, 64 texts).
        preprocess: ``{"size": …, "mean": […], "std": […]}`` of a network for images, on the 0..1 scale of pixels; not
            needed for networks of timm.
        tokenizer: Of a language model; only its beginning-of-sequence token is looked at.
        length: Tokens of each text; ``"auto"`` is 512, or as many as the network takes.
        settings: Further settings in the command line's words, such as ``["data.steps=100"]``.
        cache: Whether finished parts are kept in the user's cache and taken from there.
        device: Where the forwards run; None: where the network is.
        seed: For everything that is drawn.
        progress: As of `prune`.

    Returns:
        Images as the network wants them, ``[samples, channels, height, width]`` float32, or ids ``[samples, length]``
        int64; on the CPU.

    Raises:
        ConfigError: If a setting is unknown or out of range, or the preprocessing is not said.
        NumericsError: If the optimisation diverges, or logits are not finite.
        UnsupportedModelError: If the network has no BatchNorm statistics to invert.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: expected a torch.nn.Module, got a {type(model).__name__}.")
    known = ("generated",) if is_decoder(model) else _KINDS
    if data not in ("auto", *known):
        raise ConfigError(f"data: expected auto or {' or '.join(known)} for a {type(model).__name__}, got {data!r}.")
    chosen = known[0] if data == "auto" else data
    count, long = ("sequences", [f"data.length={length}"]) if is_decoder(model) else ("num_samples", [])
    words = [f"data={chosen}", f"data.{count}={num_samples}", f"data.seed={seed}", *long, *settings]
    if chosen != "procedural" and not cache:
        words.append("data.cache=null")
    build = config.build(config.steps("prune", [*(["model=hf", "model.path=given"] if is_decoder(model) else []), *words])["data"])
    wanted = _wanted(model, preprocess, tokenizer)
    place = torch.device(device) if device is not None else next((one.device for one in model.parameters()), torch.device("cpu"))
    with listening(progress, "making samples") as listen:
        own = model if is_decoder(model) else copied(model)
        making = Making(own.eval(), type(model).__name__.lower(), place, listen, store=kept.open_store)
        given = {} if chosen == "procedural" else {"making": making}
        source = build(preprocess=wanted, labelled=False, **given)
    return torch.cat([samples for samples, _ in source.batches(64)])


def _wanted(model: nn.Module, preprocess: Mapping[str, Any] | None, tokenizer: Any) -> Preprocess | TextInput:
    """How samples become the network's input."""
    from modhifi_cli.models import hf, timm
    from modhifi_cli.models.module import preprocess_of

    if is_decoder(model):
        return hf.text_input(model.config, tokenizer)
    if getattr(model, "pretrained_cfg", None):
        return timm.described(model, preprocess, None, "network").preprocess
    return preprocess_of(preprocess)
