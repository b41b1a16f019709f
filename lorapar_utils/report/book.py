"""Stage the executed notebooks and the prose pages, and build the Jupyter Book from them.

Prose takes its numbers from records: `{{ effect("a claim of claims.yaml") }}` in a page of `book/`.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jinja2
import nbformat
import pandas as pd
from nbformat import NotebookNode
from PIL import Image

from lorapar_utils.records import Record, blocks, cite, cite_tuning, is_tuning, own_records, record_link, study
from lorapar_utils.report import agreement, claims, figures
from lorapar_utils.report.drawing import NARROW_PICTURE
from lorapar_utils.report.notebook import NOTHING
from lorapar_utils.settings import Settings, load_profile, project_root

RECORD_LINK = re.compile(r'href="(?:\.\./)*(?:runs/([\w.-]+)/records|results/([\w.-]+))/')
# From a notebook to a page: in JupyterLab they lie in two folders, in the book in one.
PAGE_LINK = re.compile(r"\]\(\.\./book/(?=\w+\.md\))")
HEADING = re.compile(r"^(?=#{2,} )", re.MULTILINE)
ICON_SCRIPT = re.compile(r'<script [^>]*src="[^"]*/fontawesome\.js[^"]*"></script>')
UNBROKEN = "\N{NON-BREAKING HYPHEN}"
EXTRAS = ("_config.yml", "_toc.yml", "references.bib", "claims.yaml")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("profile")
    parser.add_argument("--experiment", type=Path, required=True, help="the executed experiment notebook to show")
    parser.add_argument("--stamp", type=Path, required=True, help="file of book/_build that says whose book is there")
    options = parser.parse_args(arguments)
    settings = load_profile(options.profile)
    home = options.experiment.parent.parent.parent
    assemble(settings, options.experiment, home / "book")
    return build(home / "book", home / "book_build", options.stamp)


def assemble(settings: Settings, experiment: Path, source: Path) -> None:
    """Write the book's source folder anew: executed notebooks, rendered pages, figures, scripts.

    The other executed notebooks are in the folder above that of `experiment`.
    """
    book = project_root() / "book"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted(book.glob("*.md"))}
    shown = [name for name in figures.FIGURES if any(f"figures/{name}.svg" in text for text in pages.values())]
    shutil.copytree(book / "_static", source / "_static")
    narrow = source / "_static" / "narrow"
    published = figures.published()
    figures.save_all(published, source / "figures", shown, formats=["svg"])
    figures.save_all(published, narrow, shown, formats=["svg"], column="single")
    for path in sorted(experiment.parent.parent.glob("*.ipynb")):
        _write_notebook(path, source / path.name, narrow)
    _write_notebook(experiment, source / "experiment.ipynb", narrow)
    for name in EXTRAS:
        shutil.copy(book / name, source / name)
    _copy_records(settings, source / "_static" / "records")
    context = page_context(settings)
    for name, page in pages.items():
        text = render(page, context, name)
        (source / name).write_text(_with_records_of_the_book(text), encoding="utf-8")


def _copy_records(settings: Settings, target: Path) -> None:
    """Copy the records that pages may link to, one folder per profile: all that are published, then this run's."""
    without_items = shutil.ignore_patterns("*.items.jsonl", "adapters", "partition")
    for path in (project_root() / "results").glob("*/"):
        shutil.copytree(path, target / path.name, ignore=without_items)
    if (settings.runs / "records").is_dir():
        own = target / settings.profile
        shutil.copytree(settings.runs / "records", own, ignore=without_items, dirs_exist_ok=True)


def build(source: Path, out: Path, stamp: Path) -> int:
    """Run `jupyter-book build -W -n`: any warning fails. Replaces `book/_build/html` only when it succeeds."""
    shutil.rmtree(out, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "-W", "-n", "--keep-going"]
    process = subprocess.run([*command, "--path-output", str(out), str(source)])
    if process.returncode:
        return process.returncode
    _drop_icon_script(out / "_build" / "html")
    target = project_root() / "book" / "_build"
    target.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target / "html", ignore_errors=True)
    shutil.move(out / "_build" / "html", target / "html")
    for other in target.glob("*.stamp"):
        other.unlink()
    stamp.write_text("")
    return 0


def _drop_icon_script(html_folder: Path) -> None:
    """Remove the theme's icon script: it is over half of a page's bytes, and the theme also has the icons as a font."""
    for page in html_folder.rglob("*.html"):
        page.write_text(ICON_SCRIPT.sub("", page.read_text(encoding="utf-8")), encoding="utf-8")
    for script in (html_folder / "_static" / "scripts").glob("fontawesome.js*"):
        script.unlink()


def render(text: str, context: dict, name: str) -> str:
    """Fill the `{{ … }}` of a page. An unknown name is an error; a missing record reads "not measured"."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.comment_start_string, environment.comment_end_string = "{##", "##}"
    return environment.from_string(text).render(page=name, **context)


def _with_records_of_the_book(text: str) -> str:
    """`text` with the links of `records.record_link` turned to the copies of the records inside the book."""
    return RECORD_LINK.sub(r'href="_static/records/\1\2/', text)


def page_context(settings: Settings) -> dict:
    """The names that pages can use: `effect(claim)`, `verdict(claim)`, `table(name)`, …

    Numbers are those of the study's published records; `own` are this run's.
    """
    own = own_records(settings)
    link = partial(record_link, settings=settings)

    declared, published = claims.load_claims(), study()
    judged = {
        claim["claim"]: (claim, one)
        for claim, one in zip(declared, claims.judgements(published, declared), strict=True)
    }

    def effect(claim: str) -> str:
        """A claim's effect over blocks, with a link to its evidence, and its verdict."""
        declaration, one = judged[claim]
        if one.effect is None:
            return "not run yet"
        sides = [side["record"] for side in declaration["test"].values() if isinstance(side, dict)]
        paired = blocks([claims.named(published, name) for name in sides]).values()
        commits = ", ".join(sorted({str(record.run["commit"])[:10] for block in paired for record in block}))
        seeds = ", ".join(str(block[0].run["seed"]) for block in paired)
        title = html.escape(f"seeds {seeds} of {', '.join(sides)}; commit {commits}")
        count = f"{one.seeds} block{'s' * (one.seeds != 1)}"
        text = f"{claims.written(declaration, one, items=False)} ({count})"
        # An interval without 0 and "inconclusive" beside it want a reason.
        why = f" ({one.why})" if one.verdict == "inconclusive" and one.p_value is not None and one.why else ""
        return f'<a class="result" href="06_claims.html" title="{title}">{text}</a>: *{one.verdict}*{why}'

    def equal(claim: str) -> bool:
        """Whether the interval of a loss over blocks lies within `EQUAL_WITHIN` of 0; false without an interval."""
        reach = claims.EQUAL_WITHIN
        metric = judged[claim][1].effect
        return metric is not None and metric.low is not None and -reach < metric.low and metric.high < reach

    makers = {
        "agreement": lambda: agreement.verdicts(settings),
        "status": lambda: status_table((own or published).values(), link),
        "gpu_second": lambda: gpu_table("gpu-h100-second.json"),
        "gpu_third": lambda: gpu_table("gpu-h100-third.json"),
    }
    return {
        "settings": settings,
        "own": own,
        "effect": effect,
        "compared": any(one.over_items for _, one in judged.values()),
        "equal": equal,
        "verdict": lambda claim: f"*{judged[claim][1].verdict}*",
        "testable": sum(claim["test"]["kind"] != "none" for claim in declared),
        "verdicts": Counter(one.verdict for _, one in judged.values()).most_common(),
        "table": lambda name: to_markdown(makers[name]()),
        "sample": next(iter((own or published).values())),
    }


def status_table(records: Iterable[Record], link: Callable[[Record], str]) -> pd.DataFrame:
    """One row an experiment, one for all tuning: a link to each seed's record, their days, minutes and commits."""
    groups: dict[tuple[str, bool, str], list[Record]] = {}
    for record in records:
        name = "" if is_tuning(record) else record.experiment
        groups.setdefault((record.run["profile"], is_tuning(record), name), []).append(record)
    rows = []
    for (profile, tuning, name), group in sorted(groups.items()):
        seconds = [record.run["seconds"] for record in group if record.run["seconds"] is not None]
        commits = {
            (record.run["commit"] or "no git")[:10] + ("+changes" if record.run["dirty"] else "") for record in group
        }
        group.sort(key=lambda record: record.run["seed"])
        rows.append(
            {
                "profile": profile,
                "record": cite_tuning(group, link) if tuning else cite(name, group, link),
                "made": ", ".join(sorted({record.run["created"][:10] for record in group})).replace("-", UNBROKEN),
                "minutes": f"{sum(seconds) / 60:.1f}" if seconds else "–",
                "commit": ", ".join(sorted(commits)),
            }
        )
    return pd.DataFrame(rows)


def gpu_table(name: str) -> pd.DataFrame:
    """Measurements of `benchmarks/gpu.py`: seconds and peak memory of each part, beside a plain implementation's.

    A run that was stopped has only its first parts.
    """
    measured = json.loads((project_root() / "book" / "_static" / name).read_text(encoding="utf-8"))
    scoring, step, rollout = (measured.get(part) for part in ("scoring", "training", "rollout"))
    rows = [
        (
            f"importance of {scoring['examples']} examples, in batches",
            scoring,
            scoring["seconds"]["batched"],
            f"plain forward and backward {scoring['seconds']['plain_pass']:.2f} s, "
            f"one by one {scoring['seconds']['one_by_one']:.2f} s",
        ),
        (
            f"a step over {step['tokens']} tokens, activations kept, LoRA-PAR",
            step,
            step["seconds"]["lora_par"],
            f"LoRA with fused AdamW {step['seconds']['lora']:.3f} s",
        ),
    ]
    if rollout:
        row = (
            f"{rollout['completions']} completions of {rollout['tokens_each']} tokens",
            rollout,
            rollout["seconds"]["complete"],
            f"`model.generate` {rollout['seconds']['generate']:.2f} s",
        )
        rows.append(row)
    for stage in ("sft", "grpo"):
        rows += [
            (
                f"a step of {stage.upper()} by its trainer, {part['rows']} row{'s' * (part['rows'] > 1)} a pass"
                + (", activations computed again" if part["checkpointing"] else ""),
                part,
                part["seconds_a_step"],
                "",
            )
            for part in measured.get(stage, ())
        ]
    return pd.DataFrame(
        [
            {"what": what, "seconds": f"{taken:.3f}", "peak GB": f"{part['peak_bytes'] / 1e9:.1f}", "beside it": beside}
            for what, part, taken, beside in rows
        ]
    )


def to_markdown(frame: pd.DataFrame) -> str:
    """A pipe table; `|` inside a cell is escaped."""
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.astype(str).to_numpy().tolist()]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _write_notebook(path: Path, target: Path, narrow: Path) -> None:
    """Hide the injected cell; drop sections that only say that there is nothing, widget state and progress bars.

    The last two need scripts from the network.
    Pictures are kept with a palette, in a third of the bytes. Those for phones go into the folder `narrow`, under the
    names that MyST-NB gives the pictures whose place they take: the hash of their bytes.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    notebook.cells = [cell for section in _sections(notebook.cells) if not _says_nothing(section) for cell in section]
    for cell in notebook.cells:
        tags = cell.metadata.setdefault("tags", [])
        if "injected-parameters" in tags:
            tags.append("remove-cell")
        if cell.cell_type == "markdown":
            cell.source = PAGE_LINK.sub("](", cell.source)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not _is_progress(o)]
            for data in (o.data for o in cell.outputs if "data" in o):
                if "text/html" in data:
                    data["text/html"] = _with_records_of_the_book(data["text/html"])
                if "image/png" in data:
                    data["image/png"] = _with_palette(data["image/png"])
                if phone := data.pop(NARROW_PICTURE, None):
                    name = hashlib.sha256(base64.b64decode(data["image/png"])).hexdigest()
                    (narrow / f"{name}-single.png").write_bytes(base64.b64decode(_with_palette(phone)))
    target.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def _sections(cells: Iterable[NotebookNode]) -> list[list[NotebookNode]]:
    """Cells by the heading that they stand under; a text with several headings is cut before each."""
    sections: list[list[NotebookNode]] = [[]]
    for cell in cells:
        if cell.cell_type != "markdown":
            sections[-1].append(cell)
            continue
        for number, text in enumerate(HEADING.split(cell.source)):
            if HEADING.match(text):
                sections.append([])
            if text:
                sections[-1].append(NotebookNode(cell | {"id": f"{cell.id}-{number}", "source": text}))
    return sections


def _says_nothing(section: list[NotebookNode]) -> bool:
    """Whether the section's code shows a line that there is nothing to show, and no output beside it."""
    outputs = [output for cell in section for output in cell.get("outputs", ()) if not _is_progress(output)]
    return bool(outputs) and all(NOTHING.items() <= output.get("metadata", {}).items() for output in outputs)


def _with_palette(encoded: str) -> str:
    """A PNG (base64) in at most 256 colours; one with transparency stays as it is."""
    picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
    if "A" in picture.mode and picture.getextrema()[-1][0] < 255:
        return encoded
    file = io.BytesIO()
    picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _is_progress(output) -> bool:
    if output.output_type == "stream":
        return output.name == "stderr"
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


if __name__ == "__main__":
    sys.exit(main())
