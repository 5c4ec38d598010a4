"""Make the pictures of the README from real runs: what is finished is kept, so only missing runs are computed.

    MODHIFI_TEST_DATA=../shared/data python scripts/make_gallery.py [--outputs outputs]

Accuracy against FLOPs of all methods (`modhifi compare`), what removed components were worth and how few carry a layer
(`modhifi study`), all on ResNet-20 and CIFAR-10. The figures that the runs drew are copied to docs/ as they are.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from modhifi_cli.cli import main as modhifi

DOCS = Path(__file__).resolve().parent.parent / "docs"
IN_THE_README = "frontier"  # as PNG, which package indexes show; they refuse drawings that are not served as such
_LARGEST = 150_000  # bytes of a picture


def pictures(data: Path) -> dict[str, tuple[list[str], str, str]]:
    """Picture → the command that makes it, where its folder lies below the outputs, and the figure in there."""
    common = [
        "model=resnet20_cifar", f"model.weights={data / 'weights/cifar10_resnet20.safetensors'}", "data=arrays",
        f"data.path={data / 'cifar10/train_10000.npz'}", "evaluation_data=arrays",
        f"evaluation_data.path={data / 'cifar10/test.npz'}", "runtime.threads=1",
    ]  # fmt: skip
    worth = ["name=counterfactual", *common, "data.num_samples=512", "evaluation_data.num_samples=1000"]
    few = ["name=existence", *common, "data.num_samples=256", "evaluation_data.num_samples=500"]
    compared = ["compare", "experiment=cifar_compare_resnet20", "runtime.threads=1"]
    return {
        "frontier": (compared, "compare/*", "frontier_flops.svg"),
        "counterfactual": (["study", *worth, "seeds=[0,1,2]"], "study/counterfactual/*", "counterfactual.svg"),
        "existence": (["study", *few], "study/existence/*", "existence.svg"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    outputs = parser.parse_args().outputs
    data = Path(os.environ.get("MODHIFI_TEST_DATA", "../shared/data"))
    DOCS.mkdir(exist_ok=True)
    for name, (words, inside, figure) in pictures(data).items():
        code = modhifi([*words, f"output_dir={outputs}", "console=plain"])
        if code:
            return code
        made = max(outputs.glob(f"{inside}/{figure}"), key=lambda path: path.stat().st_mtime)
        if made.stat().st_size > _LARGEST:
            print(
                f"{made} has {made.stat().st_size:,} bytes, more than {_LARGEST:,}; draw fewer curves", file=sys.stderr
            )
            return 1
        kind = ".png" if name == IN_THE_README else ".svg"
        shutil.copyfile(made.with_suffix(kind), DOCS / f"{name}{kind}")
        print(f"docs/{name}{kind} from {made}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
