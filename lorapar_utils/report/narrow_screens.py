"""A Sphinx extension for phones: the cells of a table's row stand below each other, and figures are drawn narrower.

`custom.css` stacks tables of the class `stacked` on narrow screens. Roles keep them tables for screen readers there.
The narrow drawing of `_images/NAME.png` is `_static/narrow/NAME-single.png`, which `report.book` writes.
"""

import re
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

FEW_COLUMNS = 2  # columns that fit a phone side by side
SCREEN = "(max-width: 600px)"  # as in `custom.css`
ROLES = {"table": "table", "thead": "rowgroup", "tbody": "rowgroup", "tr": "row", "td": "cell"}


def setup(app: Sphinx) -> dict:
    app.connect("html-page-context", _fit)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def _fit(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    body = context.get("body", "")
    if "<table" in body:
        body = re.sub(r"<table.*?</table>", lambda table: stacked(table[0]), body, flags=re.S)
    if "<img" in body:
        names = {path.name for path in (Path(app.srcdir) / "_static" / "narrow").glob("*-single.*")}
        address = context["pathto"]("_static/narrow", resource=True)
        body = re.sub(r"<img [^>]*>", lambda image: picture(image[0], names, address), body)
    if body:
        context["body"] = body


def picture(image: str, names: set[str], address: str) -> str:
    """The tag `<img>` within a `<picture>` that has the narrow drawing of it; unchanged if `names` has none."""
    source = re.search(r'\ssrc="(?:[^"]*/)?([^"/]*?)(\.\w+)"', image)
    name = "{}-single{}".format(*source.groups()) if source else ""
    if name not in names:
        return image
    return f'<picture><source media="{SCREEN}" srcset="{address}/{name}">{image}</picture>'


def stacked(table: str) -> str:
    """The table with `data-label`, the name of its column, in each cell; unchanged if it is narrow or has no head."""
    soup = BeautifulSoup(table, "html.parser")
    columns = _columns(soup)
    if len(columns) <= FEW_COLUMNS:
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
                if not cell.get_text(strip=True) and not cell.find(["img", "svg"]):
                    cell.clear()  # the style sheet hides cells that are empty
    return str(soup)


def _columns(soup: BeautifulSoup) -> list[str]:
    """The lowest name that the head has for each column; a frame with an index has two rows of them."""
    rows = [row.find_all("th", recursive=False) for row in soup.select("thead tr")]
    widest = max(map(len, rows), default=0)
    whole = [[_name(cell) for cell in row] for row in rows if len(row) == widest]
    return [next(filter(None, reversed(names)), "") for names in zip(*whole, strict=True)]


def _name(cell: Tag) -> str:
    return " ".join(cell.get_text().split())
