"""Small random networks that hold every way in which channels are coupled, and the named ones at a small input."""

import torch
import torchvision
from torch import Tensor, nn

from modhifi_cli.models import cifar_resnet


class Projected(nn.Module):
    """Two residual blocks, the second with a strided projection shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 6, 3, padding=1)
        self.inner_norm = nn.BatchNorm2d(6)
        self.outer = nn.Conv2d(6, 8, 1)
        self.project = nn.Conv2d(8, 12, 1, stride=2)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = torch.relu(self.norm(self.stem(images)))
        stream = torch.relu(stream + self.outer(torch.relu(self.inner_norm(self.inner(stream)))))
        stream = torch.relu(self.project(stream) + self.down(stream))
        return self.head(stream.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution between pointwise ones, as in ResNeXt and MobileNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 10, 1), nn.ReLU(),
            nn.Conv2d(10, 10, 3, padding=1, groups=10), nn.ReLU(),
            nn.Conv2d(10, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class Concatenated(nn.Module):
    """A dense block: later layers read the concatenation of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3, padding=1)
        self.joined_norm = nn.BatchNorm2d(10)
        self.third = nn.Conv2d(10, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        one = self.first(images)
        joined = torch.cat([self.second(torch.relu(self.norm(one))), one], 1)
        return self.head(torch.relu(self.third(torch.relu(self.joined_norm(joined)))).mean((2, 3)))


class Flattened(nn.Module):
    """A linear layer behind a flatten: one component is all positions of one channel, as in VGG."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 7)
        self.head = nn.Linear(7, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = nn.functional.adaptive_avg_pool2d(torch.relu(self.norm(self.conv(images))), 4)
        return self.head(torch.relu(self.hidden(maps.flatten(1))))


class Mixing(nn.Module):
    """Code that counts channels: what flows where does not show it, only the law can."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.first(torch.relu(self.good(images))))
        return self.head(self.second(maps / maps.shape[1]).mean((2, 3)))


class Shuffled(nn.Module):
    """Two units as in ShuffleNet: a half of the channels goes through a branch, then all are shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.units = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 6, 1),
            )
            for _ in range(2)
        )  # fmt: skip
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        for unit in self.units:
            one, two = maps.chunk(2, 1)
            maps = torch.cat([one, unit(two)], 1)
            batch, channels, height, width = maps.shape
            maps = maps.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(maps.shape)
        return self.head(maps.mean((2, 3)))


class Excited(nn.Module):
    """Squeeze and excitation in a block whose norm is a GroupNorm, and a learnt scale behind the block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(8, 12, 1), nn.GroupNorm(4, 12)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.outer = nn.Conv2d(12, 8, 1)
        self.scale = nn.Parameter(torch.ones(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        stream = self.stem(images)
        maps = torch.relu(self.norm(self.inner(stream)))
        maps = maps * torch.sigmoid(self.excite(torch.relu(self.squeeze(maps.mean((2, 3), keepdim=True)))))
        return self.head((stream + self.scale * self.outer(maps)).mean((2, 3)))


class Parted(nn.Module):
    """A producer whose first four channels go one way and whose others go another, each with its own reader."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first, self.second = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        joined = torch.cat([self.first(maps), self.second(maps)], 1)
        left, right = joined.split([4, 6], 1)
        return self.head((self.left(left) + self.right(right)).mean((2, 3)))


class MeanTaken(nn.Module):
    """A mean over channels between layers that could be pruned."""

    def __init__(self) -> None:
        super().__init__()
        self.good = nn.Conv2d(3, 6, 3, padding=1)
        self.first, self.second = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        maps = torch.relu(self.first(torch.relu(self.good(images))))
        return self.head(self.second(maps - maps.mean(1, keepdim=True)).mean((2, 3)))


class Repeated(nn.Module):
    """One MLP for the tokens of two scales, and a depthwise convolution inside it that both use, too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.fc1, self.near, self.fc2 = nn.Linear(8, 24), nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Linear(24, 8)
        self.last, self.head = nn.Linear(16, 20), nn.Linear(20, 5)

    def mlp(self, tokens: Tensor) -> Tensor:
        hidden = self.fc1(tokens).permute(0, 3, 1, 2)
        return tokens + self.fc2(torch.relu(self.near(hidden)).permute(0, 2, 3, 1))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.stem(images)
        scales = (maps, nn.functional.avg_pool2d(maps, 2))
        means = [self.mlp(scale.permute(0, 2, 3, 1)).mean((1, 2)) for scale in scales]
        return self.head(torch.relu(self.last(torch.cat(means, 1))))


SMALL = {
    "projected": Projected,
    "grouped": Grouped,
    "concatenated": Concatenated,
    "flattened": Flattened,
    "repeated": Repeated,
    "option_a": lambda: cifar_resnet.build(depth=8, widths=(4, 8, 12)),
}


def small(name: str) -> tuple[nn.Module, Tensor]:
    """A small network with seeded random weights in evaluation mode, and two 16 × 16 images for it."""
    torch.manual_seed(0)
    return SMALL[name]().eval(), torch.randn(2, 3, 16, 16)


NAMED = ("resnet18", "resnet34", "resnet50", "resnet101", "vgg11_bn", "vgg16_bn", "vgg19_bn", "resnext50_32x4d",
         "mobilenet_v2", "densenet121", "efficientnet_b0")  # fmt: skip


def named(name: str) -> tuple[nn.Module, Tensor]:
    """A torchvision network with random weights, and two images small enough for a test.

    A VGG's classifier is replaced by a narrow one of the same form: its 120 million weights would only cost time.
    """
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    if name.startswith("vgg"):
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier = nn.Sequential(nn.Linear(512 * 4, 16), nn.ReLU(), nn.Linear(16, 5)).eval()
    return model, torch.randn(2, 3, 32, 32)


class Between(nn.Module):
    """A convolution, `inner` on its output, and a classifier behind another convolution, ``[2, 3, 6, 6]`` images."""

    def __init__(self, inner: nn.Module, width: int = 8, reads: int = 8) -> None:
        super().__init__()
        self.first, self.inner = nn.Conv2d(3, width, 1), inner
        self.second, self.head = nn.Conv2d(reads, 6, 1), nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.inner(self.first(images))).mean((2, 3)))


class ConvHeads(nn.Module):
    """Attention written with convolutions: heads of four features, mixed by a map between them, with biases."""

    def __init__(self, heads: int = 4, between: bool = True) -> None:
        super().__init__()
        self.num_heads = heads
        self.q, self.k, self.v = (nn.Conv2d(8, 4 * heads, 1) for _ in range(3))
        self.norm = nn.BatchNorm2d(4 * heads)
        self.local = nn.Conv2d(4 * heads, 4 * heads, 3, padding=1, groups=4 * heads)
        self.between = nn.Conv2d(heads, heads, 1) if between else nn.Identity()
        self.temperature = nn.Parameter(torch.rand(heads, 1, 1))
        self.biases = nn.Parameter(torch.rand(heads, 36))
        self.proj = nn.Sequential(nn.ReLU(), nn.Conv2d(4 * heads, 8, 1))

    def forward(self, maps: Tensor) -> Tensor:
        batch, _, height, width = maps.shape
        query, key = (layer(maps).reshape(batch, self.num_heads, -1, height * width) for layer in (self.q, self.k))
        value = self.norm(self.v(maps))
        scores = nn.functional.normalize(query, dim=2).transpose(2, 3) @ key * self.temperature
        scores = self.between(scores + self.biases[:, torch.arange(36)][:, None]).softmax(-1)
        mixed = scores @ value.reshape(batch, self.num_heads, -1, height * width).transpose(2, 3)
        mixed = mixed.transpose(2, 3).reshape(batch, -1, height, width) + self.local(value)
        return self.proj(mixed)


class LinearHeads(nn.Module):
    """Linear attention whose number of heads follows, with a column of ones beside the values, in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Conv2d(8, 3 * 16, 1), nn.Conv2d(16, 8, 1)

    def forward(self, maps: Tensor) -> Tensor:
        batch, _, height, width = maps.shape
        rows = self.qkv(maps).reshape(batch, -1, 12, height * width).transpose(2, 3)
        query, key, value = (part.float() for part in rows.chunk(3, dim=-1))
        value = nn.functional.pad(value, (0, 1), value=1.0)
        mixed = query.relu() @ (key.relu().transpose(2, 3) @ value)
        mixed = (mixed[..., :-1] / (mixed[..., -1:] + 1e-3)).to(maps.dtype)
        return self.out(mixed.transpose(2, 3).reshape(batch, -1, height, width))


class Portioned(nn.Module):
    """Splits channels into sizes that it holds: a tuple of them, and integers one of which is a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.dim, self.part = (10, 4, 3), 17, 6
        self.wide, self.mixed = nn.Conv2d(8, 17, 1), nn.Conv2d(17, 8, 1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, maps: Tensor) -> Tensor:
        same, deep, few = torch.split(self.wide(maps), self.sizes, dim=1)
        joined = torch.cat([same, self.deep(deep), few], 1)
        left, right = joined.split([self.part, self.dim - self.part], dim=1)
        return self.mixed(torch.cat([right, left.relu()], 1)[:, : self.dim])


class Scaled(nn.Module):
    """A layer scale and a bias that are bare tensors across the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.layer = nn.Parameter(torch.rand(8)), nn.Conv2d(8, 8, 1)
        self.register_buffer("offset", torch.rand(8, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.gamma.view(1, -1, 1, 1) * self.layer(maps) - self.offset


class Recounted(nn.Module):
    """Sums two halves of its channels, which a view parts, as split attention does."""

    def forward(self, maps: Tensor) -> Tensor:
        halves = maps.reshape(maps.shape[0], 2, -1, *maps.shape[2:])
        return (halves * halves.mean((3, 4), keepdim=True).softmax(1)).sum(1)


class Radix(nn.Module):
    """A convolution in two groups whose outputs are summed over the groups: no group of them can go."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)

    def forward(self, maps: Tensor) -> Tensor:
        return self.grouped(maps).reshape(maps.shape[0], 2, -1, *maps.shape[2:]).relu().sum(1)


class Tokens(nn.Module):
    """Convolutions of one tap over the positions in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv1d(8, 12, 1), nn.Conv1d(12, 8, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.narrow(self.wide(maps.flatten(2)).relu()).unflatten(2, maps.shape[2:])


class Upsampled(nn.Module):
    """A transposed convolution between two that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(8, 10, 3, stride=2, padding=1)
        self.up, self.norm = nn.ConvTranspose2d(10, 12, 4, stride=2, padding=1), nn.BatchNorm2d(12)
        self.again = nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        return self.again(self.norm(self.up(self.down(maps).relu())).relu())
