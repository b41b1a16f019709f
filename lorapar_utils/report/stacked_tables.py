"""A Sphinx extension that names each cell of a table by its column: a phone shows a row's cells below each other.

`custom.css` stacks tables of the class `stacked` on narrow screens. Roles keep them tables for screen readers there.
"""

import re

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

NARROW = 2  # columns that fit a phone side by side
ROLES = {"table": "table", "thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "td": "cell"}


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", _stack)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _stack(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    if "<table" in context.get("body", ""):
        context["body"] = re.sub(r"<table.*?</table>", lambda table: stacked(table[0]), context["body"], flags=re.S)


def stacked(table: str) -> str:
    """The table with `data-label`, the name of its column, in each cell; unchanged if it is narrow or has no head."""
    soup = BeautifulSoup(table, "html.parser")
    columns = _columns(soup)
    if len(columns) <= NARROW:
        return table
    soup.table["class"] = [*soup.table.get("class", []), "stacked"]
    for name, role in ROLES.items():
        for tag in soup.find_all(name):
            tag["role"] = role
    for head in soup.find_all("th"):
        head["role"] = "columnheader" if head.find_parent("thead") else "rowheader"
    for row in soup.select("tbody tr"):
        cells = row.find_all(["th", "td"], recursive=False)
        if len(cells) == len(columns):
            for cell, column in zip(cells, columns, strict=True):
                cell["data-label"] = column
    return str(soup)


def _columns(soup: BeautifulSoup) -> list[str]:
    """The lowest name that the head has for each column; a frame with an index has two rows of them."""
    rows = [row.find_all("th", recursive=False) for row in soup.select("thead tr")]
    widest = max(map(len, rows), default=0)
    whole = [[_name(cell) for cell in row] for row in rows if len(row) == widest]
    return [next(filter(None, reversed(names)), "") for names in zip(*whole, strict=True)]


def _name(cell: Tag) -> str:
    return cell.get_text(" ", strip=True)
