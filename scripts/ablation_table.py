"""Turn the summary of an ablation sweep into a Markdown table: mean and standard deviation of top-1 over the seeds.

python scripts/ablation_table.py outputs/sweeps/prune_experiment-cifar_ablation_resnet20/summary.csv
"""

import argparse
import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path


def table(rows: list[dict[str, str]]) -> str:
    """One line a method (preset), one column a share of FLOPs.

    Args:
        rows: Lines of a sweep's ``summary.csv``; those that did not finish are refused.

    Raises:
        ValueError: If a job has not finished, since a mean over fewer seeds would be another table.
    """
    left = [row["job"] for row in rows if not row["status"].startswith("finished")]
    if left:
        raise ValueError(f"jobs {', '.join(left)} have not finished: start the sweep again.")
    cells: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        cells[row["preset"], row["sparsity"]].append(float(row["pruned_top1"]))
    methods = list(dict.fromkeys(method for method, _ in cells))
    shares = list(dict.fromkeys(share for _, share in cells))
    lines = ["| method | " + " | ".join(f"{float(share):.0%} of FLOPs" for share in shares) + " |"]
    lines.append("|---|" + "---|" * len(shares))
    for method in methods:
        values = [cells[method, share] for share in shares]
        shown = [f"{statistics.mean(v):.2f} ± {statistics.stdev(v) if len(v) > 1 else 0:.2f}" for v in values]
        lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table of one sweep."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summary", type=Path, help="summary.csv of the sweep")
    path = parser.parse_args().summary
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    print(f"\n{path.parent.name}\n\n{table(rows)}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"ablation_table: {error}")
