"""Write docs/results/coverage.md: what is pruned of torchvision, of one network of each file of timm, of transformers.

    python scripts/make_coverage.py [--outputs outputs] [--jobs 2] [--memory 6] [--only LIBRARY] [--written]

Networks that are finished are kept, so the script goes on where it stopped; --only leaves the parts of the page on other
libraries as they are; --written runs nothing and makes the page of what is there.
"""

import argparse
import json
import sys
from pathlib import Path

from modhifi_cli.cli import main as modhifi
from modhifi_cli.models import catalogue
from modhifi_cli.pages import coverage
from modhifi_cli.pages.page import markdown

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results" / "coverage.md"
# In the smallest networks the classifier behind a norm weighs most, which nobody can cut. Where that alone stops the
# smallest of a file, the next larger ones are looked at, too.
LARGER = ["edgenext_small", "efficientvit_b2", "gcvit_tiny", "inception_next_tiny"]
RUNS = (  # library, words, folder below the outputs
    ("torchvision", ["library=torchvision", "onnx=true"], ""),
    ("timm", ["library=timm", "one_per_file=true"], ""),
    ("timm", ["library=timm", f"pattern=[{','.join(LARGER)}]"], "larger"),
    ("transformers", ["library=transformers", "memory=4", "timeout=300"], ""),
)

HEAD = """# What modhifi prunes

Written by `scripts/make_coverage.py`. A network counts if its accepted groups touch at least 80 % of the parameters of
its convolutions and linear layers, if a run that removes 30 % of the components of every group leaves at least 20 % of
all parameters out, answers as the network whose consumers' weights are zeroed instead (to 1e-4 of the logits' scale in
float32), is saved and read back with equal logits, and runs. Every accepted group has passed the slicing law on a
randomised copy in the type of the column *law*: to 1e-8 of the logits' scale in float64; to 1e-4 in float32 for
networks above 150 million parameters, whose float64 copy would not fit. *ONNX* says whether the narrow network, exported,
answers in ONNX Runtime as in PyTorch; a network counts without it. The input is the smallest square of 64 to 320
pixels that the network takes, or its own. *left alone* counts what is refused; the reasons are below each table.

Detection networks are pruned through `models/image_batch.py`: heads that run on every level of a pyramid run on one,
and the pyramid's own maps stay as wide as they are; they count only if the library's own forward runs on a list of
images after the cut. For timm one network stands for each module file: the one with the fewest parameters among those
looked at, all of them in the first 47 files and up to six that their names call small in the others. Quantised and
video networks are left out.

Of transformers every class for causal language modelling and for image classification is tried. Decoders are made small
from the default configuration of their family (the sizes by their names: 4 layers, a width of 64), and count if heads of
attention and neurons of MLPs, of experts too, reach 80 % of the parameters of their layers' linear layers and experts. Their
law is checked in float64 for each kind of layer, and again for the whole network with all parts cut at once; *removed* is of
the decoder layers. Classifiers keep the sizes of their defaults, where one number says how many layers there are two of them.
A class that the library does not make from its default configuration here, or that does not answer token ids (for a
classifier: pictures) alone with it, is named apart, whatever its name: there is no network to prune. This is asked of those
alone that could not be examined.
"""


def not_examined(library: str, place: Path, known: set[str]) -> list[str]:
    """Networks that belong on the page and are not in the results, such as those of a run that goes on."""
    if library == "timm":
        wanted = json.loads((place / "smallest.json").read_text(encoding="utf-8"))["smallest"].values()
    else:
        wanted = catalogue.kinds(library)
    return sorted(set(wanted) - known)


def standing(library: str, larger: bool) -> list[str]:
    """The part of the present page on a library; of the larger networks of timm, or of all others."""
    found = [f"## {part}" for part in PAGE.read_text(encoding="utf-8").split("\n## ")[1:] if part.startswith(f"{library}")
             or part.startswith(("What is left alone in ", "Named apart in ")) and f" in {library}" in part.partition("\n")[0]]  # fmt: skip
    middle = next((place for place, part in enumerate(found) if part.startswith(f"## {library}, larger")), len(found))
    return [part.rstrip("\n") + "\n" for part in (found[middle:] if larger else found[:middle])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=Path("outputs"))
    parser.add_argument("--jobs", default="auto")
    parser.add_argument("--memory", default="6", help="gigabytes that one network may take")
    parser.add_argument("--only", choices=catalogue.LIBRARIES, help="leave the parts on other libraries as they are")
    parser.add_argument("--written", action="store_true", help="run nothing, write the page of what is there")
    given = parser.parse_args()
    parts = [HEAD]
    for library, words, below in RUNS:
        if given.only not in (None, library):
            parts += standing(library, "larger" in below)
            continue
        outputs = given.outputs / below
        if not given.written:
            limits = [f"jobs={given.jobs}", f"memory={given.memory}"]
            code = modhifi(["coverage", *words, *limits, f"output_dir={outputs}", "console=plain"])
            if code:
                return code
        place = outputs / "coverage" / library
        content = json.loads((place / "results.json").read_text(encoding="utf-8"))
        environment = json.loads((place / "environment.json").read_text(encoding="utf-8"))
        page = markdown(coverage.page(content, environment), heading="##")
        if below:
            page = page.replace(f"## {library}:", f"## {library}, larger networks of files whose smallest falls short:", 1)
        parts.append(page)
        if not below and (missing := not_examined(library, place, {row["name"] for row in content["networks"]})):
            parts.append(f"Not examined yet, so neither counted nor refused ({len(missing)}): {', '.join(missing)}.\n")
    PAGE.write_text("\n".join(parts), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
