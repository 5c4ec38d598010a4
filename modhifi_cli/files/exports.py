"""The network as a file that other programs run, believed only after it was run itself.

Every export is written beside its destination, read back by its own runtime on a batch of another size than the one
that was traced, compared with the network's logits, and only then moved to its name: a wrong file never lies there.
"""

import copy
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError, is_number

_TRACED_BATCH = 2  # torch.export takes a batch of 1 for a constant, so the example is repeated
_CHECKED_BATCH = 3  # another size than the traced one: a batch size frozen by the trace fails here
_LARGEST_SINGLE_FILE = 1 << 30  # bytes of tensors; a protobuf file ends at 2 GB, so larger ONNX weights lie beside it


@dataclass(frozen=True)
class ExportReport:
    """What was written and how near it came to the network.

    Attributes:
        format: ``"onnx"`` or ``"torch_export"``.
        path: The file.
        bytes: Its size, weights beside it included.
        batch: Images in the comparison.
        max_difference: Largest absolute difference of a logit.
        max_logit: Largest absolute logit of the network.
        tolerance: Largest share max_difference / max_logit that was allowed.
        runtime: What ran it, with version.
        seconds: For writing and checking.
    """

    format: str
    path: Path
    bytes: int
    batch: int
    max_difference: float
    max_logit: float
    tolerance: float
    runtime: str
    seconds: float


def to_onnx(
    model: nn.Module, example: Tensor, path: Path, *, tolerance: float = 1e-4, opset: int | None = None
) -> ExportReport:
    """Write the network as ONNX with a free batch size, run it in ONNX Runtime on the CPU, and compare.

    Input ``images`` and output ``logits`` are named; weights above 1 GB lie in ``<file>.data`` beside the file.

    Args:
        model: A network that maps ``[batch, channels, height, width]`` to ``[batch, classes]``. It is not changed.
        example: One input, ``[1, channels, height, width]``; it is part of the compared batch.
        path: The file, or an existing folder for ``model.onnx`` in it. An older file is replaced.
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
        opset: ONNX operator set, or None for PyTorch's default.

    Returns:
        What was written and the difference found.

    Raises:
        UnsupportedModelError: If the network cannot be traced with a free batch size, or the runtime refuses the file.
        NumericsError: If the logits differ by more than the tolerance, or are not finite.
        DataError: If the file cannot be written.
        ConfigError: If the tolerance is not above 0.
    """
    import onnxruntime

    def write(network: nn.Module, images: Tensor, file: Path) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())
        # Given the network itself, the exporter falls back to a fixed batch size when a free one fails; not so here.
        torch.onnx.export(
            _traced(network, images),
            (),
            file,
            dynamo=True,
            input_names=["images"],
            output_names=["logits"],
            external_data=size > _LARGEST_SINGLE_FILE,
            opset_version=opset,
            verbose=False,
        )

    def run(file: Path, images: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    runtime = f"onnxruntime {onnxruntime.__version__}"
    return _export(model, example, path, "onnx", "model.onnx", write, run, runtime=runtime, tolerance=tolerance)


def to_torch_export(model: nn.Module, example: Tensor, path: Path, *, tolerance: float = 1e-4) -> ExportReport:
    """Write the network as a torch.export program with a free batch size, load it again, and compare.

    ``torch.export.load(path).module()`` gives the network without this package.

    Args:
        model: A network that maps ``[batch, channels, height, width]`` to ``[batch, classes]``. It is not changed.
        example: One input, ``[1, channels, height, width]``; it is part of the compared batch.
        path: The file, or an existing folder for ``model.pt2`` in it. An older file is replaced.
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.

    Returns:
        What was written and the difference found.

    Raises:
        UnsupportedModelError: If the network cannot be traced with a free batch size.
        NumericsError: If the logits differ by more than the tolerance, or are not finite.
        DataError: If the file cannot be written.
        ConfigError: If the tolerance is not above 0.
    """

    def write(network: nn.Module, images: Tensor, file: Path) -> None:
        torch.export.save(_traced(network, images), file)

    def run(file: Path, images: Tensor) -> Tensor:
        return torch.export.load(file).module()(images)

    runtime = f"torch {torch.__version__}"
    return _export(model, example, path, "torch_export", "model.pt2", write, run, runtime=runtime, tolerance=tolerance)


def _export(
    model: nn.Module,
    example: Tensor,
    path: Path,
    kind: str,
    default_name: str,
    write: Callable[[nn.Module, Tensor, Path], None],
    run: Callable[[Path, Tensor], Tensor],
    *,
    runtime: str,
    tolerance: float,
) -> ExportReport:
    if not is_number(tolerance) or not tolerance > 0:
        raise ConfigError(
            f"export.{kind}.tolerance: expected a number above 0, got {tolerance!r}; 1e-4 is a good start."
        )
    start = time.perf_counter()
    path = Path(path)
    path = path / default_name if path.is_dir() else path
    # A copy on the CPU: the runtimes that check are there, and tracing must not touch the network that goes on living.
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    images = _images(example, network)
    with torch.inference_mode():
        expected = network(images)
    if not isinstance(expected, Tensor):
        raise UnsupportedModelError(
            f"export.{kind}: expected a network that returns one tensor of logits, got {type(expected).__name__}; "
            f"leave {kind} out of export=[…]."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            file = Path(folder) / path.name
            with _quiet():
                found = _written_and_run(network, images, file, kind, write, run)
            difference, largest = _compare(found, expected, kind=kind, runtime=runtime, tolerance=tolerance)
            size = 0
            for part in sorted(Path(folder).iterdir()):
                size += part.stat().st_size
                os.replace(part, path.parent / part.name)
    except OSError as error:
        raise DataError(
            f"export.{kind}: expected to write {path}, got '{error.strerror or error}'; "
            "choose another output folder or make room."
        ) from error
    return ExportReport(
        format=kind,
        path=path,
        bytes=size,
        batch=len(images),
        max_difference=difference,
        max_logit=largest,
        tolerance=float(tolerance),
        runtime=runtime,
        seconds=time.perf_counter() - start,
    )


def _traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _images(example: Tensor, network: nn.Module) -> Tensor:
    """The example and noise of its size, ``[_CHECKED_BATCH, channels, height, width]`` in the network's type."""
    dtype = next((tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()), torch.float32)
    noise = torch.randn(
        (_CHECKED_BATCH - 1, *example.shape[1:]), generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    return torch.cat([example[:1].detach().cpu().float(), noise]).to(dtype)


def _written_and_run(network: nn.Module, images: Tensor, file: Path, kind: str, write, run) -> Tensor:
    try:
        write(network, images[:_TRACED_BATCH], file)
    except OSError:
        raise
    except Exception as error:  # the exporters raise whatever their many stages raise
        raise UnsupportedModelError(
            f"export.{kind}: expected a network that can be traced with a free batch size, "
            f"got {type(error).__name__} ({_first_line(error)}); leave {kind} out of export=[…]."
        ) from error
    try:
        return run(file, images)
    except Exception as error:
        raise UnsupportedModelError(
            f"export.{kind}: expected the written file to run on {len(images)} images, "
            f"got {type(error).__name__} ({_first_line(error)}); leave {kind} out of export=[…]."
        ) from error


def _compare(found: Tensor, expected: Tensor, *, kind: str, runtime: str, tolerance: float) -> tuple[float, float]:
    """Largest absolute difference and largest absolute logit; an error where they are too far apart."""
    if found.shape != expected.shape:
        raise UnsupportedModelError(
            f"export.{kind}: expected logits of shape {list(expected.shape)} from {runtime}, "
            f"got {list(found.shape)}; leave {kind} out of export=[…]."
        )
    found, expected = found.double(), expected.double()
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    # Not `difference > …`: a NaN on either side must not pass.
    if not difference <= tolerance * largest:
        raise NumericsError(
            f"export.{kind}: expected logits within {tolerance:g} of the largest ({largest:.6g}), "
            f"got a difference of {difference:.6g} from {runtime} on {len(expected)} images; "
            f"raise export.{kind}.tolerance if that is good enough, or leave {kind} out of export=[…]."
        )
    return difference, largest


def _first_line(error: Exception) -> str:
    # torch wraps the reason into long reports of its own; the cause below it says it in one line.
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


@contextmanager
def _quiet():
    """Exporters warn of their own deprecations while they work; what went wrong comes as an error anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
