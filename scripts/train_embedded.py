"""Trains the embedded network on the training digits and writes its weights into the package.

    python scripts/train_embedded.py [FILE]

The run is seeded and uses one thread, so that it gives the same bytes again on the same build of torch. The number of
epochs was fixed beforehand; the held-out digits are looked at once, at the end, to print their accuracy.
"""

import math
import sys
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data import digits
from modhifi_cli.models import embedded
from modhifi_cli.models.weights import seeded_initialisation

SEED = 0
EPOCHS = 60
BATCH_SIZE = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4


def train(seed: int = SEED, epochs: int = EPOCHS) -> nn.Module:
    """The trained network in evaluation mode: SGD with momentum, one cosine, turned and shifted digits.

    Args:
        seed: Of the initial weights, the order of the digits and their augmentation.
        epochs: Walks over the 1,347 training digits.
    """
    source = digits.load(preprocess=embedded.PREPROCESS, labelled=True, split="train")
    inputs, labels = next(source.batches(len(source)))
    generator = torch.Generator().manual_seed(seed)
    with seeded_initialisation(seed):
        model = embedded.build().train()
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = len(inputs) // BATCH_SIZE  # The odd ones out change from epoch to epoch with the order.
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        for step in range(steps):
            done = (epoch + step / steps) / epochs
            optimiser.param_groups[0]["lr"] = LEARNING_RATE * min(1, 20 * done) * (1 + math.cos(math.pi * done)) / 2
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            loss = F.cross_entropy(model(augment(inputs[batch], generator)), labels[batch], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    return model.eval()


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Turned by up to 12°, scaled by up to 12 % and shifted by up to one pixel, each image on its own.

    Args:
        inputs: ``[batch, 1, 8, 8]``, normalised.
        generator: Where the draws come from.
    """

    def draw(limit: float) -> Tensor:
        return (torch.rand(len(inputs), generator=generator) * 2 - 1) * limit

    angle, scale = draw(math.radians(12)), 1 + draw(0.12)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    # affine_grid measures in halves of the image: 0.25 is one of eight pixels.
    rows = [torch.stack([cosine, -sine, draw(0.25)], 1), torch.stack([sine, cosine, draw(0.25)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(inputs.shape), align_corners=False)
    return F.grid_sample(inputs, grid, padding_mode="border", align_corners=False)


@torch.inference_mode()
def correct(model: nn.Module, split: str) -> tuple[int, int]:
    """Rightly classified digits of one side of the split, and how many there are."""
    source = digits.load(preprocess=embedded.PREPROCESS, labelled=True, split=split)
    inputs, labels = next(source.batches(len(source)))
    return int((model(inputs).argmax(1) == labels).sum()), len(source)


def main() -> None:
    """Train, save, print the accuracies on both sides of the split."""
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else embedded.WEIGHTS
    start = time.monotonic()
    model = train()
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, target)
    print(f"{target}: {target.stat().st_size:,} bytes, {time.monotonic() - start:.0f} s")
    for split in ("train", "test"):
        right, total = correct(model, split)
        print(f"{split}: {right} of {total}, {100 * right / total:.2f} %")


if __name__ == "__main__":
    main()
