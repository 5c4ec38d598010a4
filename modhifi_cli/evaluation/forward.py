"""Forward passes for measuring: several networks over the same batches, logits checked, networks given back unchanged.

Logits come as ``[batch, classes]`` in float64 on the CPU, so that sums over many images do not lose digits. Which
number is made of them is left to the measurements.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from modhifi_cli.errors import DataError, NumericsError, UnsupportedModelError
from modhifi_cli.evaluation.visiting import fits, tensors_held, visits
from modhifi_cli.records import ImageSource, Progress


@contextmanager
def ready_to_measure(models: Mapping[str, nn.Module], device: torch.device) -> Iterator[None]:
    """Hold the networks on `device` in evaluation mode; then give them back as they were.

    Device and the training mode of every module are restored, after an exception too. A network that a card has no room
    for stays on the host, and its parts visit the card (`visiting`).

    Args:
        models: The networks by name.
        device: Where they shall be inside the ``with`` block.
    """
    with ExitStack() as restore:
        for model in models.values():
            home = next(tensors_held(model), torch.empty(0)).device
            restore.callback(_give_back, model, home, [(module, module.training) for module in model.modules()])
            model.eval()
            if fits(model, device):
                model.to(device)
            else:
                restore.enter_context(visits(model, device))
        yield


def logits_of_batches(
    models: Mapping[str, nn.Module],
    source: ImageSource,
    *,
    place: str,
    stage: str,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
    answers: Mapping[str, "RememberedLogits"] | None = None,
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    """The logits of every network on every batch, in one walk over the images.

    Images are decoded once for all networks, and are cast to the type of each network's first parameter.

    Args:
        models: The networks by name, held ready (`ready_to_measure`).
        source: The images.
        place: What the settings call the source, for messages: ``"evaluation_data"`` or ``"calibration_data"``.
        stage: What the progress shall be called.
        device: Where to run.
        batch_size: Images per forward pass.
        progress: Told after every batch.
        answers: Memories that shall learn what the networks of the same names say.

    Yields:
        Logits by network, each ``[batch, classes]`` float64 on the CPU, and the labels ``[batch]`` int64 or None.

    Raises:
        DataError: If the source holds no image.
        UnsupportedModelError: If a network does not return ``[batch, classes]``.
        NumericsError: If logits are NaN or infinite.
    """
    images_in_all = len(source)
    if images_in_all == 0:
        raise DataError(f"{place}: expected at least one image to measure {stage} on, got none; check {place}.path.")
    done = 0
    progress(Progress(stage, place, 0, images_in_all))
    remembering = bool(answers) or any(isinstance(model, RememberedLogits) for model in models.values())
    for images, labels in source.batches(batch_size):
        key = _content(images) if remembering else ""  # before they go to a card, not copied back from there
        here = images.to(device)  # once, for all networks
        logits = {}
        for name, model in models.items():
            # Not around the yield: an abandoned generator would leave the caller in inference mode.
            with torch.inference_mode():
                seen = here.to(_input_dtype(model))
                output = model.known(key, seen) if isinstance(model, RememberedLogits) else model(seen)
            logits[name] = _checked_logits(output, name=name, stage=stage, place=place, images=len(images), at=done)
            if answers is not None and name in answers:
                answers[name].remember(key, output)
        done += len(images)
        progress(Progress(stage, place, done, images_in_all))
        yield logits, labels


def labels_needed(labels: Tensor | None, measurement: str) -> Tensor:
    """The labels of a batch of evaluation images, ``[batch]`` int64 on the CPU, for a measurement that needs them.

    Raises:
        DataError: If the images carry none.
    """
    if labels is None:
        raise DataError(
            f"evaluation_data: {measurement} needs a label for every image, got images without labels; "
            f"give a labelled set, or leave {measurement} out of evaluation=[…]."
        )
    return labels.cpu()


class RememberedLogits(nn.Module):
    """A network that answers images it has seen before from memory, so that many comparisons run it only once.

    Images are known by the SHA-256 of their batch's bytes; the answer is the very tensor that was computed first.

    Args:
        model: The network; it must not be edited afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._logits: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """``[batch, channels, height, width]`` → logits ``[batch, classes]`` on the images' device."""
        return self.known(_content(images), images)

    def known(self, key: str, images: Tensor) -> Tensor:
        """As `forward`, for images whose content, `key`, has been looked at where they came from, before any cast."""
        if key not in self._logits:
            self._logits[key] = self.model(images).detach().cpu()
        return self._logits[key].to(images.device)

    def remember(self, key: str, logits: Tensor) -> None:
        """Learn what the network itself said elsewhere to images of the content `key`, ``[batch, classes]``."""
        self._logits[key] = logits.detach().cpu()


def _content(images: Tensor) -> str:
    return f"{tuple(images.shape)} {images.dtype} {hashlib.sha256(bytes_of(images)).hexdigest()}"


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's values as bytes, of any floating type (NumPy knows no bfloat16) and from any device."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def synchronize(device: torch.device) -> None:
    """Wait until everything queued on `device` is finished; nothing to wait for on the CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)


def _input_dtype(model: nn.Module) -> torch.dtype:
    """The type of the network's first floating-point parameter or buffer; float32 where it has none."""
    return next((tensor.dtype for tensor in tensors_held(model) if tensor.is_floating_point()), torch.float32)


def _checked_logits(output: object, *, name: str, stage: str, place: str, images: int, at: int) -> Tensor:
    if not isinstance(output, Tensor) or output.ndim != 2 or len(output) != images:
        got = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"{name}: {stage} needs logits of shape [{images}, classes] from the network, got {got}; "
            f"use a classifier, or leave {stage} out of evaluation=[…]."
        )
    logits = output.detach().to(device="cpu", dtype=torch.float64)
    finite = logits.isfinite().all(dim=1)
    if not finite.all():
        first = at + int((~finite).nonzero()[0])
        raise NumericsError(
            f"{name}: expected finite logits while measuring {stage}, got NaN or infinity for "
            f"{int((~finite).sum())} of {images} images (the first is image {first} of {place}); "
            "check the weights and the normalisation statistics, or run in float32."
        )
    return logits


def _give_back(model: nn.Module, home: torch.device, modes: list[tuple[nn.Module, bool]]) -> None:
    model.to(home)
    for module, training in modes:
        module.training = training
