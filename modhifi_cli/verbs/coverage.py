"""`modhifi coverage`: every network of a library pruned with random weights, one file each, and the table of them."""

import fnmatch
import os
import re
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modhifi_cli.console import Console
from modhifi_cli.errors import ConfigError, ModHiFiError, NotRunnableError
from modhifi_cli.files import artifacts, kept
from modhifi_cli.pages import coverage as coverage_pages
from modhifi_cli.records import Progress
from modhifi_cli.settings import config
from modhifi_cli.verbs import pieces

_VERSION = 3  # to be raised when networks are examined in another way: older results are then made anew
_OF_A_NETWORK = ("counts",)
_SMALL = (64, 96, 128, 160, 224, 256, 300, 320)  # sizes that are tried where a network does not ask for its own


def coverage(settings: Mapping[str, Any], facts: Mapping[str, Any], console: Console, folder: Path | None) -> Path:
    from modhifi_cli.models import catalogue

    library = settings["library"]
    chosen = catalogue.matching(library, _listed(settings["pattern"]))
    place = folder or Path(settings["output_dir"]) / "coverage" / library
    artifacts.make_folder(place / "networks")
    if settings["one_per_file"]:
        chosen = _one_per_file(place, library, chosen, console)
    command = pieces.command_line("coverage", config.spelled("coverage", facts["overrides"], for_people=True))
    environment = artifacts.environment(command, "cpu")
    asked = {
        "version": _VERSION, "library": library, "share": settings["share"], "onnx": settings["onnx"],
        "packages": {name: environment["packages"].get(name) for name in ("modhifi", "torch", library)},
    }  # fmt: skip
    again = _listed(settings["again"])
    results: dict[str, dict[str, Any]] = {}
    waiting = []
    for name in chosen:
        anew = any(fnmatch.fnmatchcase(name, each) for each in again)
        known = None if anew else kept.read_cell(_file(place, name), _OF_A_NETWORK, asked=asked)
        if known is None:
            waiting.append(name)
        else:
            results[name] = known
    jobs = _jobs(settings, len(waiting))
    console.note(
        f"{len(chosen)} networks of {library}, {len(results)} of them finished before; {jobs} at once; in {place}"
    )
    began = time.monotonic()
    try:
        for name, result in _examined(waiting, place, settings, asked, chosen, jobs):
            results[name] = result
            console.progress(Progress("networks", name, len(results), len(chosen)))
            if not result["counts"]:
                console.note(f"{name}: {result['why']}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"{len(results)} of {len(chosen)} networks are finished and kept; the same command goes on with the others"
        ) from None
    rows = [results[name] for name in chosen]
    content = {
        "format_version": artifacts.FORMAT_VERSION,
        "verb": "coverage",
        "library": library,
        "date": time.strftime("%Y-%m-%d"),
        "settings": {key: settings[key] for key in ("library", "pattern", "one_per_file", "share", "onnx")},
        "examined": len(waiting),  # the others were finished before
        "jobs": jobs,
        "seconds": round(time.monotonic() - began, 1),
        "networks": rows,
    }
    artifacts.write_json(place / "environment.json", environment)
    artifacts.write_json(place / "results.json", content)
    pieces.write_page(place, "coverage", coverage_pages.page(content, environment))
    counted = sum(row["counts"] for row in rows)
    asked_for = len(rows) - sum(row.get("apart", False) for row in rows)
    console.table(f"{library}: {counted} of {asked_for} networks count", [_shown(row) for row in rows])
    console.note(f"the table with every reason is {place / 'coverage.html'}")
    console.result({"folder": str(place), "networks": len(rows), "count": counted})
    return place


def _listed(value: str | Sequence[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "network": row["name"],
        "counts": row["counts"],
        "groups": row.get("groups"),
        "carried %": None if row.get("carried") is None else round(100 * row["carried"], 1),
        "removed %": None if row.get("removed") is None else round(100 * row["removed"], 1),
        "why not": row["why"] or "",
    }


def _one_per_file(place: Path, library: str, chosen: Mapping[str, str], console: Console) -> dict[str, str]:
    """One network for each module file among those chosen, found once for a version of the library."""
    from modhifi_cli.models import catalogue

    if library != "timm":
        raise ConfigError("one_per_file chooses among the module files of timm; leave it out with another library.")
    import timm

    file = place / "smallest.json"
    smallest: dict[str, str] = {}
    if file.is_file():
        known = artifacts.read_object(file, "the smallest network of each file")
        smallest = known["smallest"] if known.get("timm") == timm.__version__ else {}
    missing = {name: where for name, where in catalogue.kinds(library).items() if where not in smallest}
    if missing:
        for step in catalogue.smallest_of_each_file(missing, smallest):
            console.progress(step)
        artifacts.write_json(file, {"timm": timm.__version__, "smallest": smallest})
    return {name: chosen[name] for name in sorted(smallest.values()) if name in chosen}


def _jobs(settings: Mapping[str, Any], waiting: int) -> int:
    if settings["jobs"] != "auto":
        return settings["jobs"]
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        free = 4 << 30
    # Few networks are large, so memory may be promised twice.
    return max(1, min(os.cpu_count() or 1, int(2 * free / (settings["memory"] * 1e9)), max(waiting, 1)))


def _file(place: Path, name: str) -> Path:
    return place / "networks" / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', name)}.json"


def _examined(
    names: Sequence[str],
    place: Path,
    settings: Mapping[str, Any],
    asked: Mapping[str, Any],
    kinds: Mapping[str, str],
    jobs: int,
) -> Any:
    """Results as they come, ``(name, result)``, each network in a process of its own."""
    import multiprocessing

    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":  # the libraries are imported once; every network starts from there
        context.set_forkserver_preload(["modhifi_cli.verbs.coverage", "torch", settings["library"], "torchvision"])
    waiting = list(names)
    running: dict[str, tuple[Any, float]] = {}  # process, and when it began
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                job = {
                    "name": name, "kind": kinds[name], "file": str(_file(place, name)), "asked": dict(asked),
                    "memory": settings["memory"],
                }  # fmt: skip
                process = context.Process(target=examine_process, args=(job,), daemon=True)
                process.start()
                running[name] = (process, time.monotonic())
            time.sleep(0.05)
            for name, (process, began) in list(running.items()):
                late = time.monotonic() - began > settings["timeout"]
                if process.is_alive() and not late:
                    continue
                if process.is_alive():
                    process.kill()
                process.join()
                del running[name]
                found = None if late else kept.read_cell(_file(place, name), _OF_A_NETWORK, asked=asked)
                if found is None:
                    why = f"it took longer than {settings['timeout']} s" if late else _died(process, settings["memory"])
                    found = _failed(name, kinds[name], asked, why) | {"seconds": round(time.monotonic() - began, 1)}
                    artifacts.write_json(_file(place, name), found)
                yield name, found
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def _died(process: Any, memory: float) -> str:
    code = process.exitcode
    if code is not None and code < 0 and -code in (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV):
        return f"its process ended with signal {-code}, perhaps for want of memory (limit {memory:g} GB)"
    return f"its process ended with code {code}"


def _failed(name: str, kind: str, asked: Mapping[str, Any], why: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "counts": False, "why": why, "refused": [], "asked": dict(asked)}


def examine_process(job: Mapping[str, Any]) -> None:
    """Examine one network in a process of its own and write what was found into its file."""
    import torch

    # The first process alone hears Ctrl-C; it ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(job["memory"] * 1e9),) * 2)
    except (ImportError, ValueError, OSError):
        pass  # no such bound on this system
    examine_into_file(job)


def examine_into_file(job: Mapping[str, Any]) -> None:
    """Examine one network, whatever happens on the way, and write what was found into its file."""
    import contextlib
    import warnings

    began = time.monotonic()
    with warnings.catch_warnings(), contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        warnings.simplefilter("ignore")
        try:
            found = examine(job["name"], job["kind"], job["asked"])
        except ModHiFiError as error:
            words = re.sub(re.escape(tempfile.gettempdir()) + r"/\w+/", "", " ".join(str(error).split()))
            found = _failed(job["name"], job["kind"], job["asked"], words)
            found["apart"] = isinstance(error, NotRunnableError)
        except MemoryError:
            found = _failed(job["name"], job["kind"], job["asked"], f"it needs more than {job['memory']:g} GB")
        # Libraries raise whatever they like; one network's trouble must not end the table.
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            if "allocate memory" in words:
                words = f"it needs more than {job['memory']:g} GB"
            else:
                words = f"{type(error).__name__}: {words}"
            found = _failed(job["name"], job["kind"], job["asked"], words)
    found["seconds"] = round(time.monotonic() - began, 1)
    found["processor_seconds"] = round(time.process_time(), 1)
    artifacts.write_json(Path(job["file"]), found)


def examine(name: str, kind: str, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Prune one network with random weights, save it, read it back, and say what was found (JSON-able).

    Raises:
        ModHiFiError: If it cannot be made, run or pruned.
    """
    import torch

    from modhifi_cli.engine import coverage as task
    from modhifi_cli.graph.answers import flattened
    from modhifi_cli.models.weights import undrawn_weights
    from modhifi_cli.records import Edit, TextInput

    loaded = _load(asked["library"], name)
    model = loaded.model
    if isinstance(loaded.preprocess, TextInput):
        return _examine_decoder(name, kind, asked, loaded)
    channels = len(loaded.preprocess.mean)
    own = loaded.preprocess.size
    # Those of transformers are made small themselves, and some remember the smallest image they saw.
    sizes = [own] if _fixed(model) or asked["library"] == "transformers" else [*((s, s) for s in _SMALL if s < max(own)), own]
    # One image where the size is given and large: that is most of the work.
    example = task.first_size(model, sizes, channels, images=2 if len(sizes) > 1 or max(own) < 128 else 1)
    cuts: list[task.Cut] = []
    edits = [step for step in task.cut_(model, example, share=asked["share"], cuts=cuts) if isinstance(step, Edit)]
    (cut,) = cuts
    found = _told(name, kind, asked, cut) | {"input": list(example.shape[1:]), "edits": len(edits)}
    with tempfile.TemporaryDirectory() as temporary:
        artifacts.save_model(Path(temporary), loaded, model)
        if asked["onnx"]:
            found["onnx"] = _onnx(loaded, example, Path(temporary))
        if kind == "detection":
            found["own_forward"] = _own_forward(model, example)
        del model
        loaded = None
        with undrawn_weights():
            again = artifacts.load_model(temporary)
        with torch.inference_mode():
            logits = flattened(again(example))
    return _judged(found, cut, logits)


def _examine_decoder(name: str, kind: str, asked: Mapping[str, Any], loaded: Any) -> dict[str, Any]:
    """The same of a causal decoder; of its layers, whose widths the vocabulary would drown."""
    import torch

    from modhifi_cli.engine import coverage as task

    cut = task.cut_decoder_(loaded.model, share=asked["share"])
    found = _told(name, kind, asked, cut) | {"input": [16], "edits": cut.groups}
    with tempfile.TemporaryDirectory() as temporary:
        artifacts.save_model(Path(temporary), loaded, loaded.model)
        again = artifacts.load_model(temporary)
        found["native"] = bool(artifacts.read_object(Path(temporary) / "architecture.json", "a saved model")["native"])
    tokens = torch.arange(16)[None] % loaded.preprocess.vocabulary
    with torch.inference_mode():
        logits = again(input_ids=tokens, use_cache=False).logits
    return _judged(found, cut, logits)


def _told(name: str, kind: str, asked: Mapping[str, Any], cut: Any) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "parameters": cut.parameters,
        "groups": cut.groups,
        "components": cut.components,
        "carried": cut.carried,
        "removed": cut.removed,
        "law_dtype": cut.law_dtype,
        "difference": cut.difference,
        "refused": [vars(refusal) for refusal in cut.refused],
        "asked": dict(asked),
    }


def _judged(found: dict[str, Any], cut: Any, logits: Any) -> dict[str, Any]:
    """The same with what reading it back gave, and whether it counts."""
    import torch

    from modhifi_cli.engine import coverage as task

    scale = float(cut.logits.abs().max().clamp(min=1e-30))
    found["reload"] = float((logits - cut.logits).abs().max()) / scale if logits.shape == cut.logits.shape else None
    found["finite"] = bool(torch.isfinite(cut.logits).all())
    found["why"] = _why_not(found, task)
    found["counts"] = found["why"] is None
    return found


def _why_not(found: Mapping[str, Any], task: Any) -> str | None:
    """Why a network does not count, or None."""
    if not found["finite"]:
        return "its answer is not finite"
    if not found["difference"] <= task.TOLERANCE:
        return f"sliced and zeroed logits differ by {found['difference']:.1e} of their scale"
    if found["reload"] is None or not found["reload"] <= task.TOLERANCE:
        return "the saved network does not answer as before"
    if found["carried"] < task.CARRIED:
        carried = f"{100 * found['carried']:.0f} % of the parameters"
        return f"its groups carry {carried}, less than {100 * task.CARRIED:.0f} %"
    if found["removed"] < task.REMOVED:
        return f"{100 * found['removed']:.0f} % of the parameters are gone, less than {100 * task.REMOVED:.0f} %"
    if not found.get("own_forward", True):
        return "the library's own forward fails after the cut"
    return None


def _load(library: str, name: str) -> Any:
    import importlib

    from modhifi_cli.models.weights import undrawn_weights

    with undrawn_weights():  # they are drawn anew before they count
        return importlib.import_module(f"modhifi_cli.models.{library}").load(name=name, weights="random")


def _fixed(model: Any) -> bool:
    """Whether a network takes images of its own size alone, as far as its library says."""
    return bool((getattr(model, "pretrained_cfg", None) or {}).get("fixed_input_size", False))


def _own_forward(model: Any, example: Any) -> bool:
    """Whether the detection network itself runs on a list of images after the cut."""
    import torch

    network = model.network
    network.transform.min_size, network.transform.max_size = (min(example.shape[-2:]),), max(example.shape[-2:])
    try:
        with torch.inference_mode():
            return len(network(list(example))) == len(example)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False


def _onnx(loaded: Any, example: Any, folder: Path) -> str:
    """``"ok"``, or why the narrow network was not exported."""
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return "onnxruntime is not installed"
    from modhifi_cli.files.exports.onnx import Onnx

    try:
        Onnx()(loaded, example=example[:1], path=folder / "model.onnx", facts={})
    except ModHiFiError as error:
        return " ".join(str(error).split())[:300]
    return "ok"
