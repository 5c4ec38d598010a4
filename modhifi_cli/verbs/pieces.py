"""What several verbs need: sources, measuring, saving, devices, folder names and the settings of earlier runs."""

import contextlib
import copy
import dataclasses
import functools
import gc
import inspect
import json
import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from modhifi_cli.console import Console
from modhifi_cli.data.classes import Known
from modhifi_cli.data.making import Making
from modhifi_cli.errors import ConfigError, DataError, ModHiFiError, NumericsError, is_out_of_memory
from modhifi_cli.files import artifacts, cache, run_names
from modhifi_cli.files.exports.written import ExportReport, Intent
from modhifi_cli.models.called import Sent, parted
from modhifi_cli.models.module import exactly
from modhifi_cli.pages import figures, many, terms
from modhifi_cli.pages import page as pages
from modhifi_cli.pages import run as run_pages
from modhifi_cli.pages.card import card, loading_lines
from modhifi_cli.pages.page import Page
from modhifi_cli.records import (
    Chart,
    Edit,
    ImageSource,
    LoadedModel,
    Measurement,
    Preprocess,
    Results,
    TextInput,
    without_folders,
)
from modhifi_cli.settings import config, recipes
from modhifi_cli.verbs import cards

if TYPE_CHECKING:
    from modhifi_cli.verbs.shared import Shared

# Settings that may differ between a run and its continuation; the audit looks at the network and changes nothing.
_NOT_COMPARED = ("resume", "console", "output_dir", "audit", "tracker")
_OF_MEMORY = (
    ("runtime", "batch_size"), ("runtime", "threads"), ("statistics", "carry_gigabytes"),
    ("statistics", "offload"), ("decoder", "offload"),
)  # fmt: skip
_VERIFICATION_IMAGES = 4
# Measurements that look at a network's answers and nothing else.
_OF_LOGITS = ("top1", "forget_retain", "forgotten_rank", "agreement")
# Sources that language models take.
_READ_TEXT = tuple(f"modhifi_cli.data.{name}." for name in ("text", "generated", "synthetic", "mixed"))


def sources(
    settings: Mapping[str, Any], console: Console | None = None
) -> tuple[LoadedModel, ImageSource, ImageSource | None]:
    """The network, its calibration data (made now if the settings say so) and its evaluation data, or None."""
    require_data(settings)
    labelled = wants_labels(settings)
    loaded = config.build(settings["model"])
    calibration = image_source(settings, "data", loaded, labelled=labelled, console=console)
    assert calibration is not None
    return loaded, calibration, image_source(settings, "evaluation_data", loaded, labelled=True, console=console)


def require_data(settings: Mapping[str, Any]) -> None:
    """Refuse a run without calibration data before the network is loaded."""
    if settings.get("data") is None:
        name = settings["model"].get("name", "this model")
        raise ConfigError(f"{name} is left without calibration data; leave data out, or choose a source.")


def image_source(
    settings: Mapping[str, Any],
    key: str,
    loaded: LoadedModel,
    *,
    labelled: bool,
    console: Console | None = None,
) -> ImageSource | None:
    """The source that a setting names, or None.

    Args:
        settings: Of the run.
        key: ``"data"`` or ``"evaluation_data"``.
        loaded: The dense network: its preprocessing, and what sources are made from that make their samples up.
        labelled: Whether labels are asked for.
        console: Who hears of what is made; None for nobody.
    """
    node = settings.get(key)
    if node is None:
        return None
    reads_text = isinstance(loaded.preprocess, TextInput)
    if reads_text and not str(node["_target_"]).startswith(_READ_TEXT):
        raise ConfigError(f"{key}: a language model reads text; give {key}=text {key}.path=FILE.")
    if "sources" in node:
        node = {**node, "sources": [{**one, "source": config.build(one["source"])} for one in node["sources"]]}
    build = config.build(node)
    given: dict[str, Any] = {}
    if "making" in inspect.signature(build).parameters:
        said = console or Console()
        given["making"] = Making(
            loaded.model, loaded.name, device_of(settings), said.progress, said.note, cache.open_store
        )
    if "known" in inspect.signature(build).parameters:
        given["known"] = Known(loaded.classes, lambda: _logits_of(loaded))
    if isinstance(loaded.model, Sent):
        loaded.model.refuse(dtype_of(settings))
    if "found" in inspect.signature(build).parameters and not reads_text:
        own = isinstance(loaded.model, Sent)
        given |= {"found": exactly, "packed": loaded.model.packed if own else functools.partial(parted, key=None)}
    source = build(preprocess=loaded.preprocess, labelled=labelled, **given)
    if console is not None and "labels" in source.protocol:
        console.note(f"{key}: {source.protocol['labels']}")
    if console is not None and source.protocol.get("turned"):
        console.note(f"{key}: {source.protocol['turned']} images are turned as their cameras noted (EXIF)")
    if not reads_text:
        _check_labels(source, key, loaded)
    return source if reads_text or settings["runtime"]["dtype"] == "float32" else _Cast(source, dtype_of(settings))


def _check_labels(source: ImageSource, key: str, loaded: LoadedModel) -> None:
    """Refuse labels that the network has no logit for now, and not when the work is done."""
    labels = getattr(source, "labels", None)
    if labels is None or not len(labels):
        return
    lowest, highest, count = int(min(labels)), int(max(labels)), _logits_of(loaded)
    if count is not None and not 0 <= lowest <= highest < count:
        raise DataError(
            f"{key}: expected labels 0 to {count - 1} for the {count} logits of '{loaded.name}', got "
            f"{lowest if lowest < 0 else highest}; use data labelled for this network, or a network with as many classes."
        )


def _logits_of(loaded: LoadedModel) -> int | None:
    """How many logits a network gives for an image, or None where it gives something else."""
    tensor = next(loaded.model.parameters(), None)
    example = example_inputs(loaded.preprocess, 2)
    if tensor is not None:
        example = example.to(device=tensor.device, dtype=tensor.dtype)
    with torch.inference_mode():
        answer = loaded.model(example)
    return answer.shape[1] if isinstance(answer, Tensor) and answer.ndim == 2 else None


def wants_labels(settings: Mapping[str, Any]) -> bool:
    """Whether the method of a run looks at the classes of its calibration images; only then are labels opened.

    Raises:
        ConfigError: If it does and the network reads text, which has no classes.
    """
    node = None if settings.get("outside") else settings.get("scoring")
    if node is None or not config.build(node).needs_labels:
        return False
    if is_decoder(settings):
        raise ConfigError(
            "this scoring tells the classes of images apart, and a language model reads text; choose another scoring, "
            "such as scoring=singleton."
        )
    return True


class _Cast:
    """An image source whose batches have the dtype that the run computes in."""

    def __init__(self, source: ImageSource, dtype: torch.dtype) -> None:
        self._source, self._dtype, self.protocol = source, dtype, source.protocol
        self.classes = getattr(source, "classes", None)

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        for images, labels in self._source.batches(batch_size):
            yield images.to(self._dtype), labels


@dataclasses.dataclass(frozen=True)
class MeasuredOn:
    """What networks are measured on.

    Attributes:
        calibration: The samples that an edit has seen, or None.
        evaluation: Those that it has not, or None.
        preprocess: What the networks take.
    """

    calibration: ImageSource | None
    evaluation: ImageSource | None
    preprocess: Preprocess | TextInput


def measure(
    settings: Mapping[str, Any],
    models: Mapping[str, nn.Module],
    on: MeasuredOn,
    device: torch.device,
    console: Console,
    shared: "Shared | None" = None,
    answers: Mapping[str, nn.Module] | None = None,
) -> tuple[Measurement, ...]:
    """Everything that the settings ask for; within a comparison the dense network is measured once for all cells.

    `answers` are the networks again, but with a memory of images they have seen: for what looks at logits alone.
    Where the memory is full it is tried again with half as many inputs a forward, which changes no number.
    """
    remembered = {name: (answers or {}).get(name, model) for name, model in models.items()}
    found: list[Measurement] = [] if shared is None else list(shared.dense(console))
    for name, node in settings["evaluation"].items():
        found += _with_room(
            name,
            config.build(node),
            console,
            settings["runtime"]["batch_size"],
            models=shared.models(name, models) if shared else remembered if name in _OF_LOGITS else models,
            evaluation_data=on.evaluation,
            calibration_data=on.calibration,
            example=_example_of(settings, on.preprocess, device),
            device=device,
            progress=console.progress,
        )
    return tuple(found)


def _with_room(
    name: str, measurement: Any, console: Console, batch_size: int, *, device: torch.device, **given: Any
) -> tuple[Measurement, ...]:
    """A measurement with as many inputs a forward as the memory takes: half as many after each time it was full."""
    while True:
        try:
            return measurement(batch_size=batch_size, device=device, **given)
        except RuntimeError as error:
            if not is_out_of_memory(error) or batch_size == 1:
                raise
        # Out of the handler, so that the frames of the failed forward hold no tensors any more.
        batch_size //= 2
        _forget_what_failed()
        console.note(f"{name}: the memory of {device} was full, so it goes on with {batch_size} inputs a forward")


def _forget_what_failed() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def memory_full(settings: Mapping[str, Any], error: BaseException) -> ConfigError:
    """What a user is told when a card or the host had no memory left."""
    device, batch = settings["runtime"]["device"], settings["runtime"]["batch_size"]
    where = f"the memory of {device}" if is_card_full(error) else "the memory of this machine"
    helps = [f"runtime.batch_size={max(1, batch // 2)} (now {batch})"]
    if settings.get("statistics"):
        helps.append("statistics.carry_gigabytes=0")
    if settings.get("decoder") and is_decoder(settings):
        helps[-1] = "decoder.offload=true"
    first = str(error).strip().splitlines()[0][:160]
    return ConfigError(f"{where} is full; {' or '.join(helps)} needs less of it ({first}).")


def is_card_full(error: BaseException) -> bool:
    """Whether it was a card that had no memory left."""
    return is_out_of_memory(error) and "DefaultCPUAllocator" not in str(error)


def name_forgotten_(settings: dict[str, Any], forget: Sequence[int] | None) -> None:
    """Tell the measurements that ask for forgotten classes those of a run, where they were not told any."""
    if forget:
        settings["evaluation"] = {
            name: {**asked, "forget_class": list(forget)} if asked.get("forget_class", ()) is None else asked
            for name, asked in settings["evaluation"].items()
        }


def show_measurements(console: Console, measurements: Sequence[Measurement]) -> None:
    names = list(dict.fromkeys(measurement.model for measurement in measurements))
    after = next((name for name in names if name != "dense"), "edited")
    rows = [
        {"": row.label, "dense": row.before, after: row.after, "change": row.change}
        for row in terms.table(measurements)
    ]
    if rows and len(names) == 1:
        rows = [{"": row[""], names[0]: row["dense"] or row[after]} for row in rows]
    if rows:
        console.table("before and after" if len(names) > 1 else "measured", rows)


def show_end(console: Console, final: Path, warnings: int) -> None:
    """The end of a run that made a network: whether to trust it, where it is, how to use it, what comes next."""
    told = {0: "no warning was raised", 1: "one warning was raised"}.get(warnings, f"{warnings} warnings were raised")
    console.note(f"{told}; the page is report.html, the network model/, both in")
    console.note(f"  {final}")
    short = run_names.short_names(run_names.runs(Path("outputs"))).get(final)  # where verbs look for runs
    name = short or str(final)
    console.note(f"proof that it answers as it did:  modhifi verify run={name}")
    show_loading(console, final)
    console.note(f"next, on other data or with other measurements:  modhifi evaluate run={name}")
    if short:
        console.note("all runs by their names:  modhifi runs")


def save_network(place: artifacts.RunDirectory, loaded: LoadedModel, model: nn.Module) -> None:
    """Write the network, and a few inputs with its logits on the CPU for `verify`."""
    artifacts.save_model(place.path / "model", loaded, model)
    # Code that makes the network was named by the command that runs, or by the user's word about the folder it is from.
    saved = artifacts.load_model(place.path / "model", allow=True)
    inputs = example_inputs(loaded.preprocess, _VERIFICATION_IMAGES)
    on_cpu = all(tensor.device.type == "cpu" for tensor in model.parameters())
    answers = artifacts.answers_of((model if on_cpu else copy.deepcopy(model).cpu()).eval(), inputs)
    again = artifacts.answers_of(saved, inputs)
    if not torch.equal(answers["logits"], again["logits"]):
        difference = float((answers["logits"] - again["logits"]).abs().max())
        raise NumericsError(f"{place.path}: the saved network reloads to other logits (difference {difference:.3g}).")
    artifacts.save_verification(place.path / "verification.safetensors", inputs, answers)


def foresee_exports(settings: Mapping[str, Any], loaded: LoadedModel | None = None) -> None:
    """Refuse exports that cannot be: of the other kind of network at the start, the rest once the network is there.

    Args:
        settings: Of the run.
        loaded: The dense network, or None before it is loaded.

    Raises:
        ConfigError: If a format is for networks that read something else, or a setting of it is wrong.
        UnsupportedModelError: If a format cannot hold the network.
    """
    refuse_exports(settings["export"], "tokens" if is_decoder(settings) else "images")
    if loaded is not None:
        from modhifi_cli.engine.rounding import neuron_step

        neurons = getattr(getattr(loaded.model, "config", None), "intermediate_size", None)
        step = neuron_step(neurons, settings["round_to"]) if neurons else 1
        intent = Intent(even=recipes.even_widths(settings), round_to=step)
        for node in settings["export"].values():
            config.build(node).foresee(loaded, intent)


def refuse_exports(exports: Mapping[str, Any], reads: str) -> None:
    """Refuse formats that are for networks that read something else than ``"images"`` or ``"tokens"``."""
    for name, node in exports.items():
        if config.build(node).reads != reads:
            other = "gguf or leave export empty" if reads == "tokens" else "onnx, torch_export, plain or timm"
            what = (
                "writes one graph for inputs of one shape, and a language model generates with a cache that grows"
                if reads == "tokens"
                else "is for language models, and this network reads images"
            )
            raise ConfigError(f"export=[{name}] {what}; choose {other}.")


def told_overlap(
    settings: Mapping[str, Any],
    calibration: ImageSource,
    evaluation: ImageSource | None,
    console: Console,
    place: artifacts.RunDirectory,
) -> tuple[str, ...]:
    """Look whether calibration and evaluation text share passages, say what was found, and give it back if they do."""
    if not is_decoder(settings) or evaluation is None:
        return ()
    from modhifi_cli.data.text import overlap

    share = overlap(calibration, evaluation)
    if share == 0:
        console.note("calibration and evaluation text share no passage of 32 tokens that was looked at")
        return ()
    said = (
        f"{share:.1%} of the evaluation windows hold 32 tokens in a row that the calibration text holds, too: the "
        "perplexity flatters the pruned network"
    )
    place.log(f"warning: {said}")
    console.warning(said)
    return (said,)


def export(
    folder: Path, exports: Mapping[str, Any], loaded: LoadedModel, model: nn.Module, facts: Mapping[str, Any]
) -> list[ExportReport]:
    """Write a network in every format asked for.

    Args:
        folder: Where; made if absent.
        exports: Settings by name.
        loaded: The dense network's description.
        model: The network to write.
        facts: For the files' own metadata.
    """
    told = {key: str(value) for key, value in facts.items()}
    images = not isinstance(loaded.preprocess, TextInput)
    reports_made = []
    for node in exports.values():
        artifacts.make_folder(folder)
        # A language model is as large as memory allows and only read; a network for images is brought to the CPU.
        ours = copy.deepcopy(model).cpu().float().eval() if images else model
        given = dataclasses.replace(loaded, model=ours, weights=without_folders(loaded.weights))
        made = config.build(node)(given, example=example_inputs(loaded.preprocess, 1), path=folder, facts=told)
        reports_made.append(made)
    return reports_made


def write_figure(folder: Path, stem: str, kinds: Mapping[str, bytes]) -> str | None:
    """Write ``stem.png``, ``stem.svg``; the name of the one that a page shows, or None where there is no figure."""
    for kind, content in kinds.items():
        artifacts.write_bytes(folder / f"{stem}.{kind}", content)
    return f"{stem}.svg" if "svg" in kinds else None


def draw_all(folder: Path, charts: Sequence[Chart]) -> dict[str, dict[str, bytes]]:
    """Draw charts and write them into a folder; those that had a point, by name."""
    drawn = {}
    for chart in charts:
        kinds = figures.draw(chart)
        if write_figure(folder, chart.name, kinds):
            drawn[chart.name] = kinds
    return drawn


def write_page(folder: Path, stem: str, page: Page) -> None:
    """Write one page as ``stem.md`` and ``stem.html``."""
    artifacts.write_text(folder / f"{stem}.md", pages.markdown(page))
    artifacts.write_text(folder / f"{stem}.html", pages.to_html(page))


def write_many(
    folder: Path, stem: str, rows: Sequence[many.Row], *, dense: Mapping[str, float] | None = None, **about: Any
) -> list[str]:
    """Write the page of several runs with its figures, whose names are returned; arguments as of `many.page`."""
    for pattern in ("frontier_*.*", "tradeoff_*.*", "methods.*"):  # an older figure must not stand beside this table
        for path in folder.glob(pattern):
            path.unlink()
    charts = many.charts(rows, dense)
    drawn = draw_all(folder, charts)
    write_page(folder, stem, many.page(rows, charts, drawn, dense=dense, **about))
    return list(drawn)


def write_pages(folder: Path) -> None:
    """Make ``report.md``, ``report.html`` and the figures of a run or study from the other files of its folder.

    Raises:
        DataError: If a file that the page is made of is missing, damaged or of another version.
    """
    material = artifacts.report_material(folder)
    material["results"] = Results.read(material["results"])
    material["charts"] = [figures.chart_from_json(chart) for chart in material["charts"]]
    if "settings" in material:
        try:
            material["settings"] = config.from_yaml(material["settings"])
        except ConfigError as error:
            raise DataError(f"{folder / 'config.yaml'}: damaged, {error}; restore the run folder.") from error
    try:
        drawn = run_pages.figures(material)
        page = run_pages.page(material, drawn)
        texts = {"report.md": pages.markdown(page), "report.html": pages.to_html(page)}
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise DataError(
            f"{folder / 'results.json'}: damaged, no page can be made of it ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); restore the run folder."
        ) from error
    for stem, kinds in drawn.items():
        write_figure(folder, stem, kinds)
    for name, text in texts.items():
        artifacts.write_text(folder / name, text)
    artifacts.renew(folder, [*texts, *(f"{stem}.{kind}" for stem, kinds in drawn.items() for kind in kinds)])


def write_card(run: Path) -> None:
    """Put a page beside a saved network's weights that says what it is, how it loads and how good it is.

    Args:
        run: A folder with ``results.json`` and ``model/``.
    """
    results = artifacts.read_results(run)
    files = sorted(path.name for path in (run / "export").glob("*")) if (run / "export").is_dir() else []
    made = artifacts.read_object(run / "environment.json", "a saved run") if (run / "environment.json").is_file() else {}
    words = [word for word in shlex.split(str(made.get("command", ""))) if not word.startswith("resume=")]
    from modhifi_cli.verbs import healing

    healed = results.get("healing")
    trained = healing.told(healed)[-1] if healed and healed["trained"] else ""
    content = card(
        results, opening=opening_of(run), exports=files, repeat=shlex.join(words), trained=trained,
        license=artifacts.license_of(run),
    )  # fmt: skip
    artifacts.write_text(run / "model" / "README.md", content)
    artifacts.renew(run / "model", ["README.md"])


def opening_of(run: Path) -> dict[str, Any] | None:
    """What opens the network that a run saved, if it is a language model."""
    return artifacts.opening_of(run) if artifacts.reads_text(run) else None


def show_loading(console: Console, final: Path) -> None:
    """Tell the lines that open the network of a finished run."""
    opening = opening_of(final)
    folder = final if opening is None or opening["by"] == "modhifi" else final / "model"
    console.note("load it with:")
    for line in loading_lines(str(folder), opening):
        console.note(f"    {line}")


def sample_shown(
    folder: Path,
    settings: Mapping[str, Any],
    loaded: LoadedModel,
    dense: nn.Module | None,
    calibration: ImageSource,
    device: torch.device,
    seen: Mapping[str, float | int] | None = None,
) -> dict[str, Any]:
    """What the page shows of the calibration sample: a sheet of images, and what the dense network makes of them.

    Args:
        folder: ``calibration.png`` is written into it, for images.
        settings: Of the run.
        loaded: The network's description.
        dense: The dense network, or None where it is not at hand.
        calibration: The sample.
        device: Where to run.
        seen: What the network makes of the sample, where a forward over it has told already.

    Returns:
        Entries of results.json: ``calibration_quality`` for images, ``calibration_samples`` for text.
    """
    if isinstance(loaded.preprocess, TextInput):
        windows = next(iter(calibration.batches(3)))[0]
        if loaded.preprocess.tokenizer is None:
            return {}
        return {"calibration_samples": [loaded.preprocess.tokenizer.decode(ids.tolist()) for ids in windows[:3]]}
    from modhifi_cli.data.sheet import contact_sheet
    from modhifi_cli.evaluation.sample import sample_quality

    artifacts.write_bytes(folder / "calibration.png", contact_sheet(calibration, loaded.preprocess))
    if dense is None:
        return {}
    if seen is None:
        seen = sample_quality(dense, calibration, device=device, batch_size=settings["runtime"]["batch_size"])
    return {"calibration_quality": dict(seen)}


def example_inputs(preprocess: Preprocess | TextInput, batch: int) -> Tensor:
    """Random inputs, always the same.

    Images are ``[batch, channels, height, width]`` of the scale of normalised ones; a
    language model's are ids ``[batch, window]`` int64.
    """
    generator = torch.Generator().manual_seed(0)
    if isinstance(preprocess, TextInput):
        return torch.randint(0, preprocess.vocabulary, (batch, preprocess.window), generator=generator)
    return torch.randn((batch, len(preprocess.mean), *preprocess.size), generator=generator)


def _example_of(settings: Mapping[str, Any], preprocess: Preprocess | TextInput, device: torch.device) -> Tensor:
    example = example_inputs(preprocess, 1).to(device)
    return example.to(dtype_of(settings)) if example.is_floating_point() else example


def is_decoder(settings: Mapping[str, Any]) -> bool:
    """Whether the settings name a language model."""
    model = settings["model"]
    if model.get("run") is not None and "run" in model:
        return artifacts.reads_text(artifacts.run_folder(model["run"], needs=()))
    return str(model["_target_"]).startswith("modhifi_cli.models.hf.")


def placed(model: nn.Module, settings: Mapping[str, Any], device: torch.device) -> nn.Module:
    """The network where and in what precision the run wants it.

    A language model keeps its own precision and stays on the CPU: its layers visit the device one by one.
    """
    return model if is_decoder(settings) else model.to(device=device, dtype=dtype_of(settings))


def settings_of(folder: Path, *, unverified: bool = True) -> dict[str, Any]:
    """Settings that a run was made with, to compare with; whoever builds from them asks `opened.OpenedRun.settings`.

    Args:
        folder: Of the run, finished or not.
        unverified: Whether it may be without checksums.

    Raises:
        DataError: If its ``config.yaml`` is unreadable or says nothing of a model.
    """
    try:
        before = config.from_yaml(artifacts.text_of(folder, "config.yaml", unverified=unverified))
    except ConfigError as error:
        raise DataError(f"{folder / 'config.yaml'}: damaged, {error}; restore the run folder.") from error
    model = before.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("_target_"), str):
        raise DataError(f"{folder / 'config.yaml'}: damaged, it names no model; restore the run folder.")
    return before


def same_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    before = settings_of(folder)
    found = config.differences(_compared(portable(settings)), _compared(before))
    if found:
        raise ConfigError(
            f"resume={folder}: the run was begun with other settings: {'; '.join(found[:5])}"
            f"{f' and {len(found) - 5} more' if len(found) > 5 else ''}; give the same ones, or start a new run."
        )


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that change memory and speed alone, so that a run may go on with less of both."""
    kept = {key: value for key, value in settings.items() if key not in _NOT_COMPARED}
    for group, key in _OF_MEMORY:
        if isinstance(kept.get(group), Mapping):
            kept[group] = {name: value for name, value in kept[group].items() if name != key}
    return kept


def edits_so_far(place: artifacts.RunDirectory, dense_hash: str, calibration: ImageSource) -> tuple[Edit, ...]:
    """Edits to go on from, after checking that weights and images are still those they were made with."""
    edits, made_on = place.load_edits()
    if edits and made_on != dense_hash:
        raise DataError(
            f"resume={place.path}: the dense weights have changed since (sha256 {dense_hash[:12]}, was "
            f"{str(made_on)[:12]}); give the weights that the run began with, or start a new run."
        )
    before = artifacts.read_object(place.path / "calibration.json", "an interrupted run")
    now = json.loads(json.dumps(dict(calibration.protocol), default=str))
    if before.get("sha256") != now.get("sha256"):
        raise DataError(
            f"resume={place.path}: the calibration images have changed since the run began; "
            "give the same images, or start a new run."
        )
    return edits


class _NeedsRoom(Exception):
    """The memory was full, and a run can go on with fewer inputs a forward; its folder, or None where none was kept."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.folder = folder


Outcome = TypeVar("Outcome")


def with_room(run: Callable[[Mapping[str, Any]], Outcome], settings: Mapping[str, Any], console: Console) -> Outcome:
    """A run with as many inputs a forward as the memory takes: a quarter as many after each time it was full.

    Args:
        run: Settings → its outcome; inside it `kept_for_resume` keeps what was done, which the next try goes on with.
        settings: Of the run.
        console: Told that it goes on.
    """
    while True:
        try:
            return run(settings)
        except _NeedsRoom as full:
            folder = full.folder
        _forget_what_failed()
        fewer = max(1, settings["runtime"]["batch_size"] // 4)
        where = settings["runtime"]["device"]
        console.note(f"the memory of {where} was full, so the run goes on with {fewer} inputs a forward")
        settings = {**settings, "runtime": {**settings["runtime"], "batch_size": fewer}}
        if folder is not None:
            settings["resume"] = str(folder)


@contextlib.contextmanager
def kept_for_resume(
    verb: str,
    place: artifacts.RunDirectory,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    console: Console | None = None,
) -> Iterator[None]:
    """Whatever ends a run early leaves a folder to go on from, or none at all where nothing was done yet.

    Args:
        verb: Of the run.
        place: Its folder.
        facts: Its command.
        settings: Of the run; with ``resume`` it goes on with an earlier one, whose folder stays in any case.
        console: Told after an error how to go on, where edits were made; None for silence.
    """
    resumed = bool(settings["resume"])
    try:
        yield
    except KeyboardInterrupt:
        if not resumed:
            place.discard_if_empty()
        kept = place.path.is_dir()
        raise KeyboardInterrupt(
            how_to_resume(verb, place, facts) if kept else "Nothing was made yet: the same command starts again."
        ) from None
    except (ModHiFiError, RuntimeError) as error:
        if not isinstance(error, ModHiFiError) and not is_out_of_memory(error) and not cards.ended_elsewhere(error):
            raise
        with contextlib.suppress(DataError):  # a full disk may be the very cause
            place.log(f"failed: {error}")
        if not resumed:
            place.discard_if_empty()
        # Several processes would have to agree on it.
        if is_out_of_memory(error) and settings["runtime"]["batch_size"] > 1 and "WORLD_SIZE" not in os.environ:
            raise _NeedsRoom(place.path if place.path.is_dir() else None) from None
        if console is not None and place.path.is_dir():
            again = how_to_resume(verb, place, facts)
            console.note(f"the edits made so far lie in {place.path}; once the cause is mended: {again}")
        raise


def how_to_resume(verb: str, place: artifacts.RunDirectory, facts: Mapping[str, Any]) -> str:
    """What an interrupted user types to go on."""
    if facts.get("sweep"):
        return "Type the same command again: finished jobs are skipped and this one goes on."
    words = [word for word in facts["overrides"] if not word.startswith("resume=")]
    return f"Go on with: {command_line(verb, [*words, f'resume={place.path}'])}"


def portable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are kept and compared: the card that a sweep's job happened to get is no setting."""
    kept = copy.deepcopy(dict(settings))
    kept["runtime"]["device"] = kept["runtime"]["device"].partition(":")[0]
    kept.pop("resume", None)
    return kept


def device_of(settings: Mapping[str, Any]) -> torch.device:
    runtime = settings["runtime"]
    if runtime["threads"] is not None:
        torch.set_num_threads(runtime["threads"])
    device = torch.device(runtime["device"])
    if device.type == "cuda" and device.index is None and "LOCAL_RANK" in os.environ:  # a card for every process
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torch.cuda.is_available() and device.index < torch.cuda.device_count():
            torch.cuda.set_device(device)  # what torch and NCCL place by themselves goes there, too
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"runtime.device={runtime['device']}: torch finds no graphics card here; use runtime=cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"runtime.device={runtime['device']}: there are {torch.cuda.device_count()} graphics cards, from cuda:0."
        )
    return device


def team_of(settings: Mapping[str, Any]) -> tuple[int, int]:
    """Number of this process and how many `torchrun` started; they find each other here.

    Raises:
        ConfigError: If several were started for what one process decides by a clock, by trying, or outside our method.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size > 1:
        price = config.build(settings["target"])
        alone = "outside" if settings.get("outside") else f"target={price.name}" if price.timed or price.searched else None
        if alone is not None:
            raise ConfigError(f"{size} processes were started, and a run with {alone} is one process's; leave torchrun out.")
    if size > 1 and not torch.distributed.is_initialized():
        on_card = settings["runtime"]["device"].startswith("cuda")
        torch.distributed.init_process_group("nccl" if on_card else "gloo")
    return rank, size


def shared_by_all(value: Any) -> Any:
    """What the first of several processes has decided, in each of them; the value itself where there is one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def dtype_of(settings: Mapping[str, Any]) -> torch.dtype:
    return getattr(torch, settings["runtime"]["dtype"])


def set_precision(settings: Mapping[str, Any]) -> None:
    """Say whether float32 products and convolutions of forwards may be rounded to TF32 on a card.

    Torch rounds those of convolutions unless told otherwise. Sums of the method are exact either way
    (`modhifi_cli.numerics.linalg.exact_products`).
    """
    high = settings["runtime"]["matmul"] == "high"
    torch.backends.cuda.matmul.allow_tf32 = high
    torch.backends.cudnn.allow_tf32 = high


def begin_run(
    verb: str,
    network: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    folder: Path | None,
    device: torch.device,
    calibration: ImageSource | None = None,
) -> artifacts.RunDirectory:
    """The folder of a new run with all that going on with it needs; its settings last, for they say that it is whole.

    Args:
        verb: Of the run.
        network: The network's name.
        settings: As the user gave them; they are kept as they are compared later (`portable`).
        facts: `config.job_facts()`.
        folder: Where; None: under ``output_dir``, by the time and the command.
        device: Where it runs.
        calibration: What its edits are computed from; None for a run that nobody goes on with.
    """
    place = artifacts.RunDirectory.create(folder or new_folder(verb, network, settings, facts))
    command = command_line(verb, facts["overrides"])
    artifacts.write_json(place.path / "environment.json", artifacts.environment(command, str(device)))
    if calibration is not None:
        artifacts.write_json(place.path / "calibration.json", calibration.protocol)
    artifacts.write_text(place.path / "config.yaml", config.to_yaml(portable(settings)))
    return place


def new_folder(verb: str, model: str, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> Path:
    now = time.time()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now)) + f"-{int(now % 1 * 1e6):06d}"
    ignored = ("model=", "console", "output_dir=", "resume=", "run=", "hydra", "evaluation", "export", "runtime")
    # The time already makes the name unique: paths and what does not change the network would only make it long.
    name = config.slug(word for word in facts["overrides"] if not word.startswith(ignored) and "/" not in word)
    return Path(settings["output_dir"]) / verb / config.slug([model]) / f"{stamp}_{name}"


def command_line(verb: str, overrides: Sequence[str]) -> str:
    return shlex.join(["modhifi", verb, *overrides])


class Steps:
    """The parts of a run: where it stands, for whoever watches, and how long each took.

    Args:
        console: Told of every part.
        words: Part → what it is called, in order; of others nothing is said.

    Attributes:
        seconds: By part.
    """

    def __init__(self, console: Console, words: Mapping[str, str]) -> None:
        self._console, self._words = console, dict(words)
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Around one part."""
        if part in self._words:
            self._console.part(self._words[part], list(self._words).index(part) + 1, len(self._words))
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = round(time.perf_counter() - started, 3)
