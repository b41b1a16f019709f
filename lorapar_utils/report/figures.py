"""Figures from records, in one style, without training and torch."""

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyBboxPatch

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, evidence, null_model, pooled, read_records, study
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import claims, tables

SYSTEM_COLOURS = {1: "#0072B2", 2: "#D55E00"}
MARKERS = "osD^vPX*"
REGION_COLOURS = {
    "system1_only": "#0072B2",
    "system2_only": "#D55E00",
    "shared": "#009E73",
    "inactive": "#BBBBBB",
}
REGION_LABELS = {
    "system1_only": "System 1 only",
    "system2_only": "System 2 only",
    "shared": "shared",
    "inactive": "inactive",
}
STAGES = {"base": "base model", "stage1": "after stage 1", "stage2": "after stage 2"}
# Scores of a pool: metric -> (label, the system with the colour).
SCORES = {"system1": ("System 1", 1), "system2": ("System 2", 2), "overlap": ("overlap with the reference", 1)}


def use_style() -> None:
    """Set the style of all figures (`lorapar.mplstyle`), after a reset of matplotlib's defaults."""
    plt.style.use(["default", Path(__file__).with_name("lorapar.mplstyle")])


def _of_each(width: float, height: float) -> Callable:
    """Make a drawing of one record into one of several: one under the other, each under the name of its profile."""

    def decorate(draw: Callable[[SubFigure, Record], None]) -> Callable[..., Figure]:
        @functools.wraps(draw)
        def drawn(*records: Record) -> Figure:
            figure = plt.figure(figsize=(width, height * len(records)), layout="constrained")
            for part, record in zip(figure.subfigures(len(records), squeeze=False).flat, records, strict=True):
                draw(part, record)
                if len(records) > 1:
                    part.suptitle(f"profile {record.run['profile']}", x=0.01, ha="left", fontsize="medium")
            return figure

        return drawn

    return decorate


# Boxes of the pipeline: phase -> (left, bottom, text), in a figure 12 wide and 3.6 high.
PIPELINE = {
    "data": (0.0, 1.3, "training\nexamples"),
    "voting": (2.0, 1.3, "teachers vote\nfast or slow?"),
    "system1": (4.1, 2.4, "System 1\nexamples"),
    "system2": (4.1, 0.2, "System 2\nexamples"),
    "importance": (6.2, 1.3, "score LoRA\nelements for\neach system"),
    "theta": (8.3, 1.3, "fewest that\nhold theta of\nthe score"),
    "stage1": (10.4, 2.4, "stage 1\nSFT of its\nelements"),
    "stage2": (10.4, 0.2, "stage 2\nGRPO of its\nelements"),
}
BOX = (1.65, 0.95)
ARROWS = [
    ("data", "voting"),
    ("voting", "system1"),
    ("voting", "system2"),
    ("system1", "importance"),
    ("system2", "importance"),
    ("importance", "theta"),
    ("theta", "stage1"),
    ("theta", "stage2"),
    ("stage1", "stage2"),
]


def pipeline(*here: str) -> Figure:
    """The method from left to right; the boxes `here` (keys of `PIPELINE`) are filled."""
    if unknown := set(here) - PIPELINE.keys():
        raise InputError(f"pipeline: no box {', '.join(sorted(unknown))}; use {', '.join(PIPELINE)}")
    figure, axes = plt.subplots(figsize=(10.5, 3.3))
    width, height = BOX
    for name, (left, bottom, text) in PIPELINE.items():
        colour = SYSTEM_COLOURS.get({"1": 1, "2": 2}.get(name[-1]), "#555555")
        filled = name in here
        box = FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0.05,rounding_size=0.12",
            facecolor=colour if filled else "white",
            edgecolor=colour,
            linewidth=1.6,
        )
        axes.add_patch(box)
        words = {"color": "white", "weight": "bold"} if filled else {"color": "#222222"}
        axes.text(left + width / 2, bottom + height / 2, text, ha="center", va="center", fontsize="small", **words)
    for start, end in ARROWS:
        axes.annotate("", **_arrow(PIPELINE[start][:2], PIPELINE[end][:2]))
    # Each stage also reads the examples of one system.
    for system, stage, bend in (("system1", "stage1", -0.08), ("system2", "stage2", 0.08)):
        style = {"arrowstyle": "-|>", "color": "#888888", "linestyle": "dashed", "connectionstyle": f"arc3,rad={bend}"}
        y = PIPELINE[system][1] + (height * 0.8 if system == "system1" else height * 0.2)
        axes.annotate("", (PIPELINE[stage][0] - 0.08, y), (PIPELINE[system][0] + width + 0.08, y), arrowprops=style)
    axes.set(xlim=(-0.15, 12.2), ylim=(-0.1, 3.7))
    axes.axis("off")
    return figure


def _arrow(start: tuple[float, float], end: tuple[float, float]) -> dict:
    """From the right edge of one box to the left edge of the next, or downwards between boxes one above the other."""
    width, height = BOX
    if start[0] == end[0]:
        ends = (end[0] + width / 2, end[1] + height + 0.08), (start[0] + width / 2, start[1] - 0.08)
    else:
        ends = (end[0] - 0.08, end[1] + height / 2), (start[0] + width + 0.08, start[1] + height / 2)
    return {"xy": ends[0], "xytext": ends[1], "arrowprops": {"arrowstyle": "-|>", "color": "#555555", "linewidth": 1.4}}


@_of_each(7, 3.8)
def votes_by_steps(figure: SubFigure, record: Record) -> None:
    """Share of examples voted System 2 against reasoning steps by construction, for each teacher and the majority."""
    rows = pd.DataFrame(record.result["tables"]["by_steps"])
    panel = rows[rows["teacher"] == "majority"].set_index("steps")
    axes = figure.subplots()
    axes.bar(range(len(panel)), panel["system2_share"], color=SYSTEM_COLOURS[2], alpha=0.45, label="majority")
    for i, row in enumerate(panel.itertuples()):
        axes.text(i, 1.03, f"n={row.n}", ha="center", fontsize="small")
    for i, (name, points) in enumerate(rows[rows["teacher"] != "majority"].groupby("teacher", sort=False)):
        x = [panel.index.get_loc(steps) for steps in points["steps"]]
        axes.plot(x, points["system2_share"], marker=MARKERS[i % len(MARKERS)], linewidth=1.2, label=name)
    axes.set_xticks(range(len(panel)), panel.index)
    axes.set(xlabel="reasoning steps of the example", ylabel="share voted System 2", ylim=(0, 1.12))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


@_of_each(7, 4.2)
def split_accuracy(figure: SubFigure, record: Record) -> None:
    """How often each teacher and each panel agrees with the construction labels; chance is one half."""
    metrics = record.metrics
    singles = {key.removeprefix("accuracy/"): metrics[key] for key in metrics if key.startswith("accuracy/")}
    singles.pop("majority", None)
    panels = {
        f"panel {row['panel']} (n={row['n']})": Metric(**row["accuracy"])
        for row in record.result["tables"]["panels"]
        if row["accuracy"] and row["n"] > 1
    }
    axes = figure.subplots()
    for y, (label, metric) in enumerate([*singles.items(), *panels.items()]):
        errors = [[error] for error in metric.errors()]
        colour = SYSTEM_COLOURS[1] if label in singles else SYSTEM_COLOURS[2]
        axes.errorbar(metric.value, y, xerr=errors, fmt="o" if label in singles else "s", capsize=3, color=colour)
    axes.set_yticks(range(len(singles) + len(panels)), [*singles, *panels])
    axes.axvline(0.5, color="#555555", linestyle="--", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel="agreement with the construction labels (95 % interval)", xlim=(0.2, 1))


@_of_each(6, 4)
def reliability(figure: SubFigure, record: Record) -> None:
    """P(System 2) from the margin against the share of System 2; a calibrated teacher is on the diagonal."""
    rows = pd.DataFrame(record.result["tables"]["reliability"])
    if rows.empty:
        raise KeyError("voting: margins")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="#555555", linestyle="--", linewidth=1, label="calibrated")
    for i, (name, points) in enumerate(rows.groupby("teacher", sort=False)):
        axes.plot(points["said"], points["share"], marker=MARKERS[i % len(MARKERS)], linewidth=1.2, label=name)
    axes.set(xlabel="P(System 2) from the calibrated margin", ylabel="share that is System 2", ylim=(0, 1), xlim=(0, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


@_of_each(10, 6)
def importance_map(figure: SubFigure, record: Record) -> None:
    """Mean importance by layer and module for System 1, System 2, and their difference."""
    import seaborn as sns  # here, because it imports scipy.stats, which takes most of a page's start

    rows = pd.DataFrame(record.result["tables"]["map"])
    grid = rows.groupby(["layer", "module"], sort=False)[["system1", "system2"]].mean().reset_index()
    order = list(dict.fromkeys(rows["module"]))
    panels = figure.subplots(1, 3, sharey=True)
    maps = {f"System {s}": grid.pivot(index="layer", columns="module", values=f"system{s}")[order] for s in (1, 2)}
    top = max(float(values.to_numpy().max()) for values in maps.values())
    for axes, (title, values) in zip(panels, maps.items(), strict=False):
        sns.heatmap(values, ax=axes, cmap="viridis", vmin=0, vmax=top, cbar_kws={"label": "importance / mean"})
        axes.set(title=title, xlabel="")
    gap = maps["System 2"] - maps["System 1"]
    limit = max(float(gap.abs().to_numpy().max()), 1e-9)
    sns.heatmap(gap, ax=panels[2], cmap="PuOr", vmin=-limit, vmax=limit, cbar_kws={"label": "difference"})
    panels[2].set(title="System 2 - System 1", xlabel="")
    for axes in panels:
        axes.set_xticks([i + 0.5 for i in range(len(order))], [m.removesuffix("_proj") for m in order], rotation=60)
    for axes in panels[1:]:
        axes.set_ylabel("")


@_of_each(9, 3.4)
def importance_by_matrix(figure: SubFigure, record: Record) -> None:
    """Mean importance of A and of B by module, for each system; the average element has importance one."""
    rows = pd.DataFrame(record.result["tables"]["map"])
    order = list(dict.fromkeys(rows["module"]))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, matrix in zip(panels, "AB", strict=True):
        means = rows[rows["matrix"] == matrix].groupby("module")[["system1", "system2"]].mean().loc[order]
        for system, offset in ((1, -0.2), (2, 0.2)):
            x = [i + offset for i in range(len(order))]
            axes.bar(x, means[f"system{system}"], 0.38, color=SYSTEM_COLOURS[system], label=f"System {system}")
        axes.set_xticks(range(len(order)), [module.removesuffix("_proj") for module in order])
        axes.axhline(1, color="#555555", linestyle="--", linewidth=1)
        axes.set(title=f"matrix {matrix}", ylabel="importance / mean" if matrix == "A" else "")
    panels[1].legend()


@_of_each(9, 3)
def importance_by_rank(figure: SubFigure, record: Record) -> None:
    """Mean importance of each rank of A and of B, for each system; the average element has importance one."""
    rows = pd.DataFrame(record.result["tables"]["by_rank"])
    panels = figure.subplots(1, 2, sharey=True)
    for axes, matrix in zip(panels, "AB", strict=True):
        means = rows[rows["matrix"] == matrix]
        for system in (1, 2):
            axes.plot(
                means["rank"] + 1,
                means[f"system{system}"],
                marker="os"[system - 1],
                color=SYSTEM_COLOURS[system],
                label=f"System {system}",
            )
        axes.axhline(1, color="#555555", linestyle="--", linewidth=1)
        axes.set(title=f"matrix {matrix}", xlabel="rank", ylabel="importance / mean" if matrix == "A" else "")
    axes.set_ylim(bottom=0)
    panels[1].legend()


def stability(rows: pd.DataFrame) -> Figure:
    """Agreement of two disjoint samples of n examples (lines), and of two draws of the adapter (crosses).

    Points are means over the draws, bars reach from the lowest to the highest draw.
    """
    agreements = {
        "rank_correlation": "rank correlation, elements",
        "by_matrix": "rank correlation, matrix means",
        "jaccard": "Jaccard of selected sets",
    }
    figure, panels = plt.subplots(1, len(agreements), figsize=(10, 3.4), sharey=True)
    for axes, (key, title) in zip(panels, agreements.items(), strict=True):
        for (differ, system), points in rows.groupby(["differ", "system"]):
            by_n = points.groupby("n")[key].agg(["mean", "min", "max"])
            other = differ == "adapter"
            axes.errorbar(
                # Shifted, so that points of both systems are side by side.
                by_n.index * (1.0 + 0.04 * (system - 1.5)),
                by_n["mean"],
                yerr=[by_n["mean"] - by_n["min"], by_n["max"] - by_n["mean"]],
                fmt="x" if other else "os"[system - 1] + "-",
                capsize=3,
                color=SYSTEM_COLOURS[system],
                label=f"System {system}, other {'adapter' if other else 'examples'}",
            )
        sizes = sorted(rows["n"].unique())
        axes.set(title=title, xlabel="examples scored", xscale="log", ylim=(min(0.0, rows[key].min()) - 0.05, 1.05))
        axes.set_xticks(sizes, sizes)
        axes.minorticks_off()
    panels[0].legend()
    figure.tight_layout()
    return figure


@_of_each(6, 5)
def importance_scatter(figure: SubFigure, record: Record) -> None:
    """System 1 against System 2 importance of LoRA elements, coloured by region (the paper's figure)."""
    rows = pd.DataFrame(record.result["tables"]["scatter"])
    rows = rows[(rows["system1"] > 0) & (rows["system2"] > 0)]
    axes = figure.subplots()
    for region, label in REGION_LABELS.items():
        share = record.metric(f"region/{region}").value
        points = rows[rows["region"] == region]
        axes.scatter(
            points["system1"],
            points["system2"],
            s=8,
            alpha=0.6,
            color=REGION_COLOURS[region],
            label=f"{label} ({share:.1%})",
        )
    title = f"Jaccard {record.metric('jaccard').value:.2f}, by chance {record.metric('jaccard_chance').value:.2f}"
    axes.set(xscale="log", yscale="log", xlabel="System 1 importance", ylabel="System 2 importance", title=title)
    axes.legend(loc="lower right", markerscale=2)


@_of_each(6, 3.6)
def concentration(figure: SubFigure, record: Record) -> None:
    """Share of the total importance against share of elements, most important first."""
    rows = pd.DataFrame(record.result["tables"]["concentration"])
    axes = figure.subplots()
    for system, points in rows.groupby("system"):
        axes.plot(
            points["elements"], points["importance"], marker="o", color=SYSTEM_COLOURS[system], label=f"System {system}"
        )
    axes.set(xlabel="share of LoRA elements, most important first", ylabel="share of importance", ylim=(0, 1.03))
    axes.legend()


@_of_each(9, 3.6)
def without_systems(figure: SubFigure, record: Record) -> None:
    """Selected share and overlap by theta: the record's, the paper's, and those of a model without two systems."""
    null = null_model.without_systems(record)
    counts = pd.DataFrame(record.result["tables"]["explorer"]).groupby("theta")[
        ["elements", "system1_only", "shared", "system2_only"]
    ]
    counts = counts.sum().loc[null["theta"].min() : null["theta"].max()]
    either = counts["system1_only"] + counts["shared"] + counts["system2_only"]
    ours = {
        "active": (counts["system1_only"] + counts["system2_only"] + 2 * counts["shared"]) / 2 / counts["elements"],
        "jaccard": counts["shared"] / either,
    }
    sizes = tables.paper("table3_theta")["QKVGUD"]
    overlaps = [row["jaccard"] for row in tables.paper("figure_importance_regions")]
    paper = {
        "active": ([row["theta"] for row in sizes], [row["active"] / 100 for row in sizes]),
        "jaccard": ([0.9] * len(overlaps), overlaps),
    }
    labels = {"active": "share of elements selected", "jaccard": "overlap of the two sets (Jaccard index)"}
    for axes, (key, label) in zip(figure.subplots(1, 2), labels.items(), strict=True):
        ends = null.groupby("theta")[key].agg(["min", "max"])
        axes.fill_between(
            ends.index, ends["min"], ends["max"], color="#BBBBBB", alpha=0.6, label="independent systems, one phi"
        )
        axes.plot(ours[key].index, ours[key], marker="o", color="#009E73", label="this record")
        axes.plot(*paper[key], "x", color="black", markersize=7, label="the paper (LLaMA-2-7B)")
        axes.set(xlabel="theta", ylabel=label, ylim=(0, None))
    figure.axes[0].legend(loc="upper left")


# Verdict -> colour and marker of its claim.
VERDICTS = {
    "reproduced": ("#009E73", "o"),
    "not reproduced": ("#D55E00", "X"),
    "inconclusive": ("#7F7F7F", "s"),
    "could not fail": ("#7F7F7F", "D"),
}


def forest(records: dict[str, Record], judged: Sequence[dict] | None = None) -> Figure:
    """Each claim's effect with its interval over blocks (thick) and over test questions (thin), beside its margin."""
    declared = claims.load_claims() if judged is None else judged
    rows = [
        (claim, one)
        for claim, one in zip(declared, claims.judgements(records, declared), strict=True)
        if one.over_items is not None
    ]
    if not rows:
        return _note("none of these claims has been run yet")
    units = {True: ("nats a token", 1), False: ("points", 100)}
    groups = {
        in_nats: [row for row in rows if row[0]["test"]["endpoint"].startswith("loss") == in_nats] for in_nats in units
    }
    groups = {in_nats: group for in_nats, group in groups.items() if group}
    heights = [len(group) + 1 for group in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        1,
        figsize=(9, 0.5 * sum(heights) + 0.6),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    for axes, (in_nats, group) in zip(panels[:, 0], groups.items(), strict=True):
        name, unit = units[in_nats]
        for place, (claim, one) in enumerate(group):
            colour, marker = VERDICTS[one.verdict]
            for metric, width in ((one.over_items, 1.2), (one.effect, 4)):
                if metric.low is not None:
                    axes.plot([unit * metric.low, unit * metric.high], [place] * 2, color=colour, linewidth=width)
            axes.plot(unit * one.effect.value, place, marker, color=colour, markersize=8, label=one.verdict)
            axes.plot([unit * claim["test"]["margin"]] * 2, [place - 0.4, place + 0.4], ":", color="black", linewidth=1)
        axes.axvline(0, color="black", linewidth=0.8)
        texts = [f"{textwrap.fill(claim['claim'], 58)}\n{one.verdict}, {one.seeds} blocks" for claim, one in group]
        axes.set(xlabel=f"effect, in {name}", yticks=range(len(group)), ylim=(len(group) - 0.4, -0.6))
        axes.set_yticklabels(texts, fontsize="small")
    return figure


def _note(text: str) -> Figure:
    figure, axes = plt.subplots(figsize=(9, 1))
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center")
    return figure


def tuning(records: Sequence[Record]) -> Figure:
    """Validation loss of System 1 against the learning rate of stage 1: a line per arm, its least value marked."""
    rows = pd.DataFrame(
        [
            {
                "arm": record.run["parameters"]["title"].rpartition(", rate ")[0],
                "rate": record.run["parameters"]["learning_rate"],
                "loss": record.metric("stage1/loss1").value,
            }
            for record in records
        ]
    )
    if rows.empty:
        return _note("no learning rate has been tried yet")
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, (arm, points) in enumerate(rows.groupby("arm", sort=False)):
        points = points.sort_values("rate")
        least = points.loc[points["loss"].idxmin()]
        marker = MARKERS[number % len(MARKERS)]
        (line,) = axes.plot(points["rate"], points["loss"], marker=marker, label=arm, alpha=0.8)
        axes.plot(least["rate"], least["loss"], "o", markersize=14, fillstyle="none", color=line.get_color())
    axes.set(xscale="log", yscale="log", xlabel="learning rate of stage 1", ylabel="validation loss, nats a token")
    axes.set_xticks(sorted(rows["rate"].unique()), [f"{rate:g}" for rate in sorted(rows["rate"].unique())])
    axes.xaxis.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    return figure


def theta_curve(records: list[Record], own: list[Record] = ()) -> Figure:
    """Stage 1 test accuracy against the share of active elements: a line per selection, a panel per set of modules.

    Points are means over the seeds; intervals are over test items. Black crosses are a reader's run, `own`.
    """
    here = tables.theta_points(own)
    rows = pd.DataFrame([point | point["metric"]._asdict() for point in tables.theta_points(records)])
    modules = list(dict.fromkeys(rows["modules"]))
    figure, panels = plt.subplots(
        1, len(modules), figsize=(max(6.5, 4.2 * len(modules)), 4), sharey=True, squeeze=False
    )
    kinds = list(dict.fromkeys(rows["selection"]))
    for axes, which in zip(panels[0], modules, strict=True):
        for selection, points in rows[rows["modules"] == which].groupby("selection", sort=False):
            i = kinds.index(selection)
            points = points.sort_values("active")
            errors = [points["value"] - points["low"], points["high"] - points["value"]]
            axes.errorbar(
                points["active"],
                points["value"],
                yerr=errors,
                marker=MARKERS[i],
                linestyle="-" if len(points) > 1 else "none",
                linewidth=1,
                capsize=3,
                label=selection,
            )
        points = [(p["active"], p["metric"].value) for p in here if p["modules"] == which]
        if points:
            axes.plot(*zip(*points, strict=True), "kx", markersize=9, markeredgewidth=2, label="this run")
        axes.set(title=which, xlabel="share of elements active in stage 1", ylim=(0, 1), xlim=(0, 1.05))
    panels[0][0].set_ylabel("test accuracy")
    panels[0][-1].legend()
    figure.tight_layout()
    return figure


@_of_each(11, 5.5)
def learning_curves(figure: SubFigure, record: Record) -> None:
    """Loss of SFT; reward, entropy, length and idle groups of GRPO; validation accuracy of both, by step."""
    histories = [rows for key, rows in sorted(record.result["tables"].items()) if key.startswith("history_") and rows]
    sft = [rows for rows in histories if "mean_token_accuracy" in rows[0]]
    grpo = [rows for rows in histories if "reward" in rows[0]]
    panels = [(sft, "loss", "SFT loss"), (grpo, "reward", "GRPO reward"), (grpo, "entropy", "GRPO entropy (nats)")]
    panels += [(grpo, "completions/mean_length", "completion length (tokens)")]
    panels += [(grpo, "frac_reward_zero_std", "groups without advantage")]
    grid = figure.subplots(2, 3)
    for axes, (stages, key, title) in zip(grid.flat, panels, strict=False):
        for rows in stages:
            points = [(row["step"], float(row[key])) for row in rows if key in row]
            axes.plot(*zip(*points, strict=True), color=SYSTEM_COLOURS[1 if stages is sft else 2])
        axes.set(title=title, xlabel="step")
    _validation_curves(grid.flat[-1], histories)


def _validation_curves(axes: Axes, histories: list[list[dict]]) -> None:
    """Greedy accuracy (for free text, overlap) on validation prompts, one stage after the other."""
    begins = [0]
    for rows in histories:
        begins.append(begins[-1] + max(row["step"] for row in rows))
    for begin in begins[1:-1]:
        axes.axvline(begin, color="0.6", linewidth=1)
    for field, (label, system) in SCORES.items():
        key = f"validation/{field}"
        points = [
            (begin + row["step"], row[key])
            for begin, rows in zip(begins, histories, strict=False)
            for row in rows
            if key in row
        ]
        if points:
            axes.plot(
                *zip(*points, strict=True),
                marker=MARKERS[system - 1],
                color=SYSTEM_COLOURS[system],
                label=label,
            )
    if axes.lines and axes.get_legend_handles_labels()[0]:
        axes.legend()
    axes.set(title="validation accuracy", xlabel="step, both stages", ylim=(0, 1))


def stage_accuracy(records: list[Record], own: list[Record] = ()) -> Figure:
    """Test accuracy of each system before training, after stage 1 and after stage 2, with 95 % intervals.

    For free text, overlap with the reference instead. Rows of a reader's run, `own`, say so.
    """
    rows = []
    for record, whose in [*((record, "") for record in records), *((record, "this run: ") for record in own)]:
        for key, metric in record.metrics.items():
            stage, _, field = key.partition("/")
            if stage in STAGES and field in SCORES:
                title = f"{whose}{record.run['parameters']['title']}"
                rows.append({"title": title, "stage": stage, "field": field, **metric._asdict()})
    if not rows:
        raise InputError("records: none has scores by stage; run the experiments first")
    frame = pd.DataFrame(rows)
    titles = list(dict.fromkeys(frame["title"] + "\n" + frame["stage"].map(STAGES)))
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(titles) + 1.4))
    for field, offset in (("system1", -0.14), ("system2", 0.14), ("overlap", 0.0)):
        part, (label, colour) = frame[frame["field"] == field], SCORES[field]
        if part.empty:
            continue
        y = [titles.index(title) + offset for title in part["title"] + "\n" + part["stage"].map(STAGES)]
        errors = [part["value"] - part["low"], part["high"] - part["value"]]
        axes.errorbar(part["value"], y, xerr=errors, fmt="o", capsize=3, color=SYSTEM_COLOURS[colour], label=label)
    axes.set_yticks(range(len(titles)), titles, fontsize="small")
    axes.invert_yaxis()
    scored = "overlap" if set(frame["field"]) == {"overlap"} else "accuracy"
    axes.set(xlabel=f"test {scored} (95 % interval)", xlim=(-0.02, 1.02))
    axes.legend(loc="best")
    return figure


def pareto(records: list[Record]) -> Figure:
    """Accuracy at the end against active elements, training time and peak memory, with the Pareto front.

    One point per method (see `tables.method_runs`): the mean over the seeds, with the 95 % interval over test items.
    A method without a recorded cost is left out of that cost's panel.
    """
    import seaborn as sns  # here for the reason above

    points = tables.cost_points(records)
    if points.empty:
        raise KeyError("of a trained method of Tables 4 and 6")
    looks = {
        method: {"color": colour, "fmt": MARKERS[i % len(MARKERS)], "capsize": 3, "label": method}
        for i, (method, colour) in enumerate(zip(points["method"], sns.color_palette("colorblind", 20), strict=False))
    }
    panels = [
        ("active", "active elements in the last stage (log scale)"),
        ("core_seconds", "training time, core-seconds"),
        ("peak_bytes", "peak memory of the run, GB"),
    ]
    figure, grid = plt.subplots(2, 2, figsize=(8.4, 7.4), sharey=True, layout="constrained")
    *all_axes, aside = grid.flat
    for axes, (cost, label) in zip(all_axes, panels, strict=True):
        part = points.dropna(subset=[cost]).sort_values([cost, "value"], ascending=[True, False])
        scale = 1e9 if cost == "peak_bytes" else 1
        for row in part.itertuples():
            errors = [[row.value - row.low], [row.high - row.value]]
            axes.errorbar(getattr(row, cost) / scale, row.value, yerr=errors, **looks[row.method])
        if part.empty:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
        front = part[part["value"] > part["value"].cummax().shift(fill_value=-1)]
        axes.step(front[cost] / scale, front["value"], where="post", color="#666666", linewidth=1, zorder=0)
        axes.set(xlabel=label, ylim=(-0.02, 1.02))
    all_axes[0].set(xscale="log")
    figure.supylabel("accuracy at the end (95 % interval)", size=plt.rcParams["axes.labelsize"])
    aside.axis("off")
    aside.legend(*all_axes[0].get_legend_handles_labels(), loc="center", frameon=False)
    return figure


def two_stage_records(records: dict[str, Record]) -> list[Record]:
    """Experiments that were trained or scored, the base model first."""
    experiments = [r for r in records.values() if "stages" in r.run["parameters"]]
    return sorted(experiments, key=lambda r: (len(r.run["parameters"]["stages"]), r.name))


def main_records(records: dict[str, Record]) -> list[Record]:
    """The headline: the base model, LoRA-PAR, and LoRA with all elements."""
    return [
        r for r in two_stage_records(records) if r.run["parameters"]["sweep"] == "two_stage" or r.name == "base-seed0"
    ]


def stage1_records(records: dict[str, Record]) -> list[Record]:
    """Experiments on theta: those that begin with SFT on the profile's own System 1 examples."""
    experiments = [r for r in two_stage_records(records) if r.run["parameters"]["stages"][:1] == ["sft"]]
    return [r for r in experiments if r.run["parameters"]["sweep"] in ("theta", "two_stage")]


def tuned_records(records: dict[str, Record]) -> list[Record]:
    """The runs that chose the learning rates of stage 1, on validation."""
    return [record for record in records.values() if record.run["parameters"].get("sweep") == "tuning"]


# The figures of `make figures` and the book: name -> function from records by name.
FIGURES: dict[str, Callable[[dict[str, Record]], Figure]] = {
    "pipeline": lambda records: pipeline(),
    "votes_by_steps": lambda records: votes_by_steps(records["voting"]),
    "split_accuracy": lambda records: split_accuracy(records["voting"]),
    "reliability": lambda records: reliability(records["voting"]),
    "importance_map": lambda records: importance_map(records["importance"]),
    "importance_by_matrix": lambda records: importance_by_matrix(records["importance"]),
    "importance_by_rank": lambda records: importance_by_rank(records["importance"]),
    "importance_scatter": lambda records: importance_scatter(records["importance"]),
    "concentration": lambda records: concentration(records["importance"]),
    "stability": lambda records: stability(pd.DataFrame(records["stability"].result["tables"]["stability"])),
    "theta_curve": lambda records: theta_curve(stage1_records(records)),
    "learning_curves": lambda records: learning_curves(records["lorapar-seed0"]),
    "stage_accuracy": lambda records: stage_accuracy(main_records(records)),
    "forest": lambda records: forest(study()),
    "tuning": lambda records: tuning(tuned_records(study())),
    "without_systems": lambda records: without_systems(records["importance"]),
    "pareto": lambda records: pareto(list(records.values())),
}
# Format -> metadata that makes the bytes of two runs equal.
FORMATS = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def save_all(
    records: dict[str, Record],
    folder: Path,
    names: Sequence[str] = tuple(FIGURES),
    formats: Sequence[str] = tuple(FORMATS),
) -> list[Path]:
    """Draw the figures `names` in each format, if their records exist; the same records give the same bytes."""
    use_style()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name in names:
        try:
            figure = FIGURES[name](records)
        except KeyError as missing:
            print(f"{name}: skipped, there is no record {missing}")
            continue
        except InputError as error:
            print(f"{name}: skipped; {error}")
            continue
        for suffix in formats:
            temporary = folder / f".{name}.{suffix}"
            figure.savefig(temporary, format=suffix, metadata=FORMATS.get(suffix))
            paths.append(temporary.replace(folder / f"{name}.{suffix}"))
        plt.close(figure)
    return paths


def main(arguments: list[str] | None = None) -> int:
    """`python -m lorapar_utils.report.figures figures`: every figure, from published records or those of a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument("--records", type=Path, help="such as runs/laptop/records; without it, the published evidence")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    formats = FigureCanvasBase.get_supported_filetypes()
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(FORMATS), metavar="FORMAT")
    options = parser.parse_args(arguments)
    records = read_records(options.records) if options.records else pooled(evidence())
    if not records:
        print(f"{options.records or 'results'}: no records; run `make book` and `make publish` first", file=sys.stderr)
        return 2
    for path in save_all(records, options.figures, options.only, options.formats):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
