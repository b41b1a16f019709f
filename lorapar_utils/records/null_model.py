"""A model without two systems: what a partition looks like when nothing tells them apart element by element.

The score is `|g phi|` (without the small Fisher term). Both systems share phi, drawn from the initialisation, and draw
their gradients independently. Matrices keep the mean scores of a record. How many elements theta then selects, and how
far the two sets overlap, follows from the form of the score alone.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lorapar_utils.records.record import Record

# Distribution of the gradients of an element over examples -> how it is drawn.
GRADIENTS = {
    "Laplace": lambda draw, count: draw.laplace(size=count),
    "Student, 3 degrees of freedom": lambda draw, count: draw.standard_t(3, size=count),
    "normal": lambda draw, count: draw.standard_normal(count),
}
THETAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
DRAWN = 400_000  # elements; shares then vary by a tenth of a percent between draws


def without_systems(record: Record, thetas: Sequence[float] = THETAS, seed: int = 0) -> pd.DataFrame:
    """Selected share and Jaccard index by gradients' distribution and theta, without any structure of two systems.

    Parameters
    ----------
    record
        An importance record; its table `map` gives each matrix' size and mean score.

    Returns
    -------
    DataFrame
        Columns `gradients` (a key of `GRADIENTS`), `theta`, `active` (share of elements that a system selects, the mean
        of both), `jaccard`.
    """
    matrices = pd.DataFrame(record.result["tables"]["map"])
    counts = np.maximum(1, np.rint(matrices["elements"] * min(1.0, DRAWN / matrices["elements"].sum()))).astype(int)
    rows = []
    for name, draw_gradients in GRADIENTS.items():
        draw = np.random.default_rng(seed)
        phi = np.abs(draw.standard_normal(counts.sum()))
        systems = []
        for system in ("system1", "system2"):
            product = np.abs(draw_gradients(draw, counts.sum())) * phi
            systems.append(_ranked(product / product.mean() * np.repeat(matrices[system].to_numpy(), counts)))
        for theta in thetas:
            # The highest scores whose sum reaches theta of the total.
            first, second = (ranks <= np.searchsorted(held, theta * held[-1]) for ranks, held in systems)
            jaccard = (first & second).sum() / (first | second).sum()
            rows.append(
                {"gradients": name, "theta": theta, "active": (first.mean() + second.mean()) / 2, "jaccard": jaccard}
            )
    return pd.DataFrame(rows)


def _ranked(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each score among all, from the highest, and the sums of the highest scores."""
    order = np.argsort(-scores)
    ranks = np.empty(len(scores), dtype=int)
    ranks[order] = np.arange(len(scores))
    return ranks, np.cumsum(scores[order])
