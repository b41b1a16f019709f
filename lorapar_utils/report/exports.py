"""Tables as HTML, CSV and LaTeX (booktabs), from records, without training and torch."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lorapar_utils.cache import write_atomically
from lorapar_utils.records import Record, read_records, study
from lorapar_utils.report import claims, figures, tables


def _swept(name: str) -> Callable[[dict[str, Record]], list[Record]]:
    return lambda records: [record for record in records.values() if record.run["parameters"].get("sweep") == name]


# Table name -> (selection of records, function from records to the table). The study's are always of its published
# records.
TABLES: dict[str, tuple[Callable, Callable]] = {
    "study_stage1": (lambda records: study().values(), tables.arms_table),
    "study_stage2": (lambda records: study().values(), tables.reinforced_table),
    "claims": (lambda records: study(), claims.scoreboard),
    "stages": (figures.two_stage_records, tables.stage_table),
    "table1_voting": (_swept("voting"), tables.voting_table),
    "table2_alpha_beta": (figures.two_stage_records, tables.alpha_beta_table),
    "table3_theta": (figures.stage1_records, tables.theta_table),
    "table4_methods": (figures.two_stage_records, tables.benchmark_table),
    "table7_order": (figures.two_stage_records, tables.order_table),
}


def save_all(records: dict[str, Record], folder: Path) -> list[Path]:
    """Write each table as .html, .csv and .tex, if the table's records exist; the same records give the same bytes."""
    paths = []
    for name, (choose, make) in TABLES.items():
        frame = make(choose(records))
        if frame.empty:
            print(f"{name}: skipped, there is no record of it")
            continue
        table = frame.drop(columns="records", errors="ignore")  # only the .csv names the records of each row
        texts = {"html": table.to_html(index=False, border=0), "csv": frame.to_csv(index=False), "tex": _latex(table)}
        for suffix, text in texts.items():
            write_atomically(folder / f"{name}.{suffix}", text)
            paths.append(folder / f"{name}.{suffix}")
    return paths


def _latex(frame: pd.DataFrame) -> str:
    style = (
        frame.style.format(escape="latex", precision=2).format_index(escape="latex", axis="columns").hide(axis="index")
    )
    return style.to_latex(hrules=True)


def main(arguments: list[str] | None = None) -> int:
    """`python -m lorapar_utils.report.exports tables`: the tables, from the published records or those of a folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("tables", type=Path)
    parser.add_argument(
        "--records",
        type=Path,
        help="such as runs/laptop/records; without it, the study's",
    )
    options = parser.parse_args(arguments)
    records = read_records(options.records) if options.records else study()
    if not records:
        print(f"{options.records or 'results'}: no records; run `make book` and `make publish` first", file=sys.stderr)
        return 2
    for path in save_all(records, options.tables):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
