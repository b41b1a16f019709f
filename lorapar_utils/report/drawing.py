"""How figures are drawn: for a page or a column of a paper, with labels at the lines, one record under another."""

import base64
import functools
import io
import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure

from lorapar_utils.records import Record

# Column of a paper -> its width in inches, and the size of its font in points.
COLUMNS = {"single": (3.25, 7), "double": (6.75, 8)}
PAGE_FONT = 11
# The MIME type of a figure's second picture, for narrow screens. 715 pixels: a phone has two or three for each of CSS.
NARROW_PICTURE, NARROW_DPI = "application/vnd.lorapar.narrow+png", 220
# Sizes in points; in a column they shrink with the font.
SCALED = (
    *("font.size", "axes.titlesize", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"),
    *("lines.linewidth", "lines.markersize", "errorbar.capsize", "axes.linewidth", "grid.linewidth"),
    *("axes.titlepad", "axes.labelpad"),
    *(f"{axis}tick.{kind}.{size}" for axis in "xy" for kind in ("major", "minor") for size in ("size", "width", "pad")),
)


def use_style(column: str | None = None) -> None:
    """Set the style of all figures (`lorapar.mplstyle`), after a reset of matplotlib's defaults.

    Parameters
    ----------
    column
        A key of `COLUMNS`: figures are drawn as wide as this column of a paper. None: as for a page.
    """
    plt.style.use(["default", Path(__file__).with_name("lorapar.mplstyle")])
    if column:
        width, font = COLUMNS[column]
        plt.rcParams["figure.figsize"] = (width, width)
        plt.rcParams.update({size: plt.rcParams[size] * font / PAGE_FONT for size in SCALED})


def column_of_style() -> str | None:
    """The column that figures are drawn for: the one of this width."""
    return {width: column for column, (width, _) in COLUMNS.items()}.get(plt.rcParams["figure.figsize"][0])


def in_points(size: float) -> float:
    """A width or size in points on a page, as it is here: in proportion to the font."""
    column = column_of_style()
    return size * COLUMNS[column][1] / PAGE_FONT if column else size


def new_figure(width: float, height: float, rows: float = 1) -> Figure:
    """An empty figure, of this size in inches on a page; a column sets the width, and the height follows its font.

    In a single column there are `rows` times as many rows of panels as on a page.
    """
    if column := column_of_style():
        width, height = COLUMNS[column][0], in_points(height) * (rows if column == "single" else 1)
    return plt.figure(figsize=(width, height), layout="constrained")


def beside(count: int) -> tuple[int, int]:
    """Rows and columns of panels that are beside each other; in a single column, one under another."""
    return (count, 1) if column_of_style() == "single" else (1, count)


def fitted(text: str, characters: int) -> str:
    """`text`, in a single column in lines of so many characters."""
    return textwrap.fill(text, characters) if column_of_style() == "single" else text


def handles_of(axes: Axes) -> dict[str, Artist]:
    """Label -> what it labels."""
    handles, labels = axes.get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def legend(part: Figure | SubFigure, handles: Mapping[str, Artist]) -> None:
    """A legend to the right of all panels; in a single column below them, where the figure grows by it."""
    if column_of_style() != "single":
        part.legend(handles.values(), handles.keys(), loc="outside right center")
        return
    width, height = part.get_figure(root=True).get_size_inches()
    font = plt.rcParams["legend.fontsize"] / 72
    # A letter is about 0.6 of the font's size wide; marker and gaps take as much as six.
    columns = max(1, int(width / (0.6 * font * (max(map(len, handles)) + 6))))
    part.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    part.get_figure(root=True).set_size_inches(width, height + 1.5 * font * math.ceil(len(handles) / columns))


def label_ends(axes: Axes) -> None:
    """Write the label of each line or row of bars beside its last point, in its colour; call it when all is drawn.

    In a single column long labels would take the place of the lines: there they are a legend below.
    """
    handles = handles_of(axes)
    if column_of_style() == "single" and max(map(len, handles)) > 12:
        legend(axes.figure, handles)
        return
    axes.get_ylim()  # settles the limits, which `transData` does not
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = {textwrap.fill(label, 26): _end(handle) for label, handle in handles.items()}
    places = pd.Series({label: to_axes.transform(point)[1] for label, (point, _) in ends.items()}).sort_values()
    # In shares of the axes' height as it is here; the layout, which is still to come, does not make them lower.
    line = 1.4 * plt.rcParams["legend.fontsize"] / 72 * axes.figure.dpi / axes.bbox.height
    heights = line * np.array([label.count("\n") + 1 for label in places.index])
    if (needed := heights.sum()) > 1:
        root = axes.get_figure(root=True)
        root.set_size_inches(root.get_figwidth(), root.get_figheight() * needed)
        heights /= needed
    for label, place in zip(places.index, _moved_apart(places.to_numpy(), heights), strict=True):
        point, colour = ends[label]
        axes.annotate(
            label,
            point,
            (1.03, place),
            textcoords="axes fraction",
            color=_readable(colour),
            fontsize=plt.rcParams["legend.fontsize"],
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linestyle": ":", "linewidth": in_points(0.8)}
            | {"relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 1},
        )


def _readable(colour: str | tuple) -> tuple[float, float, float]:
    """The colour, as much darker as text on white needs for a contrast of 4.5."""
    rgb = np.array(to_rgb(colour))
    while 1.05 / (_luminance(rgb) + 0.05) < 4.5:
        rgb = 0.95 * rgb
    return tuple(rgb)


def _luminance(rgb: np.ndarray) -> float:
    """Relative luminance by WCAG, from 0 for black to 1 for white."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def _end(handle: Artist) -> tuple[tuple[float, float], str]:
    """The last point of a line, a line with error bars or a row of bars, and its colour."""
    if hasattr(handle, "patches"):
        bar = handle.patches[-1]
        return (bar.get_x() + bar.get_width(), bar.get_height()), bar.get_facecolor()[:3]
    line = handle[0] if isinstance(handle, tuple) else handle
    return tuple(line.get_xydata()[-1]), line.get_color()


def _moved_apart(places: np.ndarray, heights: np.ndarray) -> np.ndarray:
    """Rising `places` of texts of these heights, moved up and down alike until none covers another, within 0 to 1."""
    steps = np.concatenate([[0], np.cumsum((heights[:-1] + heights[1:]) / 2)])
    free = places - steps
    up, down = np.maximum.accumulate(free), np.minimum.accumulate(free[::-1])[::-1]
    return np.clip((up + down) / 2, heights[0] / 2, 1 - heights[-1] / 2 - steps[-1]) + steps


def _of_run(record: Record) -> str:
    """The profile of a record, and what an exploration changed in it."""
    run = record.run
    explored = run["parameters"] if run["name"].startswith("importance-") else {}
    return ", ".join([f"profile {run['profile']}", *(f"{name} {value}" for name, value in explored.items())])


def for_every_width(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make a drawing that can be drawn again in another style, by the figure's `draw_again()`."""

    @functools.wraps(draw)
    def drawn(*arguments, **named) -> Figure:
        figure = draw(*arguments, **named)
        figure.draw_again = functools.partial(draw, *arguments, **named)
        return figure

    return drawn


def narrow_too(figure: Figure) -> dict[str, str]:
    """The MIME bundle with a figure's PNG as wide as a single column, which the book shows on phones."""
    if not hasattr(figure, "draw_again"):
        return {}
    file = io.BytesIO()
    with plt.rc_context():
        use_style("single")
        narrow = figure.draw_again()
        narrow.savefig(file, format="png", dpi=NARROW_DPI)
    plt.close(narrow)
    return {NARROW_PICTURE: base64.b64encode(file.getvalue()).decode()}


def of_each(width: float, height: float, rows: float = 1) -> Callable:
    """Make a drawing of one record into one of several: one under the other, each under the name of its run."""

    def decorate(draw: Callable[[SubFigure, Record], None]) -> Callable[..., Figure]:
        @for_every_width
        @functools.wraps(draw)
        def drawn(*records: Record) -> Figure:
            figure = new_figure(width, height * len(records), rows)
            for part, record in zip(figure.subfigures(len(records), squeeze=False).flat, records, strict=True):
                draw(part, record)
                if len(records) > 1:
                    part.suptitle(_of_run(record), x=0.01, ha="left", fontsize="medium")
            return figure

        return drawn

    return decorate
