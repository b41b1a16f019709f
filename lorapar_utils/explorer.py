"""The theta explorer: an interactive chart of a record's partition, in the published page and in JupyterLab alike.

Vega-Lite draws it in the reader's browser from counts that the record holds; its script is in the page, so nothing is
fetched. Its sliders are the browser's own, and work by keyboard.
"""

import base64
import html
import io

import altair as alt
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from lorapar_utils.plots import REGION_COLOURS, REGION_LABELS
from lorapar_utils.records import Record

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Controls above the chart, whatever the page's width, in the letters of the chart.
STYLE = (
    "<style>.vega-embed { display: flex !important; flex-direction: column-reverse !important; }"
    " .vega-bindings { font: 14px sans-serif; }</style>"
)
FRAME = "width: 100%; height: 660px; border: 0; background: white"
SHOWN = {"stage1": "active in stage 1", "stage2": "active in stage 2", "shared": "shared"}


def theta_explorer(record: Record) -> alt.VConcatChart:
    """Regions, active shares, Jaccard index and a layer x module map of the importance record, moved by three sliders.

    Parameters
    ----------
    record
        The importance record, with the table `explorer`.

    Returns
    -------
    altair.VConcatChart
        Sliders theta, alpha and beta, in the steps that the record counts.
    """
    counts = pd.DataFrame(record.result["tables"]["explorer"])

    # The record's own grid: evenly spaced up to 1, shares from none to all.
    theta_step = 1 / counts["theta"].nunique()
    shares = sum(column.startswith("stage1_") for column in counts) - 1

    def slider(name: str, value: float, low: float, step: float) -> alt.Parameter:
        return alt.param(name=name, value=value, bind=alt.binding_range(min=low, max=1, step=step, name=f"{name} "))

    choice = alt.binding_radio(options=list(SHOWN), labels=list(SHOWN.values()), name="map ")
    settings = [
        slider("theta", 0.9, theta_step, theta_step),
        slider("alpha", 1.0, 0.0, 1 / shares),
        slider("beta", 1.0, 0.0, 1 / shares),
        alt.param(name="shown", value="stage1", bind=choice),
    ]
    # As CSV: a third of what a row with its column names takes. Its numbers have to be told from words.
    numbers = {column: "number" for column in counts if column != "module"}
    data = alt.InlineData(values=counts.to_csv(index=False), format=alt.CsvDataFormat(type="csv", parse=numbers))
    here = (
        alt.Chart(data)
        .transform_filter("abs(datum.theta - theta) < 0.01")
        .transform_calculate(
            stage1=f"datum['stage1_' + round(alpha * {shares})]",
            stage2=f"datum['stage2_' + round(beta * {shares})]",
            inactive="datum.elements - datum.system1_only - datum.system2_only - datum.shared",
        )
    )
    summed = here.transform_aggregate(
        **{key: f"sum({key})" for key in (*REGION_LABELS, "stage1", "stage2", "elements")}, groupby=["theta"]
    )
    words = summed.transform_calculate(
        text="'theta ' + datum.theta + ': ' + format(datum.stage1 / datum.elements, '.1%') + ' active in stage 1, '"
        " + format(datum.stage2 / datum.elements, '.1%') + ' in stage 2\\nJaccard index '"
        " + format(datum.shared / (datum.shared + datum.system1_only + datum.system2_only), '.2f')"
    )
    line = (
        words.mark_text(align="left", fontSize=12, lineBreak="\n", dx=-70)
        .encode(text="text:N", x=alt.value(0))
        .properties(width=230, height=30)
    )
    labels = "{" + ", ".join(f"'{key}': '{label}'" for key, label in REGION_LABELS.items()) + "}"
    regions = (
        summed.transform_fold(list(REGION_LABELS), as_=["region", "count"])
        .transform_calculate(share="datum.count / datum.elements", label=f"{labels}[datum.region]")
        .mark_bar()
        .encode(
            x=alt.X(
                "share:Q", title="share of all elements", axis=alt.Axis(format="%"), scale=alt.Scale(domain=[0, 1])
            ),
            y=alt.Y("label:N", title=None, sort=list(REGION_LABELS.values())),
            color=alt.Color(
                "label:N",
                legend=None,
                scale=alt.Scale(
                    domain=list(REGION_LABELS.values()), range=[REGION_COLOURS[key] for key in REGION_LABELS]
                ),
            ),
            tooltip=[alt.Tooltip("label:N", title="region"), alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=230, height=90)
    )
    layers = (
        here.transform_calculate(share="datum[shown] / datum.elements")
        .mark_rect()
        .encode(
            x=alt.X("module:N", title=None, sort=MODULES, axis=alt.Axis(labelExpr="replace(datum.label, '_proj', '')")),
            y=alt.Y("layer:O", title="layer", sort="ascending"),
            color=alt.Color(
                "share:Q",
                title="share",
                scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                legend=alt.Legend(format="%"),
            ),
            tooltip=["layer:O", "module:N", alt.Tooltip("share:Q", format=".1%")],
        )
        .properties(width=200, height=300)
    )
    return (
        alt.vconcat(line, regions, layers)
        .resolve_scale(color="independent")
        .add_params(*settings)
        .configure_view(stroke=None)
    )


class Page:
    """How Jupyter and the book show a chart: as HTML that needs no network, with a picture where scripts do not run.

    In a frame of its own: the chart's scripts and those of the page around it use the same names.
    """

    def __init__(self, chart: alt.VConcatChart, picture: Figure, alt_text: str):
        self.chart, self.picture, self.alt_text = chart, picture, alt_text
        plt.close(picture)  # or a notebook would also show it by itself

    def _repr_html_(self) -> str:
        drawn = self.chart.to_html(inline=True, embed_options={"actions": False, "renderer": "svg"})
        png = io.BytesIO()
        self.picture.savefig(png, format="png", dpi=80)
        source = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        text = html.escape(self.alt_text)
        fallback = f'<noscript><img alt="{text}" style="max-width: 100%" src="{source}"></noscript>'
        inside = drawn.replace("<html>", '<html lang="en">').replace("<head>", f"<head><title>{text}</title>{STYLE}", 1)
        inside = inside.replace("</body>", f"{fallback}</body>")
        # Between single quotes: scripts and data are full of double ones.
        quoted = inside.replace("&", "&amp;").replace("'", "&#x27;")
        return f'<iframe title="{text}" srcdoc=\'{quoted}\' style="{FRAME}"></iframe>'
