"""The page of a coverage run: which networks of a library can be pruned, and what each leaves alone."""

from collections.abc import Mapping
from typing import Any

from modhifi_cli.pages.page import Page, Section, Text, one_line, table


def page(content: Mapping[str, Any], environment: Mapping[str, Any]) -> Page:
    """The table of a coverage run, and what each network leaves alone.

    Args:
        content: The run's ``results.json``.
        environment: Its ``environment.json``.
    """
    rows = content["networks"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items() if version)
    seconds = sum(row.get("processor_seconds", 0) for row in rows)
    took = ""
    if content.get("examined") == len(rows):  # in one run, so that its time is that of the table
        took = f", {content['seconds'] / 60:.0f} minutes with {content['jobs']} at once"
    lead = (
        f"{content['date']}, {versions}, {environment['system']}. Made by {environment['command']}; {seconds / 60:.0f} minutes "
        f"of processor time{took}. Random weights and images; {100 * content['settings']['share']:.0f} % of the "
        "components of every group removed."
    )
    apart = [row for row in rows if row.get("apart")]
    rows = [row for row in rows if not row.get("apart")]
    counted = sum(1 for row in rows if row["counts"])
    sections = [
        Section("Networks", (table([_line(row, content) for row in rows]),)),
        Section(f"What is left alone in {content['library']}, and why", (_reasons(rows),)),
    ]
    if apart:
        told = "The library's own class does not run with its default configuration here, so nothing can be said of it."
        listed = table([{"network": row["name"], "kind": row["kind"], "in the library's words": row["why"]} for row in apart])
        sections.append(Section(f"Named apart in {content['library']}: {len(apart)}", (Text(told), listed)))
    return Page(
        title=f"{content['library']}: {counted} of {len(rows)} networks", lead=lead, facts=(), sections=tuple(sections)
    )


def _line(row: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, str]:
    has = "groups" in row
    return {
        "network": row["name"],
        "file" if content["library"] == "timm" else "kind": row["kind"],
        "input": "×".join(str(size) for size in row["input"]) if has else "",
        "parameters": f"{row['parameters'] / 1e6:.1f} M" if has else "",
        "groups": str(row["groups"]) if has else "",
        "left alone": str(len(row["refused"])),
        "carried": f"{100 * row['carried']:.0f} %" if has else "",
        "removed": f"{100 * row['removed']:.0f} %" if has else "",
        "law": row["law_dtype"] if has else "",
        "difference": f"{row['difference']:.0e}" if has else "",
        "reload": "equal" if row.get("reload") == 0 else f"{row['reload']:.0e}" if row.get("reload") else "",
        "counts": "yes" if row["counts"] else "**no**",
        "why not": row["why"] or "",
    } | ({"ONNX": row.get("onnx", "")} if content["settings"].get("onnx") else {})


def _reasons(rows: Any) -> Any:
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for refusal in row["refused"]:
            reasons.setdefault(_kind(refusal["reason"], refusal["name"]), []).append(row["name"])
    if not reasons:
        return Text("Nothing.")
    return table(
        [
            {
                "reason": reason,
                "groups": str(len(names)),
                "networks": ", ".join(sorted(set(names))[:6]) + (" …" if len(set(names)) > 6 else ""),
            }
            for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1]))
        ]
    )


def _kind(reason: str, name: str) -> str:
    """A reason without the module it names, so that the same reasons of many networks are one line."""
    words = [word for word in reason.split(" ") if "." not in word.rstrip(".,;:") and word != name]
    return one_line(" ".join(words))
