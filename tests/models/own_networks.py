"""Networks as a user writes them, in a file of their own: model.factory=own_networks:densenet.

The first two have the layers of the trained weights that the test data hold; the others cannot be pruned, each for a
reason of its own.
"""

import torch
from torch import nn


class DenseLayer(nn.Module):
    def __init__(self, channels, growth=16, bottleneck=32):
        super().__init__()
        self.net = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, bottleneck, 1, bias=False),
            nn.BatchNorm2d(bottleneck), nn.ReLU(), nn.Conv2d(bottleneck, growth, 3, padding=1, bias=False),
        )  # fmt: skip

    def forward(self, x):
        return torch.cat([self.net(x), x], dim=1)


class DenseBlock(nn.Module):
    def __init__(self, channels, layers, growth):
        super().__init__()
        self.block = nn.Sequential(*(DenseLayer(channels + i * growth, growth) for i in range(layers)))

    def forward(self, x):
        return self.block(x)


class Transition(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.transition = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)
        )

    def forward(self, x):
        return self.transition(x)


class DenseNet(nn.Module):
    def __init__(self, layers=(6, 6, 6, 6), growth=16, classes=10):
        super().__init__()
        channels = 2 * growth
        self.input_net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        blocks = []
        for number, count in enumerate(layers):
            blocks.append(DenseBlock(channels, count, growth))
            channels += count * growth
            if number < len(layers) - 1:
                blocks.append(Transition(channels))
                channels //= 2
        self.blocks = nn.Sequential(*blocks)
        self.output_net = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)
        )

    def forward(self, x):
        return self.output_net(self.blocks(self.input_net(x)))


class ResBlock(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(channels, out, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.downsample = nn.Conv2d(channels, out, 1, stride=stride) if stride > 1 else None

    def forward(self, x):
        shortcut = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.net(x) + shortcut)


class ResNet(nn.Module):
    def __init__(self, widths=(16, 32, 64), blocks=3, classes=10):
        super().__init__()
        self.input_net = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        made, before = [], widths[0]
        for stage, width in enumerate(widths):
            for number in range(blocks):
                made.append(ResBlock(before, width, 2 if stage and not number else 1))
                before = width
        self.blocks = nn.Sequential(*made)
        self.output_net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))

    def forward(self, x):
        return self.output_net(self.blocks(self.input_net(x)))


def densenet(layers=(6, 6, 6, 6), growth=16, classes=10):
    return DenseNet(layers, growth, classes)


def resnet(widths=(16, 32, 64), blocks=3):
    return ResNet(widths, blocks)


# What cannot be pruned as it is.


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def features(self, x):
        return torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class TakesMask(Small):
    def forward(self, x, mask):
        return super().forward(x * mask)


class GivesPair(Small):
    def forward(self, x):
        return super().forward(x), None


class SkipsBright(Small):
    def forward(self, x):
        if x.mean() > 0.01:
            x = torch.tanh(x)
        return super().forward(x)


class PicksLayer(Small):
    def forward(self, x):
        count = int((x.flatten(1).sum(1) > 0).sum())
        for _ in range(count):
            x = x * 0.5
        return super().forward(x)


class ChecksInput(Small):
    def forward(self, x):
        if torch.isnan(x).any():
            raise ValueError("NaN in the image")
        return super().forward(x)


class Tied(Small):
    def __init__(self):
        super().__init__()
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.third.weight = self.second.weight

    def features(self, x):
        return torch.relu(self.third(torch.relu(self.second(torch.relu(self.first(x)))))).mean((2, 3))


class MixesChannels(Small):
    def features(self, x):
        maps = torch.relu(self.second(torch.relu(self.first(x))))
        return (maps - maps.mean(1, keepdim=True)).square().mean((2, 3))


class Large(Small):
    def __init__(self):
        super().__init__()
        self.valid = nn.Conv2d(3, 3, 11)

    def forward(self, x):
        return super().forward(self.valid(x))


def raises():
    raise RuntimeError("no weights here")


def gives_nothing():
    return {"model": Small()}


_kept = Small()


def always_the_same():
    return _kept


number = 3
