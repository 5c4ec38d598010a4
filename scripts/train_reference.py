r"""Trains a CIFAR ResNet from scratch, with or without some classes: the retrained reference of an audit.

    python scripts/train_reference.py train.npz with_all.safetensors --test test.npz
    python scripts/train_reference.py train.npz without_3.safetensors --without 3 --test test.npz
    modhifi unlearn model=resnet20_cifar model.weights=with_all.safetensors forget_class=3 \\
                    audit.reference=without_3.safetensors ...

A reference is honest only beside a network that learnt by the same recipe from the same images, so train both with this
script and unlearn the first. It keeps all logits; those of absent classes are never a label. The run is seeded and
gives the same bytes again with the same number of threads on the same build of torch. The recipe was fixed beforehand;
the test images are looked at once, at the end, to print their accuracy.
"""

import argparse
import math
import time
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modhifi_cli.data import arrays
from modhifi_cli.models import cifar_resnet
from modhifi_cli.models.weights import seeded_initialisation
from modhifi_cli.records import ImageSource

BATCH_SIZE = 64
LEARNING_RATE = 0.1
WEIGHT_DECAY = 5e-4
WARM_UP = 0.1  # of all steps
SHIFT = 4  # pixels


def train(
    inputs: Tensor, labels: Tensor, *, depth: int = 20, classes: int = 10, epochs: int = 24, seed: int = 0
) -> nn.Module:
    """The trained network in evaluation mode: SGD with momentum, warm-up and one cosine, shifted and mirrored images.

    Args:
        inputs: Normalised training images, ``[images, 3, 32, 32]`` float32.
        labels: ``[images]`` int64 in 0 … classes − 1.
        depth: Of the CIFAR ResNet, 6n + 2.
        classes: Number of logits.
        epochs: Walks over the images.
        seed: Of the initial weights, the order of the images and their augmentation.
    """
    generator = torch.Generator().manual_seed(seed)
    with seeded_initialisation(seed):
        model = cifar_resnet.build(depth=depth, num_classes=classes).train()
    model = model.to(memory_format=torch.channels_last)  # a third faster on a CPU
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = len(inputs) // BATCH_SIZE  # the odd ones out change from epoch to epoch with the order
    started = time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(inputs), generator=generator)
        total = 0.0
        for step in range(steps):
            done = (epoch + step / steps) / epochs
            optimiser.param_groups[0]["lr"] = (
                LEARNING_RATE * min(1, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
            )
            batch = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            images = augment(inputs[batch], generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(images), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / steps:.3f}, {time.monotonic() - started:.0f} s", flush=True)
    return model.to(memory_format=torch.contiguous_format).eval()


def augment(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted by up to four pixels (the border is the mean colour) and mirrored in half of the cases, each on its own.

    Args:
        inputs: ``[batch, channels, height, width]``, normalised.
        generator: Where the draws come from.
    """
    count, channels, height, width = inputs.shape
    down, right = torch.randint(0, 2 * SHIFT + 1, (2, count, 1), generator=generator)
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(inputs, (SHIFT, SHIFT, SHIFT, SHIFT))
    image = torch.arange(count)[:, None, None, None]
    channel = torch.arange(channels)[None, :, None, None]
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


@torch.inference_mode()
def accuracies(model: nn.Module, source: ImageSource, without: list[int]) -> str:
    """Accuracy on the classes that were learnt and on those that were not, for the log."""
    right: dict[bool, int] = {False: 0, True: 0}
    seen: dict[bool, int] = {False: 0, True: 0}
    for images, labels in source.batches(500):
        absent = torch.isin(labels, torch.tensor(without, dtype=torch.int64))
        hit = model(images).argmax(1) == labels
        for which in (False, True):
            right[which] += int(hit[absent == which].sum())
            seen[which] += int((absent == which).sum())
    names = {False: "learnt classes", True: "absent classes"}
    shares = [f"{names[w]} {100 * right[w] / seen[w]:.2f} % of {seen[w]}" for w in (False, True) if seen[w]]
    return ", ".join(shares)


def main() -> None:
    """Train, save, print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", help="array file with images and labels")
    parser.add_argument("weights", type=Path, help="safetensors file to write")
    parser.add_argument("--without", type=int, nargs="*", default=[], metavar="CLASS", help="classes to leave out")
    parser.add_argument("--test", help="array file whose accuracy is printed at the end")
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    source = arrays.load(path=asked.images, preprocess=cifar_resnet.PREPROCESS, labelled=True)
    inputs, labels = next(source.batches(len(source)))
    learnt = ~torch.isin(labels, torch.tensor(asked.without, dtype=torch.int64))
    started = time.monotonic()
    model = train(
        inputs[learnt], labels[learnt], depth=asked.depth, classes=asked.classes, epochs=asked.epochs, seed=asked.seed
    )
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, asked.weights)
    print(f"{asked.weights}: trained on {int(learnt.sum()):,} images in {time.monotonic() - started:.0f} s")
    print(f"training images: {accuracies(model, source, asked.without)}")
    if asked.test:
        test = arrays.load(path=asked.test, preprocess=cifar_resnet.PREPROCESS, labelled=True)
        print(f"test images: {accuracies(model, test, asked.without)}")


if __name__ == "__main__":
    main()
