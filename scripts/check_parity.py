"""Whether two checkouts prune to the same networks: kept sets and weights of the same commands, compared run by run.

    MODHIFI_TEST_DATA=../shared/data python scripts/check_parity.py OLD_CHECKOUT NEW_CHECKOUT [--only WORD] [--work FOLDER]

Every case is one `modhifi prune` with target and rounding given, run once from each checkout with this Python; old runs
are kept in the folder and not run again. Then the old checkout's runs are verified and replayed by the new one.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

DATA = Path(os.environ.get("MODHIFI_TEST_DATA", "../shared/data")).resolve()
RESNET = [
    "model=resnet20_cifar", f"model.weights={DATA}/weights/cifar10_resnet20.safetensors", "data=arrays",
    f"data.path={DATA}/cifar10/train_10000.npz", "data.num_samples=256", "target=flops", "sparsity=0.4", "round_to=1",
]  # fmt: skip
STORIES = [
    "model=hf", f"model.path={DATA}/weights/stories260k", "data=text", f"data.path={DATA}/text/tinystories_sample.txt",
    "data.length=128", "data.sequences=24", "target=params", "sparsity=0.2", "round_to=1",
]  # fmt: skip
VIT = [
    "model=timm", "model.name=vit_tiny_patch16_224", "model.weights=random", "data=procedural", "data.num_samples=24",
    "target=flops", "sparsity=0.3", "round_to=1", "check_data=false",
]  # fmt: skip
CASES = {
    "resnet20 best": [*RESNET, "preset=best"],
    "resnet20 fast": [*RESNET, "preset=fast"],
    "resnet20 paper": [*RESNET, "preset=paper"],
    "resnet20 magnitude_batchnorm": [*RESNET, "preset=magnitude_batchnorm"],
    "mobilenet_v2 best": [
        "model=timm", "model.name=mobilenetv2_100", "model.weights=random", "data=procedural", "data.num_samples=32",
        "target=flops", "sparsity=0.2", "round_to=1", "preset=best", "check_data=false",
    ],
    "vit best": [*VIT, "preset=best"],
    "vit fast": [*VIT, "preset=fast"],
    "stories260k best": [*STORIES, "preset=best"],
    "stories260k heads": [*STORIES, "preset=best", "components=[mlp,attention]"],
    "stories260k paper": [*STORIES, "preset=paper"],
}  # fmt: skip


# Runs of the old checkout have no checksums and no mark of their maker, so the new one reads them only when told so.
EXTRA = {"verify": ["unverified=true"], "replay": ["unverified=true", "model.trust=true"]}


def run(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """One command of a checkout's tool."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "modhifi_cli", *words], env=environment, capture_output=True, text=True, cwd=checkout
    )


def pruned(checkout: Path, words: list[str], folder: Path) -> Path:
    """The run folder of a case, made now if it is not there yet."""
    found = [path.parent for path in folder.glob("**/results.json")]
    if not found:
        done = run(checkout, "prune", *words, "evaluation=[]", f"output_dir={folder}", "console=plain")
        if done.returncode:
            raise SystemExit(f"{checkout}: {done.stderr[-2000:]}")
        found = [path.parent for path in folder.glob("**/results.json")]
    return found[0]


def outcome(run_folder: Path) -> tuple[list[tuple[str, int, int]], str]:
    """Kept counts of every group, and the digest of the saved weights."""
    results = json.loads((run_folder / "results.json").read_text())
    digest = hashlib.sha256()
    for path in sorted((run_folder / "model").glob("*.safetensors")):
        from safetensors.torch import load_file

        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().view(-1).view(dtype=__import__("torch").uint8).numpy().tobytes())
    return [(group["group"], group["pass"], group["kept"]) for group in results["groups"]], digest.hexdigest()[:16]


def main() -> int:
    """Print a row for every case; 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--only", default="")
    parser.add_argument("--work", type=Path, default=Path("outputs/parity"))
    parser.add_argument("--base-only", action="store_true", help="make the old checkout's runs alone")
    asked = parser.parse_args()
    worst = 0
    for name, words in CASES.items():
        if asked.only not in name:
            continue
        places = [asked.work.resolve() / side / name.replace(" ", "_") for side in ("old", "new")]
        before = pruned(asked.old.resolve(), words, places[0])
        if asked.base_only:
            print(name, outcome(before)[1], flush=True)
            continue
        after = pruned(asked.new.resolve(), words, places[1])
        (kept, digest), (kept_now, digest_now) = outcome(before), outcome(after)
        again = [run(asked.new.resolve(), verb, f"run={before}", *EXTRA[verb]).returncode for verb in EXTRA]
        same = kept == kept_now and digest == digest_now
        worst |= not same or any(again)
        print(
            f"{name:<30} kept {'same' if kept == kept_now else 'DIFFER'}  weights {'same' if digest == digest_now else 'DIFFER'}"
            f"  old run verified {again[0] == 0}, replayed {again[1] == 0}", flush=True,
        )  # fmt: skip
    return worst


if __name__ == "__main__":
    sys.exit(main())
