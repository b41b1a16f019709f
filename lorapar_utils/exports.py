"""Every table of the book as HTML, CSV and LaTeX (booktabs), from records alone: no training, no torch."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from lorapar_utils import claims, plots, tables
from lorapar_utils.records import Record, companions, read_records, with_longer, write_atomically


def _swept(name: str) -> Callable[[dict[str, Record]], list[Record]]:
    return lambda records: [record for record in records.values() if record.run["parameters"].get("sweep") == name]


def _published_by(variant: str) -> Callable[[dict[str, Record]], list[Record]]:
    return lambda records: [record for key, record in records.items() if f"-{variant}/" in key]


def _all(records: dict[str, Record]) -> dict[str, Record]:
    return records


# Table name -> which records it takes, how it is made from them. Those of varied profiles, whose pool is another, are
# only for the last five.
TABLES: dict[str, tuple[Callable, Callable]] = {
    "stages": (plots.two_stage_records, tables.stage_table),
    "table1_voting": (_swept("voting"), tables.voting_table),
    "table2_alpha_beta": (_swept("alpha_beta"), tables.alpha_beta_table),
    "table3_theta": (plots.stage1_records, tables.theta_table),
    "table6_methods": (plots.two_stage_records, tables.benchmark_table),
}
VARIED: dict[str, tuple[Callable, Callable]] = {
    "table7_order": (_published_by("chains"), tables.order_table),
    "table4_gsm8k": (_published_by("elsewhere"), lambda records: tables.benchmark_table(records, "gsm8k")),
    "table4_mmlu": (_published_by("elsewhere"), lambda records: tables.benchmark_table(records, "mmlu")),
    "table4_humaneval": (_published_by("elsewhere"), lambda records: tables.benchmark_table(records, "humaneval")),
    "claims": (_all, claims.scoreboard),
}


def save_all(records: dict[str, Record], varied: dict[str, Record], folder: Path) -> list[Path]:
    """Write each table whose records are there as .html, .csv and .tex; the same records give the same bytes.

    `records` are a profile's with those of its longer one (`records.with_longer`), `varied` those of
    `records.companions`.
    """
    written = []
    for name, (choose, make) in (TABLES | VARIED).items():
        chosen = choose(records if name in TABLES else records | varied)
        if not chosen:
            print(f"{name}: skipped, there is no record of it")
            continue
        frame = make(chosen)
        shown = frame.drop(columns="records", errors="ignore")  # the .csv alone says where each row comes from
        texts = {"html": shown.to_html(index=False, border=0), "csv": frame.to_csv(index=False), "tex": _latex(shown)}
        for suffix, text in texts.items():
            write_atomically(folder / f"{name}.{suffix}", text)
            written.append(folder / f"{name}.{suffix}")
    return written


def _latex(frame: pd.DataFrame) -> str:
    style = (
        frame.style.format(escape="latex", precision=2).format_index(escape="latex", axis="columns").hide(axis="index")
    )
    return style.to_latex(hrules=True)


def main(arguments: list[str] | None = None) -> int:
    """`python -m lorapar_utils.exports results/cpu tables`: every table, also from the longer and varied profiles."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("records", type=Path)
    parser.add_argument("tables", type=Path)
    chosen = parser.parse_args(arguments)
    records = read_records(chosen.records)
    if not records:
        print(f"{chosen.records}: no records; run `make book` and `make publish` first", file=sys.stderr)
        return 2
    profile = chosen.records.name
    for path in save_all(with_longer(records, profile), companions(profile), chosen.tables):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
