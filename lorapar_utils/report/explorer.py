"""The theta explorer: an interactive chart of a record's partition, in the published page and in JupyterLab alike.

Vega-Lite draws the chart in the reader's browser from counts in the record. The page contains the script, so nothing is
fetched. The sliders are the browser's own, so they work by keyboard.
"""

import base64
import gzip
import html
import io
import re
from collections.abc import Iterable, Sequence

import altair as alt
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lorapar_utils.records import Record, null_model
from lorapar_utils.report.figures import MODULES, REGION_COLOURS, REGION_LABELS

# Puts the controls above the chart at any page width, in the chart's font.
STYLE = (
    "<style>.vega-embed { display: flex !important; flex-direction: column-reverse !important; }"
    " .vega-bindings { font: 14px sans-serif; }</style>"
)
FRAME = "width: 100%; height: 800px; border: 0; background: white"
# Parameters of LoRA-PAR after stage 1 as the study's arms by theta have them.
PLAIN_ARM = {
    "method": "lorapar",
    "selection": "importance",
    "measured_on": "test",
    "stages": ["sft"],
    "init": "normal",
    "alpha": 1.0,
    "flipped": 0.0,
}
BYTES_OF_MOMENTS = 8  # of each active element: AdamW's two, in fp32
# Unpacks the chart's scripts, which are more than half of a page's bytes otherwise, and runs them in order.
UNPACK = """<script>(async () => {
  for (const packed of %s) {
    const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.body.append(script);
  }
})();</script>"""
# Where there is room the map stands beside the rest; the frame is as high as what it holds. `spec` is the chart's.
LAYOUT = """
  if (innerWidth > 640) {
    const map = spec.vconcat.pop();
    spec.hconcat = [{vconcat: spec.vconcat}, map];
    delete spec.vconcat;
  }
  const fit = () => { frameElement.style.height = document.body.scrollHeight + 24 + "px"; };
  new ResizeObserver(fit).observe(document.body);
  """
SHOWN = {"stage1": "active in stage 1", "stage2": "active in stage 2", "shared": "shared"}


def theta_explorer(record: Record, arms: Iterable[Record] = ()) -> alt.VConcatChart:
    """Regions, active shares, Jaccard index and a layer x module map of the importance record, under three sliders.

    Beside them: the shares of a model without two systems, and what training found at that theta.

    Parameters
    ----------
    record
        The importance record, with the table `explorer`.
    arms
        Records of the study; those of LoRA-PAR after stage 1 count.

    Returns
    -------
    altair.VConcatChart
        The sliders theta, alpha and beta move over the values that the record has counts for.
    """
    counts = pd.DataFrame(record.result["tables"]["explorer"])
    shares = sum(column.startswith("stage1_") for column in counts) - 1
    rows = _at_current_theta(counts, shares)
    summed = rows.transform_aggregate(
        **{key: f"sum({key})" for key in (*REGION_LABELS, "stage1", "stage2", "elements")}, groupby=["theta"]
    )
    beside = _beside(record, arms, sorted(counts["theta"].unique()))
    chart = alt.vconcat(_summary_line(summed), _beside_line(beside), _region_bars(summed), _layer_map(rows))
    chart = chart.resolve_scale(color="independent").add_params(*_sliders(counts["theta"].nunique(), shares))
    return chart.configure_view(stroke=None)


def _sliders(thetas: int, shares: int) -> list[alt.Parameter]:
    """Sliders over the record's grid, which is evenly spaced up to 1, and the choice of the map's quantity."""

    def slider(name: str, value: float, low: float, step: float) -> alt.Parameter:
        return alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=1, step=step, name=f"{name} "))

    choice = alt.binding_radio(options=list(SHOWN), labels=list(SHOWN.values()), name="map ")
    return [
        slider("theta", 0.9, 1 / thetas, 1 / thetas),
        slider("alpha", 1.0, 0.0, 1 / shares),
        slider("beta", 1.0, 0.0, 1 / shares),
        alt.param(name="shown", value="stage1", bind=choice),
    ]


def _at_current_theta(counts: pd.DataFrame, shares: int) -> alt.Chart:
    """The counts at the sliders' theta, alpha and beta."""
    # CSV takes a third of the space of JSON rows. It has to say which columns are numbers.
    numbers = {column: "number" for column in counts if column != "module"}
    data = alt.InlineData(values=counts.to_csv(index=False), format=alt.CsvDataFormat(type="csv", parse=numbers))
    rows = alt.Chart(data).transform_filter("abs(datum.theta - theta) < 0.01")
    return rows.transform_calculate(
        stage1=f"datum['stage1_' + round(alpha * {shares})]",
        stage2=f"datum['stage2_' + round(beta * {shares})]",
        inactive="datum.elements - datum.system1_only - datum.system2_only - datum.shared",
    )


def _summary_line(summed: alt.Chart) -> alt.Chart:
    words = summed.transform_calculate(
        text="'theta ' + datum.theta + ': ' + format(datum.stage1 / datum.elements, '.1%') + ' active in stage 1,\\n'"
        " + format(datum.stage2 / datum.elements, '.1%') + ' in stage 2\\nJaccard index '"
        " + format(datum.shared / (datum.shared + datum.system1_only + datum.system2_only), '.2f')"
        f" + ';\\noptimizer moments ' + format(datum.stage1 * {BYTES_OF_MOMENTS} / 1e6, '.1f') + ' MB in stage 1'"
    )
    return _line(words, lines=4)


def _line(words: alt.Chart, lines: int) -> alt.Chart:
    text = words.mark_text(align="left", fontSize=12, lineBreak="\n", dx=-70)
    return text.encode(text="text:N", x=alt.value(0)).properties(width=230, height=15 * lines)


def _beside(record: Record, arms: Iterable[Record], thetas: Sequence[float]) -> pd.DataFrame:
    """What stands beside the partition at each theta, in words."""
    null = null_model.without_systems(record, thetas).groupby("theta")[["active", "jaccard"]].agg(["min", "max"])
    trained: dict[float, list[Record]] = {}
    for arm in arms:
        asked = arm.run["parameters"]
        if all(asked.get(key) == value for key, value in PLAIN_ARM.items()):
            trained.setdefault(asked["theta"], []).append(arm)
    rows = []
    for theta in thetas:
        (least, most), (low, high) = null.loc[theta, "active"], null.loc[theta, "jaccard"]
        text = f"without two systems: {least:.0%} to {most:.0%} a system,\nJaccard index {low:.2f} to {high:.2f}\n"
        at_theta = next((runs for at, runs in trained.items() if abs(at - theta) < 1e-6), [])
        means = {
            key: sum(run.metric(f"stage1/{key}").value for run in at_theta) / len(at_theta)
            for key in ("system1", "loss1")
            if at_theta
        }
        blocks = f"{len(at_theta)} block{'s' * (len(at_theta) > 1)}"
        text += (
            f"the study, System 1 after stage 1: {means['system1']:.1%},\nloss {means['loss1']:.3f} ({blocks})"
            if at_theta
            else "the study has not trained at this theta"
        )
        rows.append({"theta": theta, "text": text})
    return pd.DataFrame(rows)


def _beside_line(beside: pd.DataFrame) -> alt.Chart:
    return _line(alt.Chart(beside).transform_filter("abs(datum.theta - theta) < 0.01"), lines=4)


def _region_bars(summed: alt.Chart) -> alt.Chart:
    names = "{" + ", ".join(f"'{key}': '{label}'" for key, label in REGION_LABELS.items()) + "}"
    labels, colours = list(REGION_LABELS.values()), [REGION_COLOURS[key] for key in REGION_LABELS]
    shares = summed.transform_fold(list(REGION_LABELS), as_=["region", "count"]).transform_calculate(
        share="datum.count / datum.elements", label=f"{names}[datum.region]"
    )
    axis, unit = alt.Axis(format="%"), alt.Scale(domain=[0, 1])
    bars = shares.mark_bar().encode(
        x=alt.X("share:Q", title="share of all elements", axis=axis, scale=unit),
        y=alt.Y("label:N", title=None, sort=labels),
        color=alt.Color("label:N", legend=None, scale=alt.Scale(domain=labels, range=colours)),
        tooltip=[alt.Tooltip("label:N", title="region"), alt.Tooltip("share:Q", format=".1%")],
    )
    return bars.properties(width=230, height=90)


def _layer_map(rows: alt.Chart) -> alt.Chart:
    axis = alt.Axis(labelExpr="replace(datum.label, '_proj', '')")
    scale = alt.Scale(scheme="viridis", reverse=True, domain=[0, 1])
    cells = rows.transform_calculate(share="datum[shown] / datum.elements").mark_rect()
    layers = cells.encode(
        x=alt.X("module:N", title=None, sort=list(MODULES), axis=axis),
        y=alt.Y("layer:O", title="layer", sort="ascending"),
        color=alt.Color("share:Q", title="share", scale=scale, legend=alt.Legend(format="%")),
        tooltip=["layer:O", "module:N", alt.Tooltip("share:Q", format=".1%")],
    )
    return layers.properties(width=200, height=300, title="share of a module's elements, by layer")


class Page:
    """A chart for Jupyter and the book: HTML that needs no network, with a picture for readers without scripts.

    The chart is in a frame, because the chart's scripts and the page's scripts use the same names.
    """

    def __init__(self, chart: alt.VConcatChart, picture: Figure, alt_text: str):
        self.chart, self.picture, self.alt_text = chart, picture, alt_text
        plt.close(picture)  # a notebook shows open figures a second time

    def _repr_html_(self) -> str:
        chart = self.chart.to_html(inline=True, embed_options={"actions": False, "renderer": "svg"})
        png = io.BytesIO()
        self.picture.savefig(png, format="png", dpi=80)
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        text = html.escape(self.alt_text)
        fallback = f'<noscript><img alt="{text}" style="max-width: 100%" src="{source}"></noscript>'
        chart = chart.replace("vegaEmbed('#vis'", LAYOUT + "vegaEmbed('#vis'", 1)
        inside = chart.replace("<html>", '<html lang="en">').replace("<head>", f"<head><title>{text}</title>{STYLE}", 1)
        scripts = re.findall(r"<script[^>]*>(.*?)</script>", inside, re.S)
        packed = [base64.b64encode(gzip.compress(script.encode(), mtime=0)).decode() for script in scripts]
        inside = re.sub(r"<script[^>]*>.*?</script>", "", inside, flags=re.S)
        inside = inside.replace("</body>", f"{UNPACK % packed}{fallback}</body>")
        # In single quotes, because scripts and data contain many double quotes.
        quoted = inside.replace("&", "&amp;").replace("'", "&#x27;")
        return f'<iframe title="{text}" srcdoc=\'{quoted}\' style="{FRAME}"></iframe>'
