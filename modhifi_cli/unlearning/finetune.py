"""Training on retain samples after the edit: off unless asked for, since it needs gradients and labels."""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modhifi_cli.errors import ConfigError, NumericsError, is_number, need_whole
from modhifi_cli.records import Edit, ImageSource, ModuleEdit, Progress
from modhifi_cli.unlearning.method import Samples, saved


@dataclass(frozen=True)
class Finetune:
    """How to train.

    Attributes:
        epochs: Walks over the retain samples; 0 is off.
        lr: Learning rate of SGD with momentum 0.9.
    """

    epochs: int = 0
    lr: float = 1e-3

    def __post_init__(self) -> None:
        need_whole("finetune.epochs", self.epochs, 0, " (off)")
        if not is_number(self.lr) or not 0 < self.lr < float("inf"):
            raise ConfigError(f"finetune.lr must be a number above 0; got {self.lr!r}.")


def finetune_(
    model: nn.Module,
    calibration: ImageSource,
    samples: Samples,
    finetune: Finetune,
    batch_size: int,
    device: torch.device,
    seed: int,
) -> Generator[Progress, None, Edit]:
    """Train all weights on the retain samples; BatchNorm statistics stay. Returns the edit.

    Args:
        model: The edited network, in place.
        calibration: The images; forget samples are left out.
        samples: What is known of them.
        finetune: How.
        batch_size: Images a step.
        device: Where it runs.
        seed: Of the order of the images.
    """
    retain = (~samples.forget).nonzero().flatten()
    images = torch.cat([inputs for inputs, _ in calibration.batches(batch_size)])[retain]
    labels = samples.labels[retain]
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.SGD(model.parameters(), lr=finetune.lr, momentum=0.9)
    steps = -(-len(images) // batch_size)
    with torch.enable_grad():
        for epoch in range(finetune.epochs):
            for step, part in enumerate(torch.randperm(len(images), generator=generator).split(batch_size)):
                logits = model(images[part].to(device))
                loss = torch.nn.functional.cross_entropy(logits, labels[part].to(device))
                if not bool(torch.isfinite(loss)):
                    raise NumericsError(f"finetune: the loss is {float(loss.detach())}; lower finetune.lr ({finetune.lr:g}).")
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                yield Progress("finetune", f"epoch {epoch + 1}", epoch * steps + step + 1, finetune.epochs * steps)
    optimiser.zero_grad(set_to_none=True)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, parameter in model.named_parameters():
        module, _, own = name.rpartition(".")
        modules.setdefault(module, {})[own] = saved(parameter)
    empty = torch.arange(0)
    parts = tuple(ModuleEdit(module, tensors=tensors) for module, tensors in modules.items())
    return Edit("finetune", 0, parts, empty, empty, {"epochs": finetune.epochs, "lr": finetune.lr})
