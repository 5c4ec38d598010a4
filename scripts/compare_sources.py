"""Accuracy against the calibration data's source and size: prune runs that differ in nothing else, and their table.

    python scripts/compare_sources.py --out outputs/sources --sizes 256,512 --sparsity 0.3,0.5 \
        --source "real|data=arrays data.path=train.npz" --source "inversion|data=inversion" \
        -- model=resnet20_cifar model.weights=FILE evaluation_data=arrays evaluation_data.path=test.npz

Every run is an ordinary `modhifi prune` in a folder of its own under --out; finished ones are found again. The table
goes to --out/sources.md and --out/sources.csv.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

from modhifi_cli import artifacts, reports
from modhifi_cli.cli import main as modhifi
from modhifi_cli.config import slug


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--source", action="append", required=True, help="NAME|overrides that choose it")
    parser.add_argument("--sizes", default="512", help="numbers of calibration samples, with commas")
    parser.add_argument("--sparsity", default="0.3", help="shares, with commas")
    parser.add_argument("--seeds", default="0", help="of the draw, with commas")
    parser.add_argument("common", nargs="*", help="overrides of every run")
    return parser.parse_args()


def result(folder: Path, words: list[str]) -> dict | None:
    """The numbers of one run, made now unless a finished one lies in its folder; None if it failed."""
    finished = sorted(
        path.parent for path in folder.glob("prune/*/*/results.json") if path.parent.suffix != ".incomplete"
    )
    if not finished:
        print("modhifi prune " + shlex.join(words), flush=True)
        if modhifi(["prune", *words, f"output_dir={folder}", "console=plain"]) != 0:
            return None
        finished = sorted(path.parent for path in folder.glob("prune/*/*/results.json"))
    return artifacts.read_results(finished[-1])


def main() -> int:
    asked = arguments()
    rows = []
    for text in asked.source:
        name, _, chosen = text.partition("|")
        for size in asked.sizes.split(","):
            row: dict[str, object] = {"source": name, "samples": size}
            for share in asked.sparsity.split(","):
                values = []
                for seed in asked.seeds.split(","):
                    words = [*asked.common, *shlex.split(chosen), f"sparsity={share}"]
                    words += [f"data.num_samples={size}", f"data.seed={seed}"]
                    found = result(asked.out / slug(words), words)
                    if found is None:
                        continue
                    row["samples"] = found["calibration"]["num_samples"]
                    quality = found.get("quality") or {}
                    row["BatchNorm distance"] = quality.get("distance")
                    measured = {m["name"]: m["value"] for m in found["measurements"] if m["model"] == "pruned"}
                    row |= {
                        "dense": m["value"]
                        for m in found["measurements"]
                        if m["model"] == "dense" and m["name"] == "top1"
                    }
                    values.append(measured.get("top1", measured.get("agreement")))
                row[f"at {share}"] = round(sum(values) / len(values), 2) if values else "failed"
            rows.append(row)
            heads = list(dict.fromkeys(key for one in rows for key in one))
            table = [{head: one.get(head, "") for head in heads} for one in rows]
            artifacts.make_folder(asked.out)
            artifacts.write_text(asked.out / "sources.csv", reports.csv_text(table))
            lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
            lines += ["| " + " | ".join(str(one[head]) for head in heads) + " |" for one in table]
            artifacts.write_text(asked.out / "sources.md", "\n".join(lines) + "\n")
            print(json.dumps(table[-1], default=str), flush=True)
    print((asked.out / "sources.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
