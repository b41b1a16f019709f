import ast
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pandas as pd
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lorapar_utils.report import book, notebook

PAIRS = sorted((ROOT / "notebooks").glob("*.py"))
# Prose whose numbers are settings, dates or notes of single runs, each for a reason that its page states.
EXEMPT = {"lab_log.md", "protocol.md"}
RESULT = re.compile(r"\d+(?:\.\d+)?\s?(?:%|percent\b|points\b)")


def typed_results(text: str) -> list[str]:
    """Percentages and points in prose that no expression, code span or code block holds."""
    for hidden in (
        r"```.*?```",
        r"\{\{.*?\}\}",
        r"\{%.*?%\}",
        r"`[^`]*`",
        r"<!-- results:begin -->.*?<!-- results:end -->",
    ):
        text = re.sub(hidden, "", text, flags=re.S)
    return RESULT.findall(text)


def test_every_notebook_is_there():
    expected = [
        "00_tour",
        "01_voting",
        "02_importance",
        "03_theta_ablation",
        "04_two_stage",
        "05_benchmarks",
        "06_claims",
        "07_your_run",
        "experiment",
        "use",
    ]
    assert [path.stem for path in PAIRS] == expected


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_pair_has_equal_content_and_no_outputs(path):
    script, notebook = jupytext.read(path), nbformat.read(path.with_suffix(".ipynb"), as_version=4)
    assert [(c.cell_type, c.source) for c in script.cells] == [(c.cell_type, c.source) for c in notebook.cells]
    assert [c.metadata.get("tags") for c in script.cells] == [c.metadata.get("tags") for c in notebook.cells]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_text_can_be_cut_before_each_line_that_looks_like_a_heading(path):
    """The book leaves out sections: no such line is in a block of code, and no label stands before one."""
    for cell in jupytext.read(path).cells:
        blocks = re.findall(r"```.*?```", cell.source, flags=re.S) if cell.cell_type == "markdown" else []
        assert not any(book.HEADING.search(block) for block in blocks) and not re.search(
            r"^\(.*\)=$", cell.source, re.M
        )


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_a_link_to_a_page_leads_to_its_file_in_jupyterlab(path):
    """The book turns it into a link beside the page."""
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")) if ":" not in link]
    assert [link for link in links if not (path.parent / link).is_file()] == []
    pages = [link for link in links if link.endswith(".md")]
    assert [book.PAGE_LINK.sub("](", f"]({link})") for link in pages] == [f"]({Path(link).name})" for link in pages]


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_opens_with_question_and_one_literal_parameters_cell(path):
    cells = jupytext.read(path).cells
    for word in ("Question", "Paper", "Inputs", "Outputs", "Cost"):
        assert f"**{word}.**" in cells[0].source
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1 and all(re.match(r"\w+ = ", line) for line in tagged[0].source.splitlines())


def prose() -> dict[str, str]:
    pages = {p.name: p.read_text() for p in [ROOT / "README.md", *(ROOT / "book").glob("*.md")] if p.name not in EXEMPT}
    for path in PAIRS:
        pages[path.name] = "\n".join(c.source for c in jupytext.read(path).cells if c.cell_type == "markdown")
    return pages


@pytest.mark.parametrize("name", sorted(prose()))
def test_no_hand_typed_result(name):
    assert not typed_results(prose()[name])


@pytest.mark.parametrize("path", PAIRS, ids=lambda path: path.stem)
def test_what_a_cell_shows_is_its_last_expression(path):
    """IPython shows nothing of an `if`."""
    for cell in (cell for cell in jupytext.read(path).cells if cell.cell_type == "code"):
        last = ast.parse(cell.source).body[-1]
        inside = [node for node in ast.walk(last) if isinstance(node, ast.Expr) and node is not last]
        assert not any(ast.unparse(node).startswith("notebook.") for node in inside), cell.source


@pytest.mark.parametrize("name", sorted(prose()))
def test_formulas_of_several_lines_are_drawn_by_jupyterlab_too(name):
    """MathJax takes `&` in an environment alone."""
    for formula in re.findall(r"\$\$(.+?)\$\$", prose()[name], re.S):
        assert "&" not in re.sub(r"\\begin\{(\w+)\}.*\\end\{\1\}", "", formula, flags=re.S), formula


def test_a_planted_result_is_found():
    assert typed_results("LoRA-PAR reaches 41.8 % here.") and typed_results("a gain of 3 points")
    assert not typed_results("reaches {{ percent('a', 'b') }}, see `40 %`")


def papermill(tmp_path, notebook, *parameters):
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        f"notebooks/{notebook}.ipynb",
        str(tmp_path / "out.ipynb"),
    ]
    for name, value in zip(parameters[::2], parameters[1::2], strict=True):
        command += ["-p", name, value]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("notebook", "parameters", "message"),
    [
        (
            "02_importance",
            ("profile", "smoke", "thetta", "0.8"),
            "thetta is no parameter of this notebook; it has alpha",
        ),
        ("02_importance", ("profile", "smoke", "theta", "1.5"), "partition.theta = 1.5"),
        ("06_claims", ("profile", "smokey"), "no 'smokey'; choose one of gemma3-270m, laptop"),
    ],
)
def test_bad_papermill_parameters_stop_with_one_message(tmp_path, notebook, parameters, message):
    done = papermill(tmp_path, notebook, *parameters)
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize("page", ["00_tour", "02_importance"])
def test_a_page_that_is_told_to_read_loads_no_model_and_shows_what_was_published(page, tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPAR_CACHE", str(tmp_path / "no models here"))
    before = sorted((ROOT / "runs").rglob("*.json"))
    done = papermill(tmp_path, page, "compute", "False")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (tmp_path / "no models here").exists() and sorted((ROOT / "runs").rglob("*.json")) == before
    cells = nbformat.read(tmp_path / "out.ipynb", as_version=4).cells
    shown = [output for cell in cells for output in cell.get("outputs", []) if "data" in output]
    assert len(shown) >= 4 and any('href="results/' in output.data.get("text/html", "") for output in shown)


@pytest.mark.parametrize("page", ["03_theta_ablation", "04_two_stage", "05_benchmarks", "06_claims", "07_your_run"])
def test_pages_of_tables_train_nothing(page):
    """Their imports, run alone, load no trainer; so they cannot call one."""
    cells = [cell.source for cell in jupytext.read(ROOT / "notebooks" / f"{page}.py").cells if cell.cell_type == "code"]
    imports = [line for source in cells for line in source.splitlines() if re.match(r"(from|import) ", line)]
    code = "\n".join([*imports, "import sys", "print({'trl', 'lm_eval', 'transformers'} & set(sys.modules))"])
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_a_section_that_only_says_that_there_is_nothing_is_left_out_of_the_book(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(notebook, "display", lambda text, metadata: said.append((text.data, metadata)))
    notebook.shown(pd.DataFrame(), "No record yet.")
    ((text, metadata),) = said
    nothing = new_output("display_data", {"text/markdown": text}, metadata=metadata)
    table = new_output("display_data", {"text/html": "<table></table>"})
    cells = [
        new_markdown_cell("# Page\n\n## The idea\n\nWords.\n\n## This run\n\nIts records:"),
        new_code_cell(outputs=[new_output("stream", name="stderr", text="progress"), nothing]),
        new_code_cell(),  # a second table without a line of its own
        new_markdown_cell("## Both\n\nWords."),
        new_code_cell(outputs=[nothing]),
        new_code_cell(outputs=[table]),
        new_markdown_cell("## No code\n\nWords.\n\n### Method"),
        new_code_cell("1"),
    ]
    nbformat.write(new_notebook(cells=cells), tmp_path / "executed.ipynb")
    book._write_notebook(tmp_path / "executed.ipynb", tmp_path / "page.ipynb", tmp_path)
    page = nbformat.read(tmp_path / "page.ipynb", as_version=4)
    headings = [line for cell in page.cells for line in cell.source.splitlines() if line.startswith("#")]
    assert headings == ["# Page", "## The idea", "## Both", "## No code", "### Method"]
    assert [len(cell.outputs) for cell in page.cells if cell.cell_type == "code"] == [1, 1, 0]
    assert len({cell.id for cell in page.cells}) == len(page.cells)
