"""What every export shares: what it is told, what it reports, and writing that is believed only after it was checked.

A file is written beside its destination, read or run by its own runtime there, compared with the network, and only then
moved to its name: a wrong file never lies there.
"""

import copy
import functools
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, DataError, NumericsError, UnsupportedModelError, is_number
from modhifi_cli.records import LoadedModel

_TRACED_BATCH = 2  # torch.export takes a batch of 1 for a constant, so the example is repeated
_CHECKED_BATCHES = (3, 1)  # other sizes than the traced one: a batch size frozen by the trace fails here


@dataclass(frozen=True)
class ExportReport:
    """What was written and how near it came to the network.

    Attributes:
        format: Name of the format.
        path: The file, or the folder of a format that needs several files.
        bytes: Its size, weights beside it included.
        batch: Images in the largest comparison; 0 where weights were compared instead of logits.
        max_difference: Largest absolute difference of a logit (or of a weight).
        max_logit: Largest absolute logit of the network (or largest weight).
        tolerance: Largest share max_difference / max_logit that was allowed.
        runtime: What ran or read it, with version.
        seconds: For writing and checking.
        opens: How one opens it elsewhere, in words.
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
    opens: str = ""

    def row(self) -> dict[str, Any]:
        """What results.json tells: every field, and of the path its name alone."""
        return {**asdict(self), "path": self.path.name}


@dataclass(frozen=True)
class Intent:
    """What is known before a run of the network that will be exported.

    Attributes:
        even: Whether every layer keeps the same width.
        round_to: Hidden widths are multiples of it.
    """

    even: bool = True
    round_to: int = 1


class Export(Protocol):
    """The role of a format.

    Attributes:
        reads: ``"images"`` or ``"tokens"``: which networks it is for.
    """

    reads: ClassVar[str]

    def foresee(self, loaded: LoadedModel, intent: Intent) -> None:
        """Refuse, before any work, what the format cannot hold of a network that will be cut as intended."""
        ...

    def __call__(self, loaded: LoadedModel, *, example: Tensor, path: Path, facts: Mapping[str, str]) -> ExportReport:
        """Write a network.

        Args:
            loaded: The network to write, with its description; it is not changed.
            example: One input, ``[1, channels, height, width]``, or token ids.
            path: The file, or an existing folder for the format's own name in it. An older one is replaced.
            facts: What a file's own metadata shall say besides, such as ``{"sparsity": "0.4"}``.
        """
        ...


@dataclass(frozen=True)
class Graph:
    """The base of formats that hold one graph from images to logits.

    Attributes:
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.
    """

    tolerance: float = 1e-4
    reads: ClassVar[str] = "images"

    def foresee(self, loaded: LoadedModel, intent: Intent) -> None:
        """Nothing is known before the network was traced."""


@dataclass(frozen=True)
class Way:
    """How one format is written and run.

    Attributes:
        kind: Name of the format.
        file: Name of what is written.
        write: Writes the network for an example batch to a path.
        run: Runs what lies at a path on images.
        runtime: What runs it, with version.
        opens: How one opens it elsewhere.
        more: Further runtimes by name, each like `run`; every one must agree.
    """

    kind: str
    file: str
    write: Callable[[nn.Module, Tensor, Path], None]
    run: Callable[[Path, Tensor], Tensor]
    runtime: str
    opens: str = ""
    more: Mapping[str, Callable[[Path, Tensor], Tensor]] = field(default_factory=dict)


def written(model: nn.Module, example: Tensor, path: Path, way: Way, *, tolerance: float) -> ExportReport:
    """Write a network as one graph with a free batch size, run it, and move it to its place if the logits agree.

    Args:
        model: A network that maps ``[batch, channels, height, width]`` to ``[batch, classes]``. It is not changed.
        example: One input, ``[1, channels, height, width]``; it is part of the compared batches.
        path: The file, or an existing folder for the format's own name in it. An older one is replaced.
        way: How.
        tolerance: Largest difference of a logit allowed, as a share of the largest logit, > 0.

    Raises:
        UnsupportedModelError: If the network cannot be traced with a free batch size, or the runtime refuses the file.
        NumericsError: If the logits differ by more than the tolerance, or are not finite.
        DataError: If the file cannot be written.
        ConfigError: If the tolerance is not above 0.
    """
    if not is_number(tolerance) or not tolerance > 0:
        raise ConfigError(
            f"export.{way.kind}.tolerance: expected a number above 0, got {tolerance!r}; 1e-4 is a good start."
        )
    start = time.perf_counter()
    path = Path(path)
    path = path / way.file if path.is_dir() else path
    # A copy on the CPU: the runtimes that check are there, and tracing must not touch the network that goes on living.
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    images = _images(example, network)
    with torch.inference_mode():
        expected = network(images)
    if not isinstance(expected, Tensor):
        raise UnsupportedModelError(
            f"export.{way.kind}: expected a network that returns one tensor of logits, got {type(expected).__name__}; "
            f"leave {way.kind} out of export=[…]."
        )

    @functools.cache
    def exact() -> Tensor:
        with torch.inference_mode():
            return copy.deepcopy(network).double()(images.double())

    difference = largest = 0.0
    with placed(path, way.kind) as file:
        with quiet():
            _write(network, images, file, way)
            for name, run in {way.runtime: way.run, **way.more}.items():
                for batch in _CHECKED_BATCHES:
                    found = _run(run, file, images[:batch], way.kind)
                    told = compare(found, expected[:batch], exact, kind=way.kind, runtime=name, tolerance=tolerance)
                    difference, largest = max(difference, told[0]), max(largest, told[1])
        size = size_of(file.parent)
    return ExportReport(
        format=way.kind,
        path=path,
        bytes=size,
        batch=len(images),
        max_difference=difference,
        max_logit=largest,
        tolerance=float(tolerance),
        runtime=", ".join((way.runtime, *way.more)),
        seconds=time.perf_counter() - start,
        opens=way.opens,
    )


def traced(network: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    """The network as a program whose batch size is free and called ``batch``."""
    return torch.export.export(network, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))


@contextmanager
def placed(path: Path, kind: str) -> Iterator[Path]:
    """A place beside `path` to write to; what was written there, whole, takes its name when the block ends well."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
            yield Path(folder) / path.name
            for part in sorted(Path(folder).iterdir()):
                there = path.parent / part.name
                if there.is_dir() and not there.is_symlink():
                    aside = Path(tempfile.mkdtemp(prefix=".export-", dir=path.parent))
                    os.replace(there, aside / there.name)
                    os.replace(part, there)
                    _remove(aside)
                else:
                    os.replace(part, there)
    except OSError as error:
        raise DataError(
            f"export.{kind}: expected to write {path}, got '{error.strerror or error}'; "
            "choose another output folder or make room."
        ) from error


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(part.stat().st_size for part in folder.rglob("*") if part.is_file())


@contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of their own deprecations while they work; what went wrong comes as an error anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def first_line(error: Exception) -> str:
    """The reason in one line: torch wraps it into long reports of its own, and the cause below them says it."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _images(example: Tensor, network: nn.Module) -> Tensor:
    """The example and noise of its size, ``[largest checked batch, channels, height, width]`` in the network's type."""
    dtype = next((tensor.dtype for tensor in network.parameters() if tensor.is_floating_point()), torch.float32)
    noise = torch.randn(
        (max(_CHECKED_BATCHES) - 1, *example.shape[1:]),
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float32,
    )
    return torch.cat([example[:1].detach().cpu().float(), noise]).to(dtype)


def _write(network: nn.Module, images: Tensor, file: Path, way: Way) -> None:
    try:
        way.write(network, images[:_TRACED_BATCH], file)
    except OSError:
        raise
    except Exception as error:  # the exporters raise whatever their many stages raise
        raise UnsupportedModelError(
            f"export.{way.kind}: expected a network that can be traced with a free batch size, "
            f"got {type(error).__name__} ({first_line(error)}); leave {way.kind} out of export=[…]."
        ) from error


def _run(run: Callable[[Path, Tensor], Tensor], file: Path, images: Tensor, kind: str) -> Tensor:
    try:
        return run(file, images)
    except Exception as error:
        raise UnsupportedModelError(
            f"export.{kind}: expected the written file to run on {len(images)} images, "
            f"got {type(error).__name__} ({first_line(error)}); leave {kind} out of export=[…]."
        ) from error


def _rounds_as_much(found: Tensor, expected: Tensor, exact: Callable[[], Tensor], allowed: float) -> bool:
    """Whether PyTorch itself is off by half of what is allowed, and what was found is off by no more than 1.5 times that.

    Beyond ten times what is allowed it is no rounding, but a network that answers otherwise each time.
    """
    try:
        truth = exact()[: len(expected)]
    except RuntimeError:  # a network that cannot be run in float64
        return False
    own = float((expected - truth).abs().max())
    return allowed / 2 < own < 10 * allowed and float((found - truth).abs().max()) <= 1.5 * own


def compare(
    found: Tensor, expected: Tensor, exact: Callable[[], Tensor], *, kind: str, runtime: str, tolerance: float
) -> tuple[float, float]:
    """Hold a runtime's logits to the network's.

    A network whose own logits are that far from those of float64 rounds so much that no other order of its sums can come
    nearer: there a runtime has to be as near to float64 as PyTorch is, give or take its half again.

    Args:
        found: Of the runtime, ``[images, classes]``.
        expected: Of the network, the same shape.
        exact: Gives those of the network in float64, ``[at least images, classes]``; asked only where they matter.
        kind: Name of the format, for messages.
        runtime: What ran, for messages.
        tolerance: Largest difference allowed, as a share of the largest logit, > 0.

    Returns:
        Largest absolute difference and largest absolute logit.

    Raises:
        UnsupportedModelError: If the shapes differ.
        NumericsError: If the logits are too far apart, or not finite.
    """
    if found.shape != expected.shape:
        raise UnsupportedModelError(
            f"export.{kind}: expected logits of shape {list(expected.shape)} from {runtime}, "
            f"got {list(found.shape)}; leave {kind} out of export=[…]."
        )
    found, expected = found.double(), expected.double()
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    # Not `difference > …`: a NaN on either side must not pass.
    if not difference <= tolerance * largest and not _rounds_as_much(found, expected, exact, tolerance * largest):
        raise NumericsError(
            f"export.{kind}: expected logits within {tolerance:g} of the largest ({largest:.6g}), "
            f"got a difference of {difference:.6g} from {runtime} on {len(expected)} images; "
            f"raise export.{kind}.tolerance if that is good enough, or leave {kind} out of export=[…]."
        )
    return difference, largest
