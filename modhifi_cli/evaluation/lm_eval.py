"""Zero-shot tasks of lm-eval on the networks in memory, under lm-eval's own names and versions; also from local files.

Where there is no hub, a folder of JSONL files stands in for tasks' data: NAME.jsonl with ``query, choices, gold``, with
``context_options, continuation, gold``, with ``context, continuation``, or HellaSwag's own fields. Such a task is named
``NAME_local``, since its wording and its documents are not lm-eval's own.
"""

import contextlib
import functools
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from modhifi_cli.errors import (
    ConfigError,
    DataError,
    UnsupportedModelError,
    first_line,
    is_out_of_memory,
    nearest,
    package_missing,
)
from modhifi_cli.evaluation.forward import ready_to_measure
from modhifi_cli.records import ImageSource, Measurement, Progress

# ModHiFi, arXiv:2511.19566, reports the average of these.
PAPER_TASKS = ("arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag")
_ACCURACIES = ({"metric": "acc"}, {"metric": "acc_norm"})


def measure(
    *,
    tasks: Sequence[str] = PAPER_TASKS,
    limit: int | None = None,
    num_fewshot: int | None = None,
    local_data: str | None = None,
    include_path: str | None = None,
    models: Mapping[str, nn.Module],
    evaluation_data: ImageSource | None,
    calibration_data: ImageSource | None,
    example: Tensor,
    device: torch.device,
    batch_size: int,
    progress: Callable[[Progress], None],
) -> tuple[Measurement, ...]:
    """Every metric of every task, for every network.

    One parameter for each key of the YAML, and for what every one of the kind is given.

    Args:
        tasks: lm-eval's names.
        limit: The first so many documents of each task; None takes all.
        num_fewshot: Examples before each question; None is the task's own.
        local_data: Folder of JSONL files: a task whose NAME.jsonl lies there is read from it.
        include_path: Folder with task YAMLs of the user's own.
        models, evaluation_data, calibration_data, example, device, batch_size, progress: As in
            `modhifi_cli.evaluation.Measure`; of the data only the tokenizer is used.

    Returns:
        ``lm_eval/TASK/METRIC`` per network (accuracies in %), its standard error in the protocol, and, where all five
        tasks of the paper are among them, ``lm_eval/average``: the mean of their acc_norm, of acc where there is none.
        Empty for networks that read images.

    Raises:
        ConfigError: If lm-eval knows no such task.
        DataError: If a task's data cannot be had, or a local file is damaged.
        UnsupportedModelError: If there is no tokenizer.
    """
    if example.is_floating_point() or not models:
        return ()
    text = getattr(evaluation_data or calibration_data, "text", None)
    if text is None or text.tokenizer is None:
        raise UnsupportedModelError(
            "lm_eval needs the network's tokenizer, which comes with data=text or evaluation_data=text; give one."
        )
    try:
        import lm_eval
    except ImportError as error:
        raise package_missing("evaluation=[lm_eval]", "lm_eval") from error
    with _quiet():
        from lm_eval.models.huggingface import HFLM

        manager = _tasks(include_path)
        asked = [_task(name, local_data, manager) for name in tasks]
        found: list[Measurement] = []
        with ready_to_measure(models, device):
            for number, (name, model) in enumerate(models.items()):
                progress(Progress("lm_eval", name, number, len(models)))
                held = HFLM(
                    pretrained=model, tokenizer=text.tokenizer, batch_size=batch_size, max_length=text.max_length
                )
                try:
                    results = lm_eval.simple_evaluate(
                        model=held,
                        tasks=list(asked),
                        num_fewshot=num_fewshot,
                        limit=limit,
                        task_manager=manager,
                        log_samples=False,
                        bootstrap_iters=0,
                    )
                except Exception as error:  # datasets and the hub raise many types of their own
                    if is_out_of_memory(error):
                        raise
                    first = first_line(error, "no message")[:200]
                    raise DataError(
                        f"evaluation.lm_eval: the data of {', '.join(tasks)} could not be had ({type(error).__name__}: "
                        f"{first}); connect to the network once, or give evaluation.lm_eval.local_data=FOLDER."
                    ) from error
                found += _records(name, results, limit, lm_eval.__version__, local_data)
    progress(Progress("lm_eval", "", len(models), len(models)))
    return tuple(found)


def local_task(name: str, file: Path) -> dict[str, Any]:
    """lm-eval's configuration of a task whose documents lie in a JSONL file.

    Raises:
        DataError: If the file is damaged, or its fields are none of the known layouts.
    """
    try:
        with file.open(encoding="utf-8") as stream:
            first = json.loads(stream.readline())
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"evaluation.lm_eval.local_data: {file} is damaged, not JSONL ({error}).") from error
    config: dict[str, Any] = {
        "task": f"{name}_local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file.resolve())}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "metric_list": [dict(metric) for metric in _ACCURACIES],
        "metadata": {"version": 1.0},
    }
    fields = set(first)
    if {"query", "choices", "gold"} <= fields:
        return config | {
            "doc_to_text": "{{query}}\nAnswer:",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
        }
    if {"context_options", "continuation", "gold"} <= fields:  # the likelihood of one ending behind two beginnings
        return config | {
            "doc_to_text": "{{gold}}",
            "doc_to_choice": "{{context_options}}",
            "doc_to_target": "{{continuation}}",
            "metric_list": [dict(_ACCURACIES[0])],
        }
    if {"ctx_a", "ctx_b", "endings", "label"} <= fields:
        from lm_eval.tasks.hellaswag.utils import process_docs

        return config | {
            "process_docs": process_docs,
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{label}}",
        }
    if {"context", "continuation"} <= fields:
        return config | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": "{{' ' + continuation}}",
            "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
        }
    raise DataError(
        f"evaluation.lm_eval.local_data: {file} has the fields {', '.join(sorted(fields))}, expected query, choices, "
        "gold; or context_options, continuation, gold; or context, continuation."
    )


@functools.cache
def _tasks(include_path: str | None) -> Any:
    """What lm-eval knows: it reads some thousands of files for it, so once."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path)


def _task(name: str, local_data: str | None, manager: Any) -> str | dict[str, Any]:
    if local_data is not None:
        folder = Path(os.path.expanduser(local_data))
        if not folder.is_dir():
            raise DataError(f"evaluation.lm_eval.local_data: no folder at {folder}.")
        # NAME_val1000.jsonl is NAME, too: a part of it that says so.
        file = next(iter([*folder.glob(f"{name}.jsonl"), *sorted(folder.glob(f"{name}_*.jsonl"))]), None)
        if file is not None:
            return local_task(name, file)
    known = manager.all_tasks
    if name not in known:
        raise ConfigError(f"evaluation.lm_eval.tasks: lm-eval knows no task '{name}', {nearest(name, known)}")
    return name


def _records(
    model: str, results: Mapping[str, Any], limit: int | None, version: str, local_data: str | None
) -> Iterator[Measurement]:
    means: dict[str, float] = {}
    for task, metrics in sorted(results["results"].items()):
        values = {key.partition(",")[0]: value for key, value in metrics.items() if isinstance(value, int | float)}
        protocol = {
            "lm_eval": version,
            "task_version": results["versions"].get(task),
            "num_fewshot": results.get("n-shot", {}).get(task),
            "documents": results.get("n-samples", {}).get(task, {}).get("effective"),
            "limit": limit,
            "local_data": local_data if task.endswith("_local") else None,
        }
        for metric, value in values.items():
            if metric.endswith("_stderr") or metric in ("alias", "sample_len"):
                continue
            share = metric.startswith(("acc", "exact_match", "f1"))
            scale = 100.0 if share else 1.0
            error = values.get(f"{metric}_stderr")
            own = protocol | ({} if error is None else {"standard_error": scale * error})
            yield Measurement(model, f"lm_eval/{task}/{metric}", scale * value, "%" if share else "", own)
        means[task.removesuffix("_local")] = values.get("acc_norm", values.get("acc", float("nan")))
    if set(PAPER_TASKS) <= set(means):
        average = 100 * fmean(means[task] for task in PAPER_TASKS)
        told = {"of": list(PAPER_TASKS), "metric": "acc_norm, or acc where there is none", "limit": limit}
        yield Measurement(model, "lm_eval/average", average, "%", told)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets report at length on standard error; what goes wrong comes as an error anyway."""
    names = ("lm_eval", "lm-eval", "datasets", "lm_eval.tasks", "lm_eval.evaluator")
    before = {name: logging.getLogger(name).level for name in names}
    bars = {name: os.environ.get(name) for name in ("TQDM_DISABLE", "HF_DATASETS_DISABLE_PROGRESS_BARS")}
    os.environ.update(dict.fromkeys(bars, "1"))
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Some bars ask nobody, and a record of the working folder's git commit belongs to whoever runs lm-eval there.
        with contextlib.redirect_stderr(io.StringIO()), patch("lm_eval.evaluator.get_git_commit_hash", lambda: None):
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
        for name, value in bars.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
