"""Metrics with n and 95 % intervals, and paired comparisons."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy  # which imports scipy.stats, half a second, at its first use

from lorapar_utils.errors import InputError


class Metric(NamedTuple):
    """A measured value with the number of outcomes and a 95 % interval.

    Parameters
    ----------
    value
        A share in [0, 1], a difference of two shares, or another number.
    n
        Number of outcomes: test items, examples or elements.
    low, high
        Ends of the interval; None for a number without sampling error.
    p_value
        McNemar's exact p of a paired difference, or Student's of a mean over seeds.

    Examples
    --------
    >>> Metric(0.25, 1200, 0.2, 0.3).percent()
    '25.0 % [20.0, 30.0], n = 1,200'
    """

    value: float
    n: int
    low: float | None = None
    high: float | None = None
    p_value: float | None = None

    def percent(self) -> str:
        """`23.1 % [17.0, 30.2], n = 150`."""
        return f"{self.share()}{self._interval('.1f', 100)}, n = {self.n:,}"

    def share(self) -> str:
        """`23.1 %`, without interval and n."""
        return f"{100 * self.value:.1f} %"

    def number(self) -> str:
        """`0.27 [0.22, 0.32], n = 512`."""
        return f"{self.value:.2f}{self._interval('.2f')}, n = {self.n:,}"

    def points(self) -> str:
        """A difference of two shares, without n: `+8.0 points [+2.0, +14.0]`."""
        return f"{100 * self.value:+z.1f} points{self._interval('+z.1f', 100)}"

    def difference(self) -> str:
        """A difference of two shares: `+8.0 points [+2.0, +14.0], n = 150`."""
        return f"{self.points()}, n = {self.n:,}"

    def gap(self) -> str:
        """A difference of two shares in a table: `+8.0 [+2.0, +14.0], n = 150`."""
        return f"{100 * self.value:+z.1f}{self._interval('+z.1f', 100)}, n = {self.n:,}"

    def errors(self) -> tuple[float, float]:
        """Distances from the value to both ends of the interval, for error bars."""
        return self.value - self.low, self.high - self.value

    def as_json(self) -> dict:
        """The fields that are not None, for a record."""
        return {key: value for key, value in self._asdict().items() if value is not None}

    def _interval(self, form: str, unit: float = 1) -> str:
        return "" if self.low is None else f" [{unit * self.low:{form}}, {unit * self.high:{form}}]"


def proportion(outcomes: Sequence[bool | int]) -> Metric:
    """The share of True among `outcomes`, with n and a 95 % Wilson interval."""
    if not len(outcomes):
        raise InputError("outcomes: none to take a share of")
    n, hits = len(outcomes), int(np.sum(np.asarray(outcomes, dtype=bool)))
    interval = scipy.stats.binomtest(hits, n).proportion_ci(method="wilson")
    return Metric(hits / n, n, float(interval.low), float(interval.high))


def mean(values: Sequence[float]) -> Metric:
    """The mean of per-item values, with n and a 95 % bootstrap interval (percentile, fixed seed)."""
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise InputError("values: none to average")
    low, high = _interval(values)
    return Metric(float(values.mean()), int(values.size), low, high)


def share(values: Sequence[float]) -> Metric:
    """The mean of per-item shares of right answers over the seeds.

    If all shares are 0 or 1, it is a `proportion`, because a bootstrap over equal values would give an interval of no
    width. Otherwise it is a `mean`.
    """
    values = np.asarray(values, dtype=float)
    return proportion(values) if np.isin(values, (0.0, 1.0)).all() else mean(values)


def macro_average(outcomes: Sequence[tuple[str, bool]]) -> Metric:
    """The mean over groups of each group's share of True, from (group, outcome) pairs.

    n counts outcomes. The 95 % interval is from a bootstrap within the groups (percentile, fixed seed).
    """
    groups: dict[str, list[bool]] = {}
    for group, outcome in outcomes:
        groups.setdefault(group, []).append(outcome)
    if not groups:
        raise InputError("outcomes: none to take a share of")
    sizes = np.array([len(group) for group in groups.values()])
    shares = np.array([np.mean(group) for group in groups.values()])
    # The number of hits in a resample of 0/1 outcomes is binomial.
    means = (np.random.default_rng(0).binomial(sizes, shares, (2000, len(sizes))) / sizes).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Metric(float(shares.mean()), int(sizes.sum()), float(low), float(high))


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Metric:
    """Mean of `second - first` with n, 95 % bootstrap interval and McNemar's exact p.

    `first` and `second` hold 0/1 outcomes of the same items in the same order.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or not a.size:
        raise InputError(f"outcomes: {a.size} and {b.size} items cannot be paired; score both on the same items")
    low, high = _interval(b - a)
    # McNemar's exact test: of the items that changed, as many would have changed either way.
    gained, lost = int(np.sum(b > a)), int(np.sum(b < a))
    p_value = float(scipy.stats.binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    return Metric(float((b - a).mean()), int(a.size), low, high, p_value)


def resampled(statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 1000) -> Metric:
    """A statistic of `n` examples, with a 95 % bootstrap interval over examples (percentile, fixed seed).

    `statistic` takes the indices of the examples to use. Resamples with an undefined statistic (NaN) are left out.
    """
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return Metric(float(statistic(np.arange(n))), n, float(low), float(high))


def over_seeds(values: Sequence[float], margin: float = 0.0) -> Metric:
    """The mean of one value per seed, with Student's 95 % interval over seeds and the two-sided p against `margin`.

    Raises
    ------
    InputError
        Fewer than two seeds.
    """
    values = np.asarray(values, dtype=float)
    if values.size < 2:
        raise InputError(f"values: {values.size} seeds have no spread; give two at least")
    if np.ptp(values) == 0:
        return Metric(float(values[0]), values.size, float(values[0]), float(values[0]), float(values[0] == margin))
    test = scipy.stats.ttest_1samp(values, margin)
    low, high = test.confidence_interval(0.95)
    return Metric(float(values.mean()), values.size, float(low), float(high), float(test.pvalue))


def pass_at_k(successes: int, samples: int, k: int) -> float:
    """The unbiased estimate of pass@k from `successes` among `samples` (Chen et al., 2021)."""
    if not 0 < k <= samples:
        raise InputError(f"k = {k}: must lie in 1..{samples}, the number of samples")
    if samples - successes < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(samples - successes + 1, samples + 1)))


def _interval(values: np.ndarray) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    resamples = scipy.stats.bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0)
    return float(resamples.confidence_interval.low), float(resamples.confidence_interval.high)
