"""Tables on a phone: each cell is named by its column, and stays a cell for screen readers."""

import pandas as pd
import pytest
from bs4 import BeautifulSoup

from lorapar_utils.report.stacked_tables import stacked

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


@pytest.mark.parametrize("table", [FRAME[["arm", "loss"]].to_html(index=False), "<table><tr></tr></table>"])
def test_a_narrow_table_or_one_without_a_head_stays_as_it_is(table):
    assert stacked(table) == table
