"""Checks of settings that studies share, and short statistics over rows."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from modhifi_cli.errors import ConfigError, DataError, is_number
from modhifi_cli.studies.subject import Subject


def need_shares(place: str, shares: object) -> None:
    """Refuse anything but a list of shares between 0 and 1.

    Raises:
        ConfigError: If it is something else.
    """
    given = shares if isinstance(shares, Sequence) and not isinstance(shares, str) else [shares]
    if not given or not all(_number(share) and 0 < share < 1 for share in given):
        raise ConfigError(f"{place} must be shares above 0 and below 1, such as 0.22, got {shares!r}.")


def need_levels(place: str, levels: object) -> None:
    """Refuse anything but a list of numbers above 0.

    Raises:
        ConfigError: If it is something else.
    """
    if not isinstance(levels, Sequence) or not levels or not all(_number(level) and level > 0 for level in levels):
        raise ConfigError(f"{place} must be a list of numbers above 0, such as [0.01,0.05], got {levels!r}.")


def need_samples(study: str, subject: Subject, fewest: int) -> None:
    """Refuse fewer calibration samples than a statistic needs.

    Raises:
        DataError: If there are fewer.
    """
    if len(subject.calibration) < fewest:
        what, key = ("windows of text", "data.sequences") if subject.reads_text else ("images", "data.num_samples")
        raise DataError(f"{study}: scores need at least {fewest} {what}, got {len(subject.calibration)}; raise {key}.")


def mean(values: Iterable[float]) -> float:
    """Mean of what is finite; NaN of nothing."""
    finite = [value for value in values if math.isfinite(value)]
    return fmean(finite) if finite else math.nan


def deviation(values: Iterable[float]) -> float:
    """Standard deviation over n − 1; 0 of a single value."""
    finite = [value for value in values if math.isfinite(value)]
    return stdev(finite) if len(finite) > 1 else 0.0


def median(values: Iterable[float]) -> float:
    """Median of what is finite; NaN of nothing."""
    finite = sorted(value for value in values if math.isfinite(value))
    middle = len(finite) // 2
    return math.nan if not finite else finite[middle] if len(finite) % 2 else (finite[middle - 1] + finite[middle]) / 2


def _number(value: object) -> bool:
    return is_number(value) and math.isfinite(value)
