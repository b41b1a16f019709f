"""Figures from records, without training and torch."""

import argparse
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import FancyBboxPatch

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, intervals, null_model, published_votes, read_records, study
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import claims, tables
from lorapar_utils.report.drawing import (
    COLUMNS,
    beside,
    column_of_style,
    fitted,
    for_every_width,
    handles_of,
    in_points,
    label_ends,
    legend,
    new_figure,
    of_each,
    use_style,
)
from lorapar_utils.settings import project_root

SYSTEM_COLOURS = {1: "#0072B2", 2: "#D55E00"}
MARKERS = "osD^vPX*"
# What is trained -> its colour in every figure, whatever else is in it.
ARM_COLOURS = {
    "importance": SYSTEM_COLOURS[1],  # LoRA-PAR: stage 1 trains System 1's elements
    "the other system's": SYSTEM_COLOURS[2],
    "random in each matrix": "#CC79A7",
    "random": "#E69F00",
    "largest values, as many": "#5D3A9B",
    "all elements": "#222222",
    "all elements, r = 3": "#888888",
    "all elements, PEFT's initialisation": "#56B4E9",
    "magnitude": "#5D3A9B",  # the largest values too, as many as hold theta of them
    "gradient alone": "#009E73",
    "curvature alone": "#882255",
    "random scores": "#999933",
}
LINESTYLES = ("-", "--", ":", "-.")
# From more of System 1 to more of System 2.
BOTH_SYSTEMS = LinearSegmentedColormap.from_list("systems", [SYSTEM_COLOURS[1], "white", SYSTEM_COLOURS[2]])
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
# Scores of a pool: metric -> (label, the system with the colour).
SCORES = {"system1": ("System 1", 1), "system2": ("System 2", 2), "overlap": ("overlap with the reference", 1)}


# Boxes of the pipeline: phase -> (step from left to right, lane from the middle up, text).
PIPELINE = {
    "data": (0, 0, "training\nexamples"),
    "voting": (1, 0, "teachers vote\nfast or slow?"),
    "system1": (2, 1, "System 1\nexamples"),
    "system2": (2, -1, "System 2\nexamples"),
    "importance": (3, 0, "score LoRA\nelements for\neach system"),
    "theta": (4, 0, "fewest that\nhold theta of\nthe score"),
    "stage1": (5, 1, "stage 1\nSFT of its\nelements"),
    "stage2": (5, -1, "stage 2\nGRPO of its\nelements"),
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
# Each stage also reads the examples of one system.
READS = [("system1", "stage1"), ("system2", "stage2")]


@for_every_width
def pipeline(*here: str) -> Figure:
    """The method from left to right, in a single column from top to bottom; the boxes `here` are filled.

    Parameters
    ----------
    here
        Keys of `PIPELINE`.
    """
    if unknown := set(here) - PIPELINE.keys():
        raise InputError(f"pipeline: no box {', '.join(sorted(unknown))}; use {', '.join(PIPELINE)}")
    axes = new_figure(8.5, 3.1, rows=2).subplots()
    width, height = BOX
    centres = {
        name: (-1.1 * lane, -1.35 * step) if column_of_style() == "single" else (2.08 * step, 1.1 * lane)
        for name, (step, lane, _) in PIPELINE.items()
    }
    for name, (x, y) in centres.items():
        colour = SYSTEM_COLOURS.get({"1": 1, "2": 2}.get(name[-1]), "#555555")
        filled = name in here
        box = FancyBboxPatch(
            (x - width / 2, y - height / 2),
            width,
            height,
            boxstyle="round,pad=0.05,rounding_size=0.12",
            facecolor=colour if filled else "white",
            edgecolor=colour,
            linewidth=in_points(1.6),
        )
        axes.add_patch(box)
        words = {"color": "white", "weight": "bold"} if filled else {"color": "#222222"}
        axes.text(x, y, PIPELINE[name][-1], ha="center", va="center", fontsize="small", **words)
    for start, end in (*ARROWS, *READS):
        look = {"color": "#888888", "linestyle": "dashed"} if (start, end) in READS else {"color": "#555555"}
        ends = _border(centres[end], centres[start]), _border(centres[start], centres[end])
        look |= {"arrowstyle": "-|>", "linewidth": in_points(1.4), "shrinkA": 0, "shrinkB": 0}
        axes.annotate("", *ends, arrowprops=look)
    axes.autoscale_view()
    axes.axis("off")
    return axes.figure


def _border(centre: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Just outside of a box, on the line from its centre to that of another."""
    x, y = other[0] - centre[0], other[1] - centre[1]
    share = min((side / 2 + 0.1) / abs(step) for side, step in zip(BOX, (x, y), strict=True) if step)
    return centre[0] + share * x, centre[1] + share * y


@of_each(7, 3.8)
def votes_by_steps(figure: SubFigure, record: Record) -> None:
    """Share of examples voted System 2 against reasoning steps by construction, for each teacher and the majority."""
    rows = pd.DataFrame(record.result["tables"]["by_steps"])
    # The majority may have decided no example of some number of steps.
    steps = sorted(rows["steps"].unique())
    panel = rows[rows["teacher"] == "majority"]
    axes = figure.subplots()
    x = [steps.index(step) for step in panel["steps"]]
    axes.bar(x, panel["system2_share"], color="#BBBBBB", label="majority")
    for i, count in zip(x, panel["n"], strict=True):
        axes.text(i, 1.03, f"n={count}", ha="center", fontsize="small")
    for i, (name, points) in enumerate(rows[rows["teacher"] != "majority"].groupby("teacher", sort=False)):
        x = [steps.index(step) for step in points["steps"]]
        marker = MARKERS[i % len(MARKERS)]
        axes.plot(x, points["system2_share"], marker=marker, linewidth=in_points(1.2), label=name)
    axes.set_xticks(range(len(steps)), steps)
    axes.set(xlabel="reasoning steps of the example", ylabel="share voted System 2", ylim=(0, 1.12))
    label_ends(axes)


@of_each(7, 4.2)
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
        axes.errorbar(metric.value, y, xerr=errors, fmt="o" if label in singles else "s", color=colour)
    axes.set_yticks(range(len(singles) + len(panels)), [*singles, *panels])
    axes.axvline(0.5, color="#555555", linestyle="--", linewidth=in_points(1))
    axes.invert_yaxis()
    axes.set(xlabel=fitted("agreement with the construction labels (95 % interval)", 40), xlim=(0.2, 1))


@of_each(7.5, 5.6)
def importance_map(figure: SubFigure, record: Record) -> None:
    """Mean importance by layer and module for System 1, System 2, and their difference."""
    rows = pd.DataFrame(record.result["tables"]["map"])
    grid = rows.groupby(["layer", "module"], sort=False)[["system1", "system2"]].mean().reset_index()
    order = _modules(rows)
    panels = figure.subplots(1, 3, sharey=True)
    maps = {f"System {s}": grid.pivot(index="layer", columns="module", values=f"system{s}")[order] for s in (1, 2)}
    layers = _layers(rows)
    top = max(float(values.to_numpy().max()) for values in maps.values())
    gap = maps["System 2"] - maps["System 1"]
    limit = max(float(gap.abs().to_numpy().max()), 1e-9)
    looks = [{"cmap": "viridis_r", "vmin": 0, "vmax": top}] * 2  # the dark theme inverts it, so high is bright there
    looks += [{"cmap": BOTH_SYSTEMS, "vmin": -limit, "vmax": limit}]
    maps["System 2 - System 1"] = gap
    for axes, (title, values), look in zip(panels, maps.items(), looks, strict=True):
        axes.pcolormesh(range(len(order) + 1), [*layers, layers.stop], values.reindex(layers), **look)
        axes.grid(False)
        axes.set_title(fitted(title, 12))
        axes.set_xticks([i + 0.5 for i in range(len(order))], map(_short, order), rotation=90)
    _layers_down(panels[0], layers)
    place = "bottom" if column_of_style() == "single" else "right"
    sides = "System 1 ← → 2" if column_of_style() == "single" else "System 1 above ← → System 2 above"
    for which, label in ((panels[:2], "importance / mean"), (panels[2:], sides)):
        figure.colorbar(which[0].collections[0], ax=which, location=place, label=label, aspect=30)


def _short(module: str) -> str:
    return module.removesuffix("_proj")


def _modules(rows: pd.DataFrame) -> list[str]:
    """The modules of the table `map`, those of a transformer in the order of `MODULES`."""
    return [module for module in dict.fromkeys([*MODULES, *rows["module"]]) if module in set(rows["module"])]


def _layers(rows: pd.DataFrame) -> range:
    """From the first to the last layer of the table `map`; between them may be some without LoRA."""
    return range(rows["layer"].min(), rows["layer"].max() + 1)


def _layers_down(axes: Axes, layers: range) -> None:
    """Layers from top to bottom, up to eight of them with their number."""
    shown = layers[:: math.ceil(len(layers) / 8)]
    axes.set_yticks([layer + 0.5 for layer in shown], shown)
    axes.set(ylabel="layer", ylim=(layers.stop, layers.start))


# In the order of a layer's computation.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Region of a partition -> what it is in words, in the order of the bars.
PARTS = {
    "system1_only": "System 1 only",
    "shared": "both",
    "system2_only": "System 2 only",
    "inactive": "neither",
}


@of_each(7.5, 4.6)
def partition_map(figure: SubFigure, record: Record) -> None:
    """The partition: of each module's elements in each layer, the shares that one system, both or neither selects."""
    rows = pd.DataFrame(record.result["tables"]["map"])
    counts = rows[list(PARTS)].mul(rows["elements"], axis=0).assign(module=rows["module"], layer=rows["layer"])
    counts = counts.groupby(["module", "layer"])[list(PARTS)].sum()  # over A and B
    shares = counts.div(counts.sum(axis=1), axis=0)
    order = _modules(rows)
    layers = _layers(rows)
    panels = figure.subplots(1, len(order), sharey=True, sharex=True, squeeze=False)[0]
    for axes, module in zip(panels, order, strict=True):
        bars = shares.loc[module].reindex(layers, fill_value=0)
        ends = bars.cumsum(axis=1)
        for region in PARTS:
            # One outline for all layers, whose steps are their bars: much faster than a rectangle for each.
            begins = ends[region] - bars[region]
            outline = {"edges": [*layers, layers.stop], "baseline": begins, "orientation": "horizontal"}
            axes.stairs(ends[region], fill=True, color=REGION_COLOURS[region], **outline)
        axes.grid(False)
        axes.set(title=_short(module), xlim=(0, 1), xticks=[0.5] if column_of_style() == "single" else [0, 0.5])
    _layers_down(panels[0], layers)
    overall = counts.sum() / counts.to_numpy().sum()
    figure.legend(
        panels[0].patches,
        [f"{words} {100 * overall[region]:.0f} %" for region, words in PARTS.items()],
        loc="outside lower center",
        ncols=2 if column_of_style() == "single" else 4,
        # Words in the bars' colours; the light grey of "neither" could not be read.
        labelcolor=[REGION_COLOURS[region] if region != "inactive" else "#767676" for region in PARTS],
        handlelength=0,
        handletextpad=0,
        frameon=False,
        prop={"size": plt.rcParams["font.size"], "weight": "bold"},
        title="share of the module's elements",
        title_fontsize=plt.rcParams["axes.labelsize"],
    )


@for_every_width
def stability(rows: pd.DataFrame) -> Figure:
    """Agreement of two disjoint samples of n examples (lines), and of two draws of the adapter (crosses).

    Points are means over the draws, bars reach from the lowest to the highest draw.
    """
    agreements = {
        "rank_correlation": "rank correlation, elements",
        "by_matrix": "rank correlation, matrix means",
        "jaccard": "Jaccard of selected sets",
    }
    figure = new_figure(7.5, 3.4, rows=len(agreements))
    panels = figure.subplots(*beside(len(agreements)), sharey=True)
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
                color=SYSTEM_COLOURS[system],
                label=f"System {system}, other {'adapter' if other else 'examples'}",
            )
        sizes = sorted(rows["n"].unique())
        axes.set(
            title=textwrap.fill(title, 18),
            xlabel="examples scored",
            xscale="log",
            ylim=(min(0.0, rows[key].min()) - 0.05, 1.05),
        )
        axes.set_xticks(sizes, sizes)
        axes.minorticks_off()
        axes.label_outer()
    panels[1].legend(loc="lower center")  # where nothing is drawn: matrix means agree
    return figure


@of_each(6, 5)
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
            s=in_points(2.8) ** 2,
            alpha=0.6,
            color=REGION_COLOURS[region],
            label=f"{label} ({share:.1%})",
        )
    title = f"Jaccard {record.metric('jaccard').value:.2f}, by chance {record.metric('jaccard_chance').value:.2f}"
    axes.set(xscale="log", yscale="log", xlabel="System 1 importance", ylabel="System 2 importance", title=title)
    axes.legend(loc="lower right", markerscale=2)


@of_each(7.5, 3.6, rows=2)
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
    for axes, (key, label) in zip(figure.subplots(*beside(2)), labels.items(), strict=True):
        ends = null.groupby("theta")[key].agg(["min", "max"])
        axes.fill_between(
            ends.index, ends["min"], ends["max"], color="#BBBBBB", alpha=0.6, label="independent systems, one phi"
        )
        axes.plot(ours[key].index, ours[key], marker="o", color="#009E73", label=f"profile {record.run['profile']}")
        axes.plot(*paper[key], "x", color="black", markersize=in_points(7), label="the paper (LLaMA-2-7B)")
        axes.set(xlabel="theta", ylabel=label, ylim=(0, None))
    figure.axes[0].legend(loc="upper left")


# Verdict -> colour and marker of its claim.
VERDICTS = {
    "reproduced": ("#009E73", "o"),
    "not reproduced": ("#D55E00", "X"),
    "inconclusive": ("#7F7F7F", "s"),
    "could not fail": ("#7F7F7F", "D"),
}


# What the landing page's forest shows: the claims of these tables of the paper.
HEADLINE = ("central claim", "Tables 4 and 5", "Tables 2 and 4")


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, none of which ends within "r = 3"."""
    return textwrap.fill(text.replace(" = ", "\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}"), width)


@for_every_width
def forest(records: dict[str, Record], judged: Sequence[dict] | None = None) -> Figure:
    """Each claim's effect with its interval over blocks (thick) and over test questions (thin), beside its margin.

    Losses also have a band of `claims.EQUAL_WITHIN` around zero.
    """
    declared = claims.load_claims() if judged is None else judged
    # Holm's correction is over these alone, so no verdict depends on the others.
    declared = [claim for claim in declared if claim["test"]["kind"] in claims.SIDES]
    rows = [
        (claim, one)
        for claim, one in zip(declared, claims.judgements(records, declared), strict=True)
        if one.over_items is not None
    ]
    if not rows:
        return _note("none of these claims has been run yet")
    width = 30 if column_of_style() == "single" else 58
    texts = {
        claim["claim"]: f"{_wrapped(claim['claim'], width)}\n{one.verdict}, {_blocks(one.seeds)}" for claim, one in rows
    }
    units = {True: ("nats a token", 1), False: ("points", 100)}
    groups = {
        in_nats: [row for row in rows if row[0]["test"]["endpoint"].startswith("loss") == in_nats] for in_nats in units
    }
    groups = {in_nats: group for in_nats, group in groups.items() if group}
    heights = [len(group) + 1 for group in groups.values()]
    lines = 1 + max(text.count("\n") for text in texts.values())
    figure = new_figure(7.5, 0.17 * lines * sum(heights) + 0.6)
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=heights)
    for axes, (in_nats, group) in zip(panels[:, 0], groups.items(), strict=True):
        name, unit = units[in_nats]
        for place, (claim, one) in enumerate(group):
            colour, marker = VERDICTS[one.verdict]
            # The thin one above the thick one, which is often the longer.
            for metric, thickness, shade in ((one.effect, 4, colour), (one.over_items, 1.2, "black")):
                if metric.low is not None:
                    ends = [unit * metric.low, unit * metric.high]
                    axes.plot(ends, [place] * 2, color=shade, linewidth=in_points(thickness))
            axes.plot(unit * one.effect.value, place, marker, color=colour, markersize=in_points(8), label=one.verdict)
            if claim["test"]["margin"]:
                margin = [unit * claim["test"]["margin"]] * 2
                axes.plot(margin, [place - 0.4, place + 0.4], ":", color="black", linewidth=in_points(1))
        axes.axvline(0, color="black", linewidth=in_points(0.8))
        if in_nats:
            axes.axvspan(-claims.EQUAL_WITHIN, claims.EQUAL_WITHIN, color="#000000", alpha=0.06, linewidth=0)
        axes.locator_params(axis="x", nbins=4 if column_of_style() == "single" else 8)
        axes.set(xlabel=fitted(f"effect, in {name}; as claimed to the right", 28))
        axes.set(yticks=range(len(group)), ylim=(len(group) - 0.4, -0.6))
        axes.set_yticklabels([texts[claim["claim"]] for claim, _ in group], fontsize="small")
    return figure


def _blocks(count: int) -> str:
    return f"{count} block{'s' * (count > 1)}"


def _note(text: str) -> Figure:
    axes = new_figure(7.5, 1).subplots()
    axes.axis("off")
    axes.text(0.5, 0.5, text, ha="center", va="center")
    return axes.figure


def _colour(arm: str) -> str:
    """The colour of an arm; LoRA of any other rank has that of rank 3."""
    return ARM_COLOURS.get(arm, ARM_COLOURS["all elements, r = 3"])


def _look(axes: Axes, arm: str) -> dict:
    """An arm's colour; of several lines of one colour, such as two thetas, the later ones are dashed."""
    colour = _colour(arm)
    before = sum(line.get_color() == colour and not line.get_label().startswith("_") for line in axes.lines)
    return {"color": colour, "linestyle": LINESTYLES[before % len(LINESTYLES)]}


def _marker(arm: str) -> str:
    colours = list(ARM_COLOURS.values())
    return MARKERS[colours.index(_colour(arm)) % len(MARKERS)]


@for_every_width
def tuning(records: Sequence[Record]) -> Figure:
    """Validation loss of System 1 against the learning rate of stage 1: a line per arm, its least value marked."""
    rows = _tried(records, "learning_rate", "stage1/loss1")
    if rows.empty:
        return _note("no learning rate has been tried yet")
    axes = _rates_against(rows, "learning rate of stage 1", "validation loss, nats a token", pd.Series.idxmin, "log")
    axes.yaxis.set_minor_formatter("{x:g}")
    return axes.figure


@for_every_width
def tuning_of_stage2(records: Sequence[Record]) -> Figure:
    """Validation accuracy on both systems against the learning rate of stage 2: a line per arm, its best value marked.

    Hollow diamonds are the runs without KL, each at its arm's best rate.
    """
    rows = _tried(records, "grpo_learning_rate", "stage2/accuracy")
    if rows.empty:
        return _note("no learning rate of stage 2 has been tried yet")
    rows["value"] *= 100
    without = rows[rows["kl"] == 0]
    rows = rows[rows["kl"] > 0]
    accuracy = "accuracy on both systems, % of validation"
    axes = _rates_against(rows, "learning rate of stage 2", accuracy, pd.Series.idxmax)
    for arm, points in without.groupby("arm", sort=False):
        axes.plot(points["rate"], points["value"], "D", fillstyle="none", color=_colour(arm), label="_without KL")
    return axes.figure


def _tried(records: Sequence[Record], rate: str, metric: str) -> pd.DataFrame:
    """Arm, rate and metric of the runs that chose a learning rate."""
    return pd.DataFrame(
        [
            {
                "title": _as_in_tables(re.sub(r", (rate|KL).*", "", record.run["parameters"]["title"])),
                "arm": tables.arm_of(record.run["parameters"]),
                "rate": record.run["parameters"][rate],
                "kl": record.run["parameters"]["kl"],
                "value": record.metric(metric).value,
            }
            for record in records
        ]
    )


def _as_in_tables(title: str) -> str:
    """An arm's title in the grids, as its blocks have it."""
    return re.sub(r"^importance\b", "LoRA-PAR", re.sub(r"^LoRA$", "LoRA, r = 8", title))


def _rates_against(
    rows: pd.DataFrame, of: str, value: str, best: Callable[[pd.Series], int], yscale: str = "linear"
) -> Axes:
    """A line per arm of a value against the rate, the best of each circled."""
    axes = new_figure(7.5, 4.4).subplots()
    for (title, arm), points in rows.groupby(["title", "arm"], sort=False):
        points = points.sort_values("rate")
        marked = points.loc[best(points["value"])]
        look = _look(axes, arm)
        axes.plot(points["rate"], points["value"], marker=_marker(arm), label=title, alpha=0.8, **look)
        circle = {"markersize": in_points(14), "fillstyle": "none", "color": look["color"]}
        axes.plot(marked["rate"], marked["value"], "o", **circle)
    axes.set(xscale="log", xlabel=of, yscale=yscale, ylabel=value)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xticks(sorted(rows["rate"].unique()), [f"{rate:g}" for rate in sorted(rows["rate"].unique())])
    axes.xaxis.minorticks_off()
    label_ends(axes)
    return axes


WINDOW = 8  # steps of a running mean


@for_every_width
def arm_curves(records: Iterable[Record]) -> Figure:
    """Training loss of stage 1 by step for each of the study's arms: the mean over blocks of running means.

    Bands reach from the lowest to the highest block. Records that were not measured on the test split are left out.
    """
    arms = tables.study_arms(records, "sft")
    if not arms:
        return _note("no arm of the study has been trained yet")
    axes = new_figure(7.5, 4.4).subplots()
    for title, runs in arms.items():
        arm = tables.arm_of(runs[0].run["parameters"])
        logs = [run.result["tables"]["history_stage1"] for run in runs]
        losses = [pd.Series({row["step"]: row["loss"] for row in log if "loss" in row}) for log in logs]
        losses = [series.rolling(WINDOW).mean() for series in losses]
        blocks = pd.concat(losses, axis=1).dropna()
        look = _look(axes, arm)
        axes.plot(blocks.index, blocks.mean(axis=1), label=f"{title} ({_blocks(len(losses))})", **look)
        band = {"color": look["color"], "alpha": 0.15, "linewidth": 0}
        axes.fill_between(blocks.index, blocks.min(axis=1), blocks.max(axis=1), **band)
    axes.set(yscale="log", xlabel="step of stage 1", ylabel=f"training loss, nats a token\n(mean of {WINDOW} steps)")
    axes.yaxis.set_major_formatter("{x:g}")
    label_ends(axes)
    return axes.figure


@for_every_width
def theta_curve(records: list[Record]) -> Figure:
    """Stage 1 test accuracy against the share of active elements: a line per selection, a panel per set of modules.

    Points are means over the seeds; intervals are over test items.
    """
    rows = pd.DataFrame([point | point["metric"]._asdict() for point in tables.theta_points(records)])
    if rows.empty:
        raise InputError("records: none is of an experiment on theta; run one first")
    modules = list(dict.fromkeys(rows["modules"]))
    figure = new_figure(max(6.5, 4.2 * len(modules)), 4, rows=len(modules))
    panels = figure.subplots(*beside(len(modules)), sharey=True, squeeze=False).ravel()
    for axes, which in zip(panels, modules, strict=True):
        for selection, points in rows[rows["modules"] == which].groupby("selection", sort=False):
            points = points.sort_values("active")
            errors = [points["value"] - points["low"], points["high"] - points["value"]]
            axes.errorbar(
                points["active"],
                points["value"],
                yerr=errors,
                marker=_marker(selection),
                color=_colour(selection),
                linestyle="-" if len(points) > 1 else "none",
                linewidth=in_points(1),
                label=selection,
            )
        axes.set(title=which, xlabel="share of elements active in stage 1", ylim=(0, 1), xlim=(-0.03, 1.05))
        axes.set_ylabel("test accuracy")
        axes.label_outer()
    drawn = [handles_of(axes) for axes in panels]
    everywhere = {label: handle for handles in drawn for label, handle in handles.items()}
    if everywhere.keys() == drawn[-1].keys():
        label_ends(panels[-1])
    else:
        legend(figure, everywhere)
    return figure


@of_each(7.5, 5.2, rows=1.5)
def learning_curves(figure: SubFigure, record: Record) -> None:
    """Loss of SFT; reward, entropy, length and idle groups of GRPO; validation accuracy of both, by step."""
    histories = [rows for key, rows in sorted(record.result["tables"].items()) if key.startswith("history_") and rows]
    sft = [rows for rows in histories if "mean_token_accuracy" in rows[0]]
    grpo = [rows for rows in histories if "reward" in rows[0]]
    panels = [
        (sft, "loss", "SFT loss\n(nats a token)"),
        (grpo, "reward", "GRPO reward"),
        (grpo, "entropy", "GRPO entropy\n(nats)"),
        (grpo, "completions/mean_length", "completion length\n(tokens)"),
        (grpo, "frac_reward_zero_std", "share of groups\nwithout advantage"),
    ]
    # A stage that the experiment does not have, or that was not logged, has no panel.
    panels = [
        (stages, key, title) for stages, key, title in panels if any(key in row for rows in stages for row in rows)
    ]
    watched = any(f"validation/{field}" in row for field in SCORES for rows in histories for row in rows)
    across = 2 if column_of_style() == "single" else 3
    count = len(panels) + watched
    if not count:
        figure.text(0.5, 0.5, "nothing was trained", ha="center", va="center")
        return
    grid = figure.subplots(-(-count // across), min(count, across), squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    for axes, (stages, key, title) in zip(grid.flat, panels, strict=False):
        for rows in stages:
            points = [(row["step"], float(row[key])) for row in rows if key in row]
            # A line of one step would not be seen.
            marker = "o" if len(points) == 1 else ""
            axes.plot(*zip(*points, strict=True), marker=marker, color=SYSTEM_COLOURS[1 if stages is sft else 2])
        axes.set(title=title, xlabel="step")
        if key == "frac_reward_zero_std":
            axes.set_ylim(0, None)
        axes.xaxis.get_major_locator().set_params(integer=True)
    if watched:
        _validation_curves(grid.flat[count - 1], histories)


def _validation_curves(axes: Axes, histories: list[list[dict]]) -> None:
    """Greedy accuracy (for free text, overlap) on validation prompts, one stage after the other."""
    begins = [0]
    for rows in histories:
        begins.append(begins[-1] + max(row["step"] for row in rows))
    for begin in begins[1:-1]:
        axes.axvline(begin, color="0.6", linewidth=in_points(1))
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
    if handles := handles_of(axes):
        axes.figure.legend(handles.values(), handles.keys(), loc="outside lower right", ncols=len(SCORES))
    axes.set(title="validation accuracy", xlabel="step, both stages", ylim=(0, 1))


@for_every_width
def stage_accuracy(records: Iterable[Record]) -> Figure:
    """Test accuracy of each system before training and after each stage: a tick a seed, the mean with its interval.

    The interval is Student's over seeds, over test items where there is one seed. For free text it is the overlap with
    the reference.
    """
    seeds: dict[tuple[str, str], list[Metric]] = {}
    for record in records:
        title = record.run["parameters"]["title"]
        for key, metric in record.metrics.items():
            stage, _, field = key.partition("/")
            if stage in tables.STAGES and field in SCORES:
                # The base model has one name, as an experiment and as a stage.
                words = tables.STAGES[stage] if stage == "base" else f"{title}\n{tables.STAGES[stage]}"
                seeds.setdefault((words, field), []).append(metric)
    if not seeds:
        raise InputError("records: none has scores by stage; run the experiments first")
    rows = list(dict.fromkeys(words for words, _ in seeds))
    axes = new_figure(7.5, 0.5 * len(rows) + 1.2).subplots()
    for (words, field), metrics in seeds.items():
        label, system = SCORES[field]
        place = rows.index(words) + {"system1": -0.14, "system2": 0.14}.get(field, 0)
        values = [metric.value for metric in metrics]
        mean = intervals.over_seeds(values) if len(values) > 1 else metrics[0]
        look = {"color": SYSTEM_COLOURS[system]}
        if mean.low is not None:
            axes.plot([mean.low, mean.high], [place] * 2, linewidth=in_points(1.2), **look)
        axes.plot(values, [place] * len(values), "|", markersize=in_points(6), alpha=0.7, **look)
        axes.plot(mean.value, place, MARKERS[system - 1], label=label, **look)
    axes.set_yticks(range(len(rows)), rows, fontsize="small")
    axes.invert_yaxis()
    scored = "overlap" if {field for _, field in seeds} == {"overlap"} else "accuracy"
    axes.set(xlabel=f"test {scored}", xlim=(0, None))
    handles = handles_of(axes)
    axes.legend(handles.values(), handles.keys(), loc="best")
    return axes.figure


def two_stage_records(records: dict[str, Record]) -> list[Record]:
    """Experiments that were trained or scored: the base model, then by the number of stages, LoRA-PAR first."""
    experiments = [r for r in tables.on_test(records.values()) if "stages" in r.run["parameters"]]
    return sorted(experiments, key=lambda r: (len(r.run["parameters"]["stages"]), tables.place(r), r.name))


def main_records(records: dict[str, Record]) -> list[Record]:
    """The base model, and the arms that are compared after both stages."""
    return [
        r for r in two_stage_records(records) if r.run["parameters"]["sweep"] == "two_stage" or r.name == "base-seed0"
    ]


def stage1_records(records: dict[str, Record]) -> list[Record]:
    """Experiments on theta: those that begin with SFT on the profile's own System 1 examples."""
    experiments = [r for r in two_stage_records(records) if r.run["parameters"]["stages"][:1] == ["sft"]]
    return [r for r in experiments if r.run["parameters"]["sweep"] in ("theta", "two_stage")]


def tuned_records(records: dict[str, Record], *stages: str) -> list[Record]:
    """The runs of these stages that chose learning rates, on validation."""
    tuned = [record for record in records.values() if record.run["parameters"].get("sweep") == "tuning"]
    return [record for record in tuned if tuple(record.run["parameters"].get("stages", ())) == stages]


def _study() -> dict[str, Record]:
    """The study's records, read once: several figures are of them, each at several widths."""
    return _read_once(project_root() / "results" / "study")


_read_once = cache(read_records)


# The figures of `make figures`, some of which no page of the book shows: name -> function from records by name.
FIGURES: dict[str, Callable[[dict[str, Record]], Figure]] = {
    "pipeline": lambda records: pipeline(),
    "votes_by_steps": lambda records: votes_by_steps(records["voting"]),
    "split_accuracy": lambda records: split_accuracy(records["voting"]),
    "importance_map": lambda records: importance_map(records["importance"]),
    "partition_map": lambda records: partition_map(records["importance"]),
    "importance_scatter": lambda records: importance_scatter(records["importance"]),
    "stability": lambda records: stability(pd.DataFrame(records["stability"].result["tables"]["stability"])),
    "theta_curve": lambda records: theta_curve(stage1_records(records)),
    "learning_curves": lambda records: learning_curves(records["lorapar-seed0"]),
    "stage_accuracy": lambda records: stage_accuracy(main_records(records)),
    "forest": lambda records: forest(_study(), [claim for claim in claims.load_claims() if claim["paper"] in HEADLINE]),
    "tuning": lambda records: tuning(tuned_records(_study(), "sft")),
    "tuning_of_stage2": lambda records: tuning_of_stage2(tuned_records(_study(), "sft", "grpo")),
    "arm_curves": lambda records: arm_curves(_study().values()),
    "without_systems": lambda records: without_systems(records["importance"]),
}
# Format -> metadata that makes the bytes of two runs equal.
FORMATS = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}


def published() -> dict[str, Record]:
    """The published records that figures show: the study's, and the votes."""
    return study() | published_votes()


def save_all(
    records: dict[str, Record],
    folder: Path,
    names: Sequence[str] = tuple(FIGURES),
    formats: Sequence[str] = tuple(FORMATS),
    column: str | None = None,
) -> list[Path]:
    """Draw the figures `names` in each format, if their records exist; the same records give the same bytes.

    A PDF is for a paper, so there is one for each of `COLUMNS`: `NAME-single.pdf`, `NAME-double.pdf`. Other formats are
    as wide as a page, or as `column`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    on_page = [suffix for suffix in formats if suffix != "pdf"]
    looks = [(column, on_page)] if on_page else []
    looks += [(width, ["pdf"]) for width in COLUMNS if "pdf" in formats]
    paths = []
    for name in names:
        try:
            for width, suffixes in looks:
                use_style(width)
                figure = FIGURES[name](records)
                # Once for all formats: each would lay out and draw the figure to find out where things go.
                figure.get_layout_engine().execute(figure)
                figure.set_layout_engine(None)
                stem = f"{name}-{width}" if width else name
                for suffix in suffixes:
                    temporary = folder / f".{stem}.{suffix}"
                    figure.savefig(temporary, format=suffix, metadata=FORMATS.get(suffix))
                    paths.append(temporary.replace(folder / f"{stem}.{suffix}"))
                plt.close(figure)
        except KeyError as missing:
            print(f"{name}: skipped, there is no record {missing}")
        except InputError as error:
            print(f"{name}: skipped; {error}")
    use_style()
    return paths


def main(arguments: list[str] | None = None) -> int:
    """`python -m lorapar_utils.report.figures figures`: every figure, from published records or those of a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("figures", type=Path)
    parser.add_argument(
        "--records",
        type=Path,
        help="such as runs/laptop/records; without it, the published ones (the study's own are always published)",
    )
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=list(FIGURES), metavar="FIGURE")
    formats = FigureCanvasBase.get_supported_filetypes()
    parser.add_argument("--formats", nargs="+", choices=formats, default=list(FORMATS), metavar="FORMAT")
    options = parser.parse_args(arguments)
    records = read_records(options.records) if options.records else published()
    if not records:
        print(f"{options.records or 'results'}: no records; run `make book` and `make publish` first", file=sys.stderr)
        return 2
    paths = save_all(records, options.figures, options.only, options.formats)
    for path in paths:
        print(path)
    return int(not paths)


if __name__ == "__main__":
    sys.exit(main())
