"""On a phone: each cell of a table is named by its column, and stays a cell; figures are the narrow drawings."""

import base64
import hashlib
import io

import matplotlib.pyplot as plt
import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from matplotlib.figure import Figure
from PIL import Image

from lorapar_utils.report import book, drawing, figures
from lorapar_utils.report.narrow_screens import picture, stacked

FRAME = pd.DataFrame({"arm": ["LoRA", "LoRA-PAR"], "loss": [0.1, 0.2], "System 1, %": [60, 61], "seeds": [5, 5]})


def cells(table: str) -> list[list[tuple[str, str]]]:
    rows = BeautifulSoup(table, "html.parser").select("tbody tr")
    return [[(cell.get("data-label"), cell.text) for cell in row.find_all(["th", "td"])] for row in rows]


def test_each_cell_is_named_by_its_column_and_has_a_role():
    table = stacked(FRAME.style.hide(axis="index").to_html().partition("</style>")[2])
    first, _ = cells(table)
    assert [label for label, _ in first] == list(FRAME) and first[0][1] == "LoRA"
    tags = BeautifulSoup(table, "html.parser")
    assert tags.table["role"] == "table" and "stacked" in tags.table["class"]
    assert {tag["role"] for tag in tags.find_all(["th", "td"])} == {"columnheader", "cell"}


def test_a_column_of_the_index_has_its_own_name():
    table = stacked(FRAME.set_index("arm").assign(more=1).rename_axis("metric", axis="columns").to_html())
    assert [label for label, _ in cells(table)[0]] == ["arm", "loss", "System 1, %", "seeds", "more"]


def test_a_cell_without_words_has_nothing_to_show():
    table = (
        FRAME.to_html(index=False).replace("<td>60</td>", "<td><p></p></td>").replace("<td>61</td>", "<td><img></td>")
    )
    tags = BeautifulSoup(stacked(table), "html.parser")
    assert [len(cell.contents) for cell in tags.find_all("td", {"data-label": "System 1, %"})] == [0, 1]


@pytest.mark.parametrize("table", [FRAME[["arm", "loss"]].to_html(index=False), "<table><tr></tr></table>"])
def test_a_narrow_table_or_one_without_a_head_stays_as_it_is(table):
    assert stacked(table) == table


def test_a_figure_that_has_a_narrow_drawing_shows_it_on_a_phone():
    image = '<img alt="Bars." src="_images/0a1b.png" />'
    tags = BeautifulSoup(picture(image, {"0a1b-single.png"}, "_static/narrow"), "html.parser")
    assert tags.picture.source["srcset"] == "_static/narrow/0a1b-single.png" and tags.picture.img["alt"] == "Bars."
    assert picture(image, {"0a1b-single.svg", "other-single.png"}, "_static/narrow") == image
    for without in ('<img alt="Bars.">', '<img data-src="0a1b.png">', '<img src="data:image/png;base64,iVBO+/8=">'):
        assert picture(without, {"0a1b-single.png", "-single"}, "_static/narrow") == without


def test_a_notebooks_figure_carries_its_narrow_drawing_into_the_book(tmp_path):
    drawing.use_style()
    figure, before = figures.pipeline("voting"), (plt.rcParams.copy(), plt.get_fignums())
    bundle = drawing.narrow_too(figure) | {"image/png": png(figure)}
    assert (plt.rcParams, plt.get_fignums()) == before
    plt.close(figure)
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", bundle)])
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "executed.ipynb")
    book._write_notebook(tmp_path / "executed.ipynb", tmp_path / "page.ipynb", tmp_path)

    (output,) = nbformat.read(tmp_path / "page.ipynb", 4).cells[0].outputs
    shown = hashlib.sha256(base64.b64decode(output.data.pop("image/png"))).hexdigest()
    narrow = Image.open(tmp_path / f"{shown}-single.png")
    assert not output.data and narrow.width == pytest.approx(3.25 * drawing.NARROW_DPI, abs=1)


def test_a_figure_that_was_not_drawn_by_the_package_has_no_narrow_drawing():
    assert drawing.narrow_too(Figure()) == {}


def png(figure: Figure) -> str:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return base64.b64encode(file.getvalue()).decode()
