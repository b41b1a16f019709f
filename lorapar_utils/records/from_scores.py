"""Importance scores as records, for figures, tables and the explorer."""

from collections.abc import Sequence

import pandas as pd
import torch

from lorapar_utils.partition import Partition, build_partition
from lorapar_utils.records import Record, new_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import Settings

SCATTER_POINTS = 1500


def importance_record(
    scores: Sequence[dict[str, torch.Tensor]],
    partition: Partition,
    settings: Settings,
    origin: dict | None = None,
    explored: dict | None = None,
) -> Record:
    """The layer x module map, the regions, and a sample of the paper's scatter.

    `explored` are settings that differ from the profile's. The record's name and command have them.

    Metrics: `active/…`, `selected/…`, `region/…`, `jaccard`, `jaccard_chance` (expected of two random sets of these
    sizes). Tables: `map` (mean score by layer, module and matrix, scaled to mean 1 per system, and region shares),
    `scatter`, `explorer` (counts of elements by theta, layer and module, as one list per column).
    """
    flat = [torch.cat([values.flatten() for values in one.values()]).double() for one in scores]
    total = flat[0].numel()
    share1, share2 = (float(mask.double().mean()) for mask in partition.selected)
    expected = share1 * share2 / (share1 + share2 - share1 * share2)
    metrics = {f"active/{key}": Metric(share, total) for key, share in partition.active_share.items()}
    metrics |= {f"region/{key}": Metric(float(m.double().mean()), total) for key, m in partition.regions().items()}
    metrics |= {
        "jaccard": Metric(partition.jaccard, total),
        "jaccard_chance": Metric(expected, total),
        "selected/system1": Metric(share1, total),
        "selected/system2": Metric(share2, total),
    }
    table = partition.summary()
    for system, (one, everything) in enumerate(zip(scores, flat, strict=True), start=1):
        table[f"system{system}"] = [float(v.double().mean() / everything.mean()) for v in one.values()]
    tables = {
        "map": table.round(6).to_dict("records"),
        "scatter": _scatter(flat, partition),
        "explorer": _explorer(scores),
    }
    explored = explored or {}
    return new_record(
        "-".join(["importance", *(f"{key}_{value}" for key, value in explored.items())]),
        settings,
        metrics=metrics,
        tables=tables,
        parameters=explored,
        notebook=" ".join(["02_importance.ipynb out.ipynb", *(f"-p {key} {value}" for key, value in explored.items())]),
        origin=origin,
    )


def stability_record(rows: Sequence[dict], settings: Settings, origin: dict | None = None) -> Record:
    """How far importance depends on examples and initial weights, from the rows of `pipeline.scores.stability`.

    Metrics are means over the draws at the most examples: `examples/rank_correlation/system1`, `adapter/…`.
    """
    frame = pd.DataFrame(rows)
    metrics = {}
    for (differ, system), points in frame.groupby(["differ", "system"]):
        most = points[points["n"] == points["n"].max()]
        for key in ("rank_correlation", "by_matrix", "jaccard"):
            metrics[f"{differ}/{key}/system{system}"] = Metric(float(most[key].mean()), len(most))
    tables = {"stability": list(rows)}
    return new_record(
        "stability", settings, metrics=metrics, tables=tables, notebook="02_importance.ipynb out.ipynb", origin=origin
    )


# The values of theta, and of alpha and beta, that the theta explorer offers.
EXPLORED_THETA = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
EXPLORED_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _explorer(scores: Sequence[dict[str, torch.Tensor]]) -> dict[str, list]:
    """Elements of each layer and module: in each region by theta, and active in each stage by alpha or beta.

    Columns `stage1_0` … `stage1_4` count stage 1 at the alphas `EXPLORED_SHARES`; `stage2_0` … likewise for beta.
    """
    frames = []
    for theta in EXPLORED_THETA:
        counts = []
        for i, share in enumerate(EXPLORED_SHARES):
            table = build_partition(*scores, theta=theta, alpha=share, beta=share).summary()
            columns = {f"stage{k}": f"stage{k}_{i}" for k in (1, 2)}
            if i == 0:
                columns |= {region: region for region in ("system1_only", "system2_only", "shared")}
            counts.append(table[list(columns)].mul(table["elements"], axis=0).rename(columns=columns))
        table = pd.concat([table[["layer", "module", "elements"]], *counts], axis=1)
        summed = table.groupby(["layer", "module"], sort=False).sum().round().astype(int).reset_index()
        frames.append(summed.assign(theta=theta))
    return pd.concat(frames).to_dict("list")


def _scatter(flat: list[torch.Tensor], partition: Partition) -> list[dict]:
    sample = torch.randperm(flat[0].numel(), generator=torch.Generator().manual_seed(0))[:SCATTER_POINTS]
    normalised = [values / values.norm() for values in flat]
    regions = partition.regions()
    names = list(regions)
    which = torch.stack([regions[name][sample] for name in names]).int().argmax(0)
    return [
        {"system1": float(f"{normalised[0][i]:.3g}"), "system2": float(f"{normalised[1][i]:.3g}"), "region": names[w]}
        for i, w in zip(sample.tolist(), which.tolist(), strict=True)
    ]
