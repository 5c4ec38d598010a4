"""The card beside a saved network's weights, and the lines that load it: what a hub and a reader of a folder see."""

from collections.abc import Mapping, Sequence
from typing import Any

from modhifi_cli.pages.page import one_line
from modhifi_cli.pages.terms import protocol_lines, removed, table
from modhifi_cli.records import Measurement, without_folders

_VERBS = {"prune": "pruned", "unlearn": "with classes forgotten", "replay": "replayed"}


def loading_lines(folder: str, opening: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The lines of Python that open a saved network.

    Args:
        folder: As they shall name it.
        opening: Of a language model, what opens it (``by``); None for networks that read images.
    """
    if opening is None or opening["by"] == "modhifi":
        use = "logits = model(images)" if opening is None else "logits = model(input_ids=ids).logits"
        return ("import modhifi_cli", f"model = modhifi_cli.load_model({folder!r})", use)
    trust = "" if opening["by"] == "transformers" else ", trust_remote_code=True"
    return (
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({folder!r}{trust})",
        f"tokenizer = AutoTokenizer.from_pretrained({folder!r})",
    )


def card(
    results: Mapping[str, Any],
    *,
    opening: Mapping[str, Any] | None,
    exports: Sequence[str],
    repeat: str,
    trained: str = "",
    license: str = "",
) -> str:
    """The page that lies beside the weights: base, method, licence, numbers with their protocol, and how it loads.

    Args:
        results: Of the run.
        opening: As in `loading_lines`.
        exports: Names of the files in the run's ``export/``.
        repeat: The command that made it, or "".
        trained: A sentence about training after the cut; empty where there was none.
        license: Of the base weights, as their source states it; empty where it does not.

    Returns:
        Markdown with the header that model hubs read. No folder of the machine it was made on is in it.
    """
    text = opening is not None
    by = opening["by"] if opening is not None else "modhifi"
    measurements = [Measurement(**one) for one in results.get("measurements") or ()]
    rows = [f"| {row.label} | {row.before} | {row.after} | {row.change} |" for row in table(measurements)]
    numbers = ["|  | dense | new | change |", "| --- | --- | --- | --- |", *rows] if rows else ["Nothing was measured."]
    calibration = results.get("calibration") or {}
    read = ", ".join(
        f"{key} {calibration[key]}"
        for key in ("source", "path", "num_samples", "sequences", "length", "seed")
        if calibration.get(key) is not None
    )
    base = str(results.get("weights", "weights unknown"))
    lines = [
        "---",
        f"library_name: {'transformers' if by.startswith('transformers') else 'modhifi'}",
        f"tags: [{dict(prune='pruned', unlearn='unlearned').get(str(results.get('verb')), 'edited')}, modhifi]",
        f"pipeline_tag: {'text-generation' if text else 'image-classification'}",
        *([f"license: {license}"] if license else []),
        "---",
        f"# {results.get('model', 'network')}, {_VERBS.get(str(results.get('verb')), 'edited')}",
        "",
        f"Base: {base}.",
        "",
        _method(results, trained),
        "",
        "```python",
        *loading_lines("FOLDER", opening),
        "```",
        "",
        "FOLDER is this folder, or its name on the hub." + (f" {_why(opening)}" if opening and opening.get("why") else ""),
        *([f"Besides, the run wrote {', '.join(exports)}."] if exports else []),
        "",
        "Licence: "
        + (f"{license}, as the base says." if license else
           "that of the base network, which was not stated where its weights were read from."),
        "",
        f"Calibration: {read or 'none'}.",
        "",
        *numbers,
        "",
        *(f"- {line}" for line in protocol_lines(measurements)),
        *(["", "Made with:", "", f"    {repeat}"] if repeat else []),
        "",
    ]  # fmt: skip
    return without_folders("\n".join(lines))


def _method(results: Mapping[str, Any], trained: str) -> str:
    if results.get("verb") == "unlearn":
        forgotten = ", ".join(map(str, results.get("forget") or ()))
        return f"Classes {forgotten} were forgotten in closed form (ModHiFi-U, arXiv:2511.19566), without training."
    shares = removed(results.get("achieved") or {})
    return (
        "Structured pruning with closed-form repair (ModHiFi-P, arXiv:2511.19566)"
        f"{'. It was ' + trained if trained else ', without training.'} Removed: {shares or 'as the edits say'}."
    )


def _why(opening: Mapping[str, Any]) -> str:
    own = opening["by"] != "modhifi"
    return one_line(f"{'It brings code of its own' if own else 'Plain transformers does not open it'}: {opening['why']}.")
