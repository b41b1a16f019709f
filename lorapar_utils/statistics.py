"""Intervals and paired comparisons: no score without n, no difference without its uncertainty."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import proportion_confint

from lorapar_utils.errors import InputError


def proportion(outcomes: Sequence[bool | int]) -> dict:
    """The share of True among `outcomes`, with n and its 95 % Wilson interval."""
    if not len(outcomes):
        raise InputError("outcomes: none to take a share of")
    n, hits = len(outcomes), int(np.sum(np.asarray(outcomes, dtype=bool)))
    low, high = proportion_confint(hits, n, method="wilson")
    return {"value": hits / n, "n": n, "low": float(low), "high": float(high)}


def mean(values: Sequence[float]) -> dict:
    """The mean of per-item values, with n and its 95 % bootstrap interval (percentile, fixed seed)."""
    values = np.asarray(values, dtype=float)
    if not values.size:
        raise InputError("values: none to average")
    low, high = _interval(values)
    return {"value": float(values.mean()), "n": int(values.size), "low": low, "high": high}


def share(values: Sequence[float]) -> dict:
    """The mean of items' shares of right answers, one for each item over its seeds.

    Where every item is all right or all wrong it is a `proportion`: resampling nothing but misses would give an
    interval without width. Else a `mean`.
    """
    values = np.asarray(values, dtype=float)
    return proportion(values) if np.isin(values, (0.0, 1.0)).all() else mean(values)


def macro_average(outcomes: Sequence[tuple[str, bool]]) -> dict:
    """The mean over groups of the share of True in each, of (group, outcome) pairs.

    n counts outcomes; the 95 % interval is a bootstrap's within the groups (percentile, fixed seed).
    """
    groups: dict[str, list[bool]] = {}
    for group, outcome in outcomes:
        groups.setdefault(group, []).append(outcome)
    if not groups:
        raise InputError("outcomes: none to take a share of")
    sizes = np.array([len(found) for found in groups.values()])
    shares = np.array([np.mean(found) for found in groups.values()])
    # Resampling 0/1 outcomes of one group draws a binomial number of hits.
    drawn = (np.random.default_rng(0).binomial(sizes, shares, (2000, len(sizes))) / sizes).mean(1)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {"value": float(shares.mean()), "n": int(sizes.sum()), "low": float(low), "high": float(high)}


def paired_difference(first: Sequence[float], second: Sequence[float]) -> dict:
    """Mean of `second - first` over the same items: n, 95 % bootstrap interval, McNemar's exact p.

    `first` and `second` hold 0/1 outcomes of the same items in the same order.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or not a.size:
        raise InputError(f"outcomes: {a.size} and {b.size} items cannot be paired; score both on the same items")
    table = [[int(np.sum((a == x) & (b == y))) for y in (1, 0)] for x in (1, 0)]
    low, high = _interval(b - a)
    p_value = float(mcnemar(table, exact=True).pvalue)
    return {"value": float((b - a).mean()), "n": int(a.size), "low": low, "high": high, "p_value": p_value}


def resampled(statistic: Callable[[np.ndarray], float], n: int, *, resamples: int = 1000) -> dict:
    """A statistic of `n` examples with its 95 % bootstrap interval over examples (percentile, fixed seed).

    `statistic` takes the indices of the examples to use. Resamples on which it is undefined (NaN) are left out.
    """
    generator = np.random.default_rng(0)
    drawn = [statistic(generator.integers(0, n, n)) for _ in range(resamples)]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return {"value": float(statistic(np.arange(n))), "n": n, "low": float(low), "high": float(high)}


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
    found = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return float(found.low), float(found.high)
