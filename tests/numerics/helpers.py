"""Small random consumers with correlated, off-centre inputs, together with the rows they came from."""

import torch

from modhifi_cli.numerics.moments import RowMoments
from modhifi_cli.records import Consumer


def make(*, outputs=4, components=6, per=1, rows=80, centred=True, seed=0, in_group=None, name="layer1.0.conv2"):
    """A consumer and its rows ``[rows, features]`` float64; fewer rows than features keep the samples form."""
    generator = torch.Generator().manual_seed(seed)
    features = components * per
    mixing = torch.randn(features, features, generator=generator) / features**0.5 + torch.eye(features)
    data = torch.randn(rows, features, generator=generator) @ mixing + torch.rand(features, generator=generator)
    weight = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    return of(data, weight, components, centred=centred, in_group=in_group, name=name), data.double()


def of(data, weight, components, *, centred=True, in_group=None, name="layer1.0.conv2"):
    """The consumer with these rows and this weight."""
    moments = RowMoments(data.shape[1], name=name)
    moments.update(data)
    return Consumer(
        name=name,
        weight=weight.double(),
        statistics=moments.result(),
        components=components,
        in_group=components if in_group is None else in_group,
        centred=centred,
    )
