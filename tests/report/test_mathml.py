"""Formulas are MathML when the book is built, with numbers that pages refer to, and no script."""

import re

import jupytext
import pytest
from conftest import ROOT
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?![\s$])([^$\n]+?)(?<!\s)\$(?![\d$])", re.S)


def sources():
    for path in sorted((ROOT / "book").glob("*.md")):
        yield path.name, re.sub(r"```.*?```|`[^`\n]*`", "", path.read_text(), flags=re.S)
    for path in sorted((ROOT / "notebooks").glob("*.py")):
        text = "\n\n".join(cell.source for cell in jupytext.read(path).cells if cell.cell_type == "markdown")
        yield path.name, re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)


FORMULAS = [(name, display or inline) for name, text in sources() for display, inline in FORMULA.findall(text)]


def test_pages_have_formulas_and_refer_to_labels_that_exist():
    assert len(FORMULAS) > 20
    everything = "".join(text for _, text in sources())
    plain = "".join(path.read_text() for path in [*(ROOT / "book").glob("*.md"), *(ROOT / "notebooks").glob("*.py")])
    labels = re.findall(r"\$\$ \((eq-[\w-]+)\)", everything)
    assert len(labels) == len(set(labels)) >= 9
    assert set(re.findall(r"\{eq\}`(eq-[\w-]+)`", plain)) <= set(labels)


@pytest.mark.parametrize(("name", "formula"), FORMULAS)
def test_every_formula_of_the_book_can_be_written(name, formula):
    written = tex2mathml(formula, as_block=True)
    assert "merror" not in written and "\\" not in written.replace("<mi>\\</mi>", "")
    # docutils sets an index of an accented letter below the letter.
    assert not re.search(r"\\(?:hat|bar|tilde)\S*_", formula)


def test_a_formula_becomes_mathml_with_a_number_and_without_a_script(tmp_path):
    (tmp_path / "index.md").write_text(
        "# Page\n\n$$I = \\sum_j x_j$$ (eq-sum)\n\nBy {eq}`eq-sum`, $x$ costs $5 or $7.\n"
    )
    options = {
        "extensions": ["myst_parser", "lorapar_utils.report.mathml"],
        "myst_enable_extensions": ["dollarmath"],
        "myst_dmath_allow_digits": False,
        "myst_dmath_allow_space": False,
        "html_math_renderer": "mathml",
    }
    places = [tmp_path, tmp_path / "out", tmp_path / "trees"]
    app = Sphinx(tmp_path, None, *places[1:], "html", options, status=None, warningiserror=True)
    app.build()
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("<math") == 2 and '<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">' in page
    assert re.search(r'<div class="math" id="equation-eq-sum">.*?<span class="eqno">\(1\)', page, re.S)
    assert re.search(r'href="#equation-eq-sum">\(1\)<', page) and "costs $5 or $7" in page
    assert not re.search(r"<script[^>]*mathjax", page, re.I)
