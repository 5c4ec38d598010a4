"""What a forward pass takes at widths that no network has yet: a table of measured layer times, read by interpolation.

    time = fixed + scale × Σ layers' own times + per_element × Σ layers' output elements

The layers' own times were measured one by one on a grid of (input width, output width). The other three numbers were
fitted to whole networks narrowed in different ways: a network is not the sum of its layers (activations and sums lie
between them, a graphics card overlaps them). For the dense widths the time is the measured one by construction.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from modhifi_cli.errors import DataError

_RAMP = 0.01  # share of a straight line in every layer's times, so that each removed channel is worth something


@dataclass(frozen=True)
class LayerTimes:
    """Milliseconds of one kind of layer over its widths.

    Attributes:
        inputs: Input widths that were measured, rising; ``(1,)`` where inputs go with outputs.
        outputs: Output widths that were measured, rising.
        milliseconds: ``[inputs][outputs]``, never falling along either axis, ms for the table's batch.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    milliseconds: tuple[tuple[float, ...], ...]

    @classmethod
    def smoothed(cls, inputs: tuple[int, ...], outputs: tuple[int, ...], measured: np.ndarray) -> "LayerTimes":
        """From raw times ``[inputs, outputs]`` in ms: noise that would make a wider layer faster is averaged away."""
        level = monotone(measured)
        product = np.outer(inputs, outputs) / (inputs[-1] * outputs[-1])
        level = (1 - _RAMP) * level + _RAMP * level[-1, -1] * product
        return cls(inputs, outputs, tuple(tuple(float(value) for value in row) for row in level))

    def at(self, inputs: int, outputs: int) -> float:
        """Bilinear between the four measured neighbours; outside the grid the value at its edge."""
        low, share = _place(self.inputs, inputs)
        left, part = _place(self.outputs, outputs)
        high, right = min(low + 1, len(self.inputs) - 1), min(left + 1, len(self.outputs) - 1)
        near = (1 - part) * self.milliseconds[low][left] + part * self.milliseconds[low][right]
        far = (1 - part) * self.milliseconds[high][left] + part * self.milliseconds[high][right]
        return (1 - share) * near + share * far


@dataclass(frozen=True)
class LatencyTable:
    """Times of one network's layers on one device, and how they add up.

    Attributes:
        network: SHA-256 of the layers' shapes and of what may be narrowed: a table fits networks with the same one.
        layers: Layer name → kind; layers of one kind have the same sizes, so they were measured once.
        kinds: Kind → its times.
        dense_widths: Layer name → (inputs, outputs) of the dense network.
        positions: Layer name → output elements per output channel, for the whole batch.
        fixed_ms: What no width changes, ms.
        scale: A layer's time inside the network by its time alone.
        per_element_ms: What one output element costs between the layers (activations, sums), ms.
        dense_ms: Median time of the dense network, ms.
        aims: What was asked (share and allocation) → the share to ask of this table, and how much more than the table
            says a network of those widths saves, both as narrowed networks timed before the cut showed.
        protocol: How it was measured: batch, device, threads, rounds, spread, what the fit leaves over.
    """

    network: str
    layers: Mapping[str, str]
    kinds: Mapping[str, LayerTimes]
    dense_widths: Mapping[str, tuple[int, int]]
    positions: Mapping[str, float]
    fixed_ms: float
    scale: float
    per_element_ms: float
    dense_ms: float
    aims: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    protocol: Mapping[str, Any] = field(default_factory=dict)

    def layers_ms(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """The layers' own times, summed, ms; `widths` as in `milliseconds`."""
        dense = self.dense_widths
        return sum(self.kinds[kind].at(*widths.get(name, dense[name])) for name, kind in self.layers.items())

    def elements(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Output elements of all layers for the whole batch; `widths` as in `milliseconds`."""
        return sum(self.positions[name] * widths.get(name, dense)[1] for name, dense in self.dense_widths.items())

    def milliseconds(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Time of one forward pass of the table's batch, ms.

        Args:
            widths: Layer name → (inputs, outputs); layers that are left out have their dense widths.
        """
        return self.fixed_ms + self.scale * self.layers_ms(widths) + self.per_element_ms * self.elements(widths)

    def removed_share(self, widths: Mapping[str, tuple[int, int]]) -> float:
        """Share of the dense network's time that the widths save; `widths` as in `milliseconds`."""
        return 1.0 - self.milliseconds(widths) / self.dense_ms

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        return {
            "network": self.network,
            "dense_ms": self.dense_ms,
            "fixed_ms": self.fixed_ms,
            "scale": self.scale,
            "per_element_ms": self.per_element_ms,
            "protocol": dict(self.protocol),
            "aims": {asked: list(found) for asked, found in self.aims.items()},
            "layers": {
                name: {"kind": kind, "widths": list(self.dense_widths[name]), "positions": self.positions[name]}
                for name, kind in self.layers.items()
            },
            "kinds": {
                kind: {"inputs": t.inputs, "outputs": t.outputs, "milliseconds": t.milliseconds}
                for kind, t in self.kinds.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], place: str) -> "LatencyTable":
        """The table that `to_json` wrote.

        Args:
            content: The JSON object.
            place: File name, for messages.

        Raises:
            DataError: If something is missing or of the wrong type.
        """
        try:
            table = cls(
                network=str(content["network"]),
                layers={name: str(layer["kind"]) for name, layer in content["layers"].items()},
                kinds={
                    kind: LayerTimes(
                        tuple(int(value) for value in times["inputs"]),
                        tuple(int(value) for value in times["outputs"]),
                        tuple(tuple(float(value) for value in row) for row in times["milliseconds"]),
                    )
                    for kind, times in content["kinds"].items()
                },
                dense_widths={
                    name: (int(layer["widths"][0]), int(layer["widths"][1]))
                    for name, layer in content["layers"].items()
                },
                positions={name: float(layer["positions"]) for name, layer in content["layers"].items()},
                fixed_ms=float(content["fixed_ms"]),
                scale=float(content["scale"]),
                per_element_ms=float(content["per_element_ms"]),
                dense_ms=float(content["dense_ms"]),
                aims={str(asked): (float(found[0]), float(found[1])) for asked, found in content["aims"].items()},
                protocol=dict(content["protocol"]),
            )
            table.milliseconds({})
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(
                f"{place}: not a latency table ({type(error).__name__}: {error}); give the latency_table.json of a run "
                "with target=latency, or leave target.table out to measure one."
            ) from error
        return table


def monotone(values: np.ndarray) -> np.ndarray:
    """The nearest array, about, that never falls along either axis: pooled averages along rows and columns in turn.

    Args:
        values: ``[rows, columns]`` float.

    Returns:
        As `values`; equal to it where it never falls already.
    """
    from sklearn.isotonic import isotonic_regression

    level = np.array(values, dtype=np.float64)
    for _ in range(20):
        level = np.apply_along_axis(isotonic_regression, 1, level)
        level = np.apply_along_axis(isotonic_regression, 0, level)
    return np.maximum.accumulate(np.maximum.accumulate(level, axis=0), axis=1)


def _place(knots: tuple[int, ...], value: int) -> tuple[int, float]:
    """Index of the knot at or in front of the value, and how far behind it the value lies (0 … 1)."""
    index = min(max(bisect.bisect_right(knots, value) - 1, 0), max(len(knots) - 2, 0))
    if len(knots) == 1:
        return 0, 0.0
    share = (value - knots[index]) / (knots[index + 1] - knots[index])
    return index, min(max(share, 0.0), 1.0)
