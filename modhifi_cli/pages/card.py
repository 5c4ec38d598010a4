"""The page that lies beside a saved network's weights, as model hubs read it."""

from collections.abc import Mapping, Sequence
from typing import Any

from modhifi_cli.pages.terms import protocol_lines, removed, table
from modhifi_cli.records import Measurement


def model_card(
    name: str,
    *,
    origin: str,
    native: bool,
    achieved: Mapping[str, float],
    measurements: Sequence[Measurement],
    calibration: Mapping[str, Any],
    repeat: str,
    trained: str = "",
) -> str:
    """The page that lies beside a pruned language model's weights: what it is, how it loads, its numbers.

    Args:
        name: Of the dense network.
        origin: Where its weights came from.
        native: Whether plain transformers opens the folder.
        achieved: Shares removed.
        measurements: Of the dense and the pruned network.
        calibration: Protocol of the calibration text.
        repeat: The command that made it.
        trained: A sentence about training after the cut; empty where there was none.

    Returns:
        Markdown with the header that model hubs read.
    """
    loading = (
        'AutoModelForCausalLM.from_pretrained("FOLDER")   # from transformers; no other code is needed'
        if native
        else 'modhifi_cli.load_model("RUN")   # the run folder; layers differ in width, so plain transformers cannot'
    )
    read = ", ".join(f"{key} {calibration[key]}" for key in ("path", "sequences", "length", "seed") if key in calibration)
    rows = [f"| {row.label} | {row.before} | {row.after} | {row.change} |" for row in table(measurements)]
    numbers = ["|  | dense | pruned | change |", "| --- | --- | --- | --- |", *rows] if rows else ["Nothing was measured."]
    return "\n".join(
        [
            "---",
            f"library_name: {'transformers' if native else 'modhifi'}",
            "tags: [pruned, modhifi]",
            "pipeline_tag: text-generation",
            "---",
            f"# {name}, pruned",
            "",
            f"Made from {origin} by structured pruning with closed-form repair (ModHiFi-P, arXiv:2511.19566)"
            f"{'. It was ' + trained if trained else ', without training.'} Removed: {removed(achieved)}.",
            "",
            f"    {loading}",
            "",
            f"Calibration text: {read}.",
            "",
            *numbers,
            "",
            *(f"- {line}" for line in protocol_lines(measurements)),
            "",
            "Made with:",
            "",
            f"    {repeat}",
            "",
        ]
    )
