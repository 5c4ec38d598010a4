"""Cost of unlearning in plain forwards over the same images: operations counted, so the machine's load does not matter.

    python scripts/bench_unlearn.py                     # ResNet-20: every method, strength given and searched for
    python scripts/bench_unlearn.py --model resnet56_cifar --images 256

A forward's operations are its convolutions and its linear layers; the second column counts the products of second
moments beside them. Weights and images are random, which changes what is found, not what it costs. The class is the one
that the random network answers most, so that a search has something to do; the last column says how many it tried.
"""

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from modhifi_cli.settings import config
from modhifi_cli.unlearning.collapse import CollapseU
from modhifi_cli.unlearning.contrast import ContrastU
from modhifi_cli.unlearning.discedit_u import DisCEditU
from modhifi_cli.unlearning.modhifi_u import ModHiFiU
from modhifi_cli.unlearning.search import Order, Trial, unlearn_

METHODS = {
    "modhifi_u, share given": lambda: ModHiFiU(fraction=0.1),
    "modhifi_u, share searched for": ModHiFiU,
    "discedit_u, share given": lambda: DisCEditU(fraction=0.1),
    "discedit_u, share searched for": DisCEditU,
    "contrast, beta given": lambda: ContrastU(beta=0.3),
    "contrast, beta searched for": ContrastU,
    "collapse, beta given": CollapseU,
    "collapse, beta searched for": lambda: CollapseU(beta="auto"),
}


class RandomImages:
    """Seeded noise images, a tenth of each class."""

    protocol: dict = {}

    def __init__(self, count: int, size: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn((count, 3, size, size), generator=generator)
        self.labels = torch.arange(count) % classes

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True)


def counted(counter: FlopCounterMode) -> tuple[int, int]:
    """Operations of convolutions and linear layers, and of all other products."""
    inside = outside = 0
    for operator, flops in counter.get_flop_counts()["Global"].items():
        if str(operator) in ("aten.convolution", "aten.addmm"):
            inside += flops
        else:
            outside += flops
    return inside, outside


def main() -> None:
    """Print one line a method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20_cifar")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=50)
    asked = parser.parse_args()
    settings = config.compose("unlearn", [f"model={asked.model}", "model.weights=random", "forget_class=0"])
    images = None
    print(f"{asked.model}, {asked.images} images, in plain forwards over them:")
    for name, method in METHODS.items():
        loaded = config.build(settings["model"])
        images = images or RandomImages(asked.images, loaded.preprocess.size[0], 10)
        with FlopCounterMode(display=False) as plain, torch.no_grad():
            answers = torch.cat([loaded.model(batch).argmax(1) for batch, _ in images.batches(asked.batch)])
        with FlopCounterMode(display=False) as spent:
            events = list(
                unlearn_(
                    loaded.model, Order((int(answers.mode().values),), method()), calibration=images,
                    labels=images.labels, batch_size=asked.batch,
                )
            )  # fmt: skip
        one, (inside, outside) = counted(plain)[0], counted(spent)
        tried = sum(isinstance(event, Trial) for event in events)
        print(f"  {name:32} {inside / one:5.2f} forwards, moments {outside / one:5.2f}, {max(0, tried - 1)} tried")


if __name__ == "__main__":
    main()
