"""The frozen records that travel between the rooms: Statistics → Edit → Measurement.

They hold tensors and plain values only, so that any of them can be saved, compared and passed to another process.
Feature order is component-major everywhere: feature = component × features_per_component + offset (method.md, 1).
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from modhifi_cli.errors import DataError


@dataclass(frozen=True)
class Statistics:
    """First and second moments of the input rows of one consumer layer, not centred.

    Exactly one of `second_moment` and `samples` is set. `samples` is the cheaper form where there are fewer rows than
    features (a linear layer behind a flatten): then S = samplesᵀ samples / rows.

    Attributes:
        rows: Number of rows (samples × positions) that were summed.
        mean: μ = E[x], ``[features]``, float64, input units.
        second_moment: S = E[x xᵀ], ``[features, features]``, float64, input units², or None.
        samples: The rows themselves, ``[rows, features]``, float32, or None.
    """

    rows: int
    mean: Tensor
    second_moment: Tensor | None = None
    samples: Tensor | None = None

    @property
    def features(self) -> int:
        """Number of features of a row."""
        return self.mean.numel()

    def to(self, device: torch.device) -> "Statistics":
        """The same on another device."""
        moment, samples = self.second_moment, self.samples
        return Statistics(
            self.rows,
            self.mean.to(device),
            None if moment is None else moment.to(device),
            None if samples is None else samples.to(device),
        )

    @property
    def summed(self) -> Tensor:
        """S, of statistics that hold it: ``[features, features]`` float64, input units².

        Raises:
            ValueError: If they hold the rows themselves (`numerics.moments.second_moment` takes either).
        """
        if self.second_moment is None:
            raise ValueError("these statistics hold their rows and not the sum of their products.")
        return self.second_moment


@dataclass(frozen=True)
class Consumer:
    """One consumer layer of a group, as the numerics see it: a weight and the moments of its input.

    Attributes:
        name: Module name, for messages.
        weight: W, ``[outputs, features]``, float64, features component-major.
        statistics: Moments of the input rows in the same feature order.
        components: Number of components of the layer's whole input. Every component has features / components features.
        in_group: How many of them belong to the group; they come first. The others (a concatenation's other branches)
            are always kept.
        centred: Whether the constant part of the output can be restored (a BatchNorm follows, or there is a bias), so
            that centred moments S − μμᵀ are the right ones.
        held_out: Moments of the rows among them on which a ridge is chosen, same feature order, or None.
    """

    name: str
    weight: Tensor
    statistics: Statistics
    components: int
    in_group: int
    centred: bool
    held_out: Statistics | None = None


@dataclass(frozen=True)
class ModuleEdit:
    """What one edit does to one module: slice, then replace tensors.

    Attributes:
        module: Module name in the network.
        kept_outputs: Kept output indices before the edit, ``[kept]`` int64 sorted, or None for all.
        kept_inputs: Kept input indices before the edit, ``[kept]`` int64 sorted, or None for all.
        tensors: Parameters and buffers that replace the sliced ones, by their name in the module.
        attributes: Structural attributes that change with the widths, such as head counts; ``config.NAME`` is one of
            the module's own copy of its configuration.
        turn: Of the features of an attention's product: what the kept ones are in terms of those before,
            ``[2 (queries, keys), heads, features before, features kept]`` float64: q' = q A and k' = k B; else None. The
            layer that writes them holds it already.
    """

    module: str
    kept_outputs: Tensor | None = None
    kept_inputs: Tensor | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    attributes: Mapping[str, int] = field(default_factory=dict)
    turn: Tensor | None = None


@dataclass(frozen=True)
class EditState:
    """What a run that goes on behind an edit must know besides the edited network.

    Attributes:
        step: What the edit is: ``"cut"`` of a part, ``"dense"`` for a layer solved again towards the dense network,
            ``"batchnorm"``, ``"classifier"``, or ``"healing"`` for what was trained.
        stale: BatchNorms whose running statistics no longer describe their input, in execution order.
    """

    step: str = "cut"
    stale: tuple[str, ...] = ()


@dataclass(frozen=True)
class Edit:
    """One saved step: the edit of one group of coupled components (or of statistics alone), replayable without data.

    Attributes:
        name: Group name, or ``"batchnorm"`` for a step that only re-estimates statistics.
        iteration: Round of the schedule, from 0.
        modules: What happens to each module.
        kept: Kept components of the group before this edit, ``[kept]`` int64 sorted (empty for statistics alone).
        removed: The others, ``[removed]`` int64 sorted.
        facts: JSON-able facts for the report (fidelity, dead outputs, seconds).
        state: What resuming needs.
    """

    name: str
    iteration: int
    modules: tuple[ModuleEdit, ...]
    kept: Tensor
    removed: Tensor
    facts: Mapping[str, Any] = field(default_factory=dict)
    state: EditState = EditState()


@dataclass(frozen=True)
class Measurement:
    """One number with everything needed to read it.

    Attributes:
        model: Which network was measured: ``"dense"``, ``"pruned"``, ``"edited"``.
        name: The field's term, units in the name where there is one (``top1``, ``latency_ms``).
        value: The number.
        unit: ``"%"``, ``"ms"``, ``"parameters"``, ``"MACs"``, ``"bytes"``, ``"nats"`` …
        protocol: JSON-able account of how it was measured (data, samples, batch size, device, iterations, spread).
    """

    model: str
    name: str
    value: float
    unit: str
    protocol: Mapping[str, Any] = field(default_factory=dict)


FORMAT_VERSION = 1  # of every JSON file that a run writes


@dataclass(frozen=True)
class Results:
    """What a run writes into results.json, as the pages read it; a verb fills what it has.

    Attributes:
        verb: That made it.
        model: Name of the network.
        weights: Where its weights came from.
        measurements: Of every network that was measured.
        warnings: Sentences that the reader must see.
        seconds: By part of the run.
        memory: Peaks in bytes: ``process``, ``card`` of ``card_total``.
        target, goal, sparsity: What was asked of a pruning run, by the price's name, in words and as a share; `sparsity`
            is None where the run found it.
        achieved: Shares removed, by target.
        latency: Shares of time saved: ``table``, ``predicted``, ``measured`` and how.
        healing: What training after the cut was tried, and what came of it.
        trials: What was tried before the run settled, one mapping a trial.
        groups: One mapping an edit, with its facts.
        predicted_error: Group → error that the curves predicted.
        widths: Module → attribute → dense and kept number.
        exports: One mapping a file.
        calibration: Protocol of the sample; likewise `evaluation`.
        calibration_quality: What was found of it; of text `calibration_samples`, its beginning.
        forget, classes: Forgotten classes, and the names of all.
        method, strength, finetuned_epochs, labels, layers, audit: Of an unlearning run.
        study, settings, seeds, findings, summary, notes, charts, rows, cells, missing_cells: Of a study.
        further: What another version wrote beside these.
    """

    verb: str
    model: str = "network"
    weights: str = ""
    measurements: tuple[Measurement, ...] = ()
    warnings: Sequence[str] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    target: str | None = None
    goal: str | None = None
    sparsity: float | None = None
    achieved: Mapping[str, float] = field(default_factory=dict)
    latency: Mapping[str, Any] | None = None
    healing: Mapping[str, Any] | None = None
    trials: Sequence[Mapping[str, Any]] = ()
    groups: Sequence[Mapping[str, Any]] = ()
    predicted_error: Mapping[str, float] = field(default_factory=dict)
    widths: Mapping[str, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    exports: Sequence[Mapping[str, Any]] = ()
    calibration: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    calibration_quality: Mapping[str, Any] = field(default_factory=dict)
    calibration_samples: Sequence[str] = ()
    forget: Sequence[int] = ()
    classes: Sequence[str] | None = None
    method: str | None = None
    strength: Mapping[str, float] = field(default_factory=dict)
    finetuned_epochs: int | None = None
    labels: str | None = None
    layers: Sequence[Mapping[str, Any]] = ()
    audit: Mapping[str, Any] | None = None
    study: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: Sequence[int] = ()
    findings: Sequence[Mapping[str, Any]] = ()
    summary: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    charts: Sequence[str] = ()
    rows: int = 0
    cells: int = 0
    missing_cells: int = 0
    further: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "Results":
        """From the content of results.json; what is null or absent is empty, unknown measurements are left out.

        Raises:
            DataError: If it does not say what was done, or a later version wrote it.
        """
        if not isinstance(content.get("verb"), str):
            raise DataError(
                "results.json does not say what was done (no 'verb'); the folder was written by another version of "
                "modhifi or is damaged, run again."
            )
        if content.get("format_version", FORMAT_VERSION) > FORMAT_VERSION:
            raise DataError(
                f"results.json was written in format {content['format_version']}, this version reads up to "
                f"{FORMAT_VERSION}; install a newer modhifi."
            )
        known = {key: value for key, value in content.items() if key in cls.__dataclass_fields__ and value is not None}
        further = {key: value for key, value in content.items() if key not in cls.__dataclass_fields__}
        found = []
        for entry in content.get("measurements") or ():
            if isinstance(entry, Mapping) and {"model", "name", "value", "unit"} <= entry.keys():
                own = {key: entry[key] for key in ("model", "name", "value", "unit")}
                found.append(Measurement(**own, protocol=entry.get("protocol") or {}))
        return cls(**{**known, "measurements": tuple(found), "further": further})

    @classmethod
    def written(cls, **fields: Any) -> dict[str, Any]:
        """The content of results.json: the fields that a verb has, measurements as mappings.

        Raises:
            TypeError: If a field is none that pages know: nobody would read it.
        """
        cls(**fields)
        measured = [asdict(one) for one in fields.get("measurements", ())]
        return {"format_version": FORMAT_VERSION, **fields, "measurements": measured}


@dataclass(frozen=True)
class Series:
    """One curve, or the bars of one kind, of a `Chart`.

    Attributes:
        name: What it is called at its end, or in the legend of bars.
        x: Horizontal values of a curve; empty for bars, whose places are the chart's categories.
        y: Values; NaN or None where there is none.
        spread: Half the height of the error bars, or empty; likewise `x_spread`, half their width.
        panel: The small multiple it is drawn in; "" where the chart has one panel.
        baseline: Drawn dashed: something that others are compared with.
    """

    name: str
    y: tuple[float | None, ...]
    x: tuple[float, ...] = ()
    spread: tuple[float, ...] = ()
    x_spread: tuple[float, ...] = ()
    panel: str = ""
    baseline: bool = False


@dataclass(frozen=True)
class Chart:
    """A figure as data: what is kept beside the picture, compared in tests and drawn again from a folder.

    Attributes:
        name: File stem.
        title: What is seen, in one line.
        x_label: Name and unit of the horizontal axis.
        y_label: Name and unit of the vertical axis; of the bars' length in a bar chart.
        series: Curves or bars.
        kind: ``"lines"`` or ``"bars"`` (lying).
        categories: Names of the bars' places, from the top.
        levels: Horizontal reference lines by name.
        x_log: Whether the horizontal axis is logarithmic.
        y_log: The same for the vertical one (of curves).
    """

    name: str
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: str = "lines"
    categories: tuple[str, ...] = ()
    levels: Mapping[str, float] = field(default_factory=dict)
    x_log: bool = False
    y_log: bool = False


@dataclass(frozen=True)
class Finding:
    """A claim of the paper beside what was found.

    Attributes:
        claim: The paper's sentence.
        found: Ours, with its numbers.
        holds: Whether it holds here; None where it cannot be said.
    """

    claim: str
    found: str
    holds: bool | None


@dataclass(frozen=True)
class Progress:
    """A step of a long task, for whoever shows it. `done` of `total` steps of `stage`; `item` is at work now."""

    stage: str
    item: str
    done: int
    total: int


_Kind = TypeVar("_Kind")


def last_of(events: Iterable[Any], kind: type[_Kind], listen: Callable[[Any], object]) -> _Kind:
    """Go through the events of a task to its end, and give back the last that is of a kind.

    Args:
        events: As the task yields them.
        kind: Of the task's outcome, which it yields once or more.
        listen: Called with each of the others as it comes: `Progress`.
    """
    found: _Kind | None = None
    for event in events:
        if isinstance(event, kind):
            found = event
        else:
            listen(event)
    assert found is not None, f"the task ended without a {kind.__name__}"
    return found


@dataclass(frozen=True)
class Note:
    """A sentence about a task for the user and the log, such as what memory it will need."""

    text: str


@dataclass(frozen=True)
class Preprocess:
    """How an 8-bit RGB image becomes the network's input: resize, centre crop, x/255, then (x − mean) / std.

    Attributes:
        size: Height and width of the input, pixels.
        mean: Per channel, on the 0..1 scale.
        std: Per channel, on the 0..1 scale.
        resize: Shorter side before the centre crop, pixels; None leaves images that already have `size` alone and
            resizes others straight to `size`.
        interpolation: ``"nearest"``, ``"bilinear"`` or ``"bicubic"``.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int | None = None
    interpolation: str = "bilinear"


@dataclass(frozen=True)
class TextInput:
    """How text becomes a language model's input.

    Attributes:
        tokenizer: The network's tokenizer (transformers), or None where it has none.
        vocabulary: Number of token ids.
        max_length: Longest sequence the network was made for, tokens.
        bos: Id of the token that begins a sequence, or None.
        window: Tokens of the inputs that stand for any input (verification, counting).
    """

    tokenizer: Any
    vocabulary: int
    max_length: int
    bos: int | None = None
    window: int = 32


@dataclass(frozen=True)
class LoadedModel:
    """A network with what its maker says about its input and how to build it again.

    Attributes:
        model: The network in evaluation mode, on the CPU; float32, or what a language model was loaded in.
        name: Short name for tables and folders, ``resnet56_cifar``.
        preprocess: Its own preprocessing; a `TextInput` says that it is a language model.
        architecture: JSON-able description from which `modhifi_cli.models.build_architecture` makes the dense network
            with untrained weights: ``{"builder": "modhifi_cli.models.X.build", "kwargs": {...}}``.
        weights: Where the weights came from, for the report.
        classes: Class names in the order of the logits, or None where nobody knows them.
        again: Makes the same network once more without a copy in memory, where its weights stay in their files.
        license: Of the weights, as their source states it, or None where it does not.
    """

    model: nn.Module
    name: str
    preprocess: Preprocess | TextInput
    architecture: Mapping[str, Any]
    weights: str
    classes: tuple[str, ...] | None = None
    again: Callable[[], nn.Module | None] | None = None
    license: str | None = None

    def twin(self) -> nn.Module:
        """The same network once more, before the first edit of this one."""
        found = None if self.again is None else self.again()
        return copy.deepcopy(self.model) if found is None else found


def without_folders(text: str) -> str:
    """A text in which absolute paths are their last parts: what is given to others names no folder of this machine."""
    return re.sub(r"(?<![\w.:/])~?/(?:[^\s/'\",;()\[\]{}]+/)+([^\s/'\",;()\[\]{}]+)", r"\1", text)


class ImageSource(Protocol):
    """Images that can be walked through any number of times, always in the same order.

    Attributes:
        protocol: JSON-able account (source, path, num_samples, seed, sha256 of the chosen samples, skipped files).
    """

    @property
    def protocol(self) -> Mapping[str, Any]:
        """What these samples are, for reports."""

    def __len__(self) -> int:
        """Number of images."""

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Preprocessed batches ``[batch, channels, height, width]`` float32 and labels ``[batch]`` int64 or None."""
