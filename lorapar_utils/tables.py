"""Records in, tables out: ours beside the paper's, each with n and interval. No training, no torch.

Column `records` names those that a row's numbers come from; `notebook.linked` makes links of them.
"""

from collections.abc import Callable, Iterable

import pandas as pd
import yaml

from lorapar_utils import statistics
from lorapar_utils.records import Record, common_seeds, mean_outcomes, score_after
from lorapar_utils.settings import project_root
from lorapar_utils.statistics import Metric


def paper(table: str) -> dict | list:
    """One table of the paper, as `book/paper_tables.yaml` holds it (accuracies in percent)."""
    return yaml.safe_load((project_root() / "book" / "paper_tables.yaml").read_text(encoding="utf-8"))[table]


def written(
    metric: Metric | None, style: Callable[[Metric], str] = Metric.percent, missing: str = "not measured"
) -> str:
    """A metric in one of its styles; `missing` in place of one that was not measured."""
    return missing if metric is None else style(metric)


def stage_table(records: Iterable[Record]) -> pd.DataFrame:
    """One row an experiment: System 1 and System 2 test accuracy after each stage, and the active share.

    Of free text the overlap with the reference, and its loss, in place of the accuracies.
    """
    rows = []
    for record in records:
        metrics = record.metrics
        for stage in ("base", "stage1", "stage2"):
            if score_after(record, stage):
                scores = {f"System {k}": written(metrics.get(f"{stage}/system{k}")) for k in (1, 2)}
                if overlap := metrics.get(f"{stage}/overlap"):
                    scores = {
                        "overlap": overlap.percent(),
                        "loss": written(metrics.get(f"{stage}/loss"), Metric.number),
                    }
                rows.append(
                    {
                        "experiment": record.run["parameters"]["title"],
                        "seed": record.run["seed"],
                        "stage": stage,
                        **scores,
                        "active": written(metrics.get(f"active/{stage}"), Metric.share, "–"),
                        "records": label(record),
                    }
                )
    return pd.DataFrame(rows)


def gain_table(records: Iterable[Record]) -> pd.DataFrame:
    """What stage 2 changed over stage 1 by experiment, seed and system: paired, with McNemar's exact p.

    Of free text the change of the overlap, which has no such p.
    """
    keys = {"gain/system1": 1, "gain/system2": 2, "gain/overlap": "overlap"}
    return pd.DataFrame(
        [
            {
                "experiment": record.run["parameters"]["title"],
                "seed": record.run["seed"],
                "system": system,
                "gain": f"{gain.points()}, n = {gain.n:,}",
                "p": _p_value(gain),
                "records": label(record),
            }
            for record in records
            for key, system in keys.items()
            if (gain := record.metrics.get(key))
        ]
    )


def _p_value(metric: Metric) -> str:
    if metric.p_value is None:
        return "–"
    return f"{metric.p_value:.3f}" if metric.p_value >= 0.001 else "< 0.001"


def budget_table(records: Iterable[Record]) -> pd.DataFrame:
    """LoRA-PAR against LoRA with all elements, same stages, examples and steps: paired over test items and seeds."""
    runs = method_runs(records)
    if not {"LoRA + RL", "LoRA-PAR over LoRA"} <= runs.keys():
        return pd.DataFrame()
    sides = common_seeds([runs["LoRA-PAR over LoRA"], runs["LoRA + RL"]])
    return pd.DataFrame(
        [
            {
                "after": stage,
                "items": "all" if system is None else f"System {system}",
                "seeds": len(sides[0]),
                "LoRA-PAR": _over_seeds(sides[0], stage, system),
                "LoRA, all elements": _over_seeds(sides[1], stage, system),
                "gap": _paired([mean_outcomes(side, stage, system) for side in sides]),
                "records": _labels(sides[0] + sides[1]),
            }
            for stage in ("stage1", "stage2")
            for system in (1, 2, None)
        ]
    )


def theta_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 3 at our scale: stage 1 accuracy by modules, theta and selection, the paper's numbers beside it."""
    published = paper("table3_theta")
    rows = []
    for point in theta_points(records):
        cells = {row[0]: row for row in published[point["modules"]]}.get(point["theta"], [None] * 4)
        every = point["selection"] == "all elements"
        full = published["full_lora_accuracy"][point["modules"]]
        column = {"importance": 2, "random": 3}.get(point["selection"])
        rows.append(
            {
                "modules": point["modules"],
                "theta": point["theta"],
                "selection": point["selection"],
                "active (stage 1)": f"{100 * point['active']:.1f} %",
                "ours, accuracy": point["metric"].percent(),
                "each seed": ", ".join(f"{100 * value:.1f}" for value in point["seeds"]),
                "paper, active %": 100.0 if every else _or_dash(cells[1] if column else None),
                "paper, accuracy %": full if every else _or_dash(cells[column] if column else None),
                "records": _labels(point["records"]),
            }
        )
    return pd.DataFrame(rows)


def theta_points(records: Iterable[Record]) -> list[dict]:
    """One point for each modules, theta and selection: mean accuracy over the seeds, its interval over test items.

    One record a seed counts, whatever experiment it belongs to: at theta = 1 every way of selecting is LoRA with all
    elements.
    """
    groups: dict[tuple, dict[int, Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        if score_after(record, "stage1") is None:
            continue
        score = parameters.get("score") or "second_order"
        chosen_by = {"second_order": "importance", "random": "random scores"}.get(score, score)
        chosen_by = "random" if parameters["selection"] == "random" else chosen_by
        every = parameters["method"] != "lorapar" or parameters["theta"] == 1.0
        key = (parameters["modules"], 1.0 if every else parameters["theta"], "all elements" if every else chosen_by)
        groups.setdefault(key, {}).setdefault(record.run["seed"], record)
    return [
        {
            "modules": modules,
            "theta": theta,
            "selection": selection,
            "active": next(iter(runs.values())).metric("active/stage1").value,
            "seeds": [score_after(run, "stage1").value for _, run in sorted(runs.items())],
            "records": [run for _, run in sorted(runs.items())],
            "metric": statistics.share(list(mean_outcomes(runs.values(), "stage1").values())),
        }
        for (modules, theta, selection), runs in sorted(groups.items())
    ]


# Our rows of Tables 4 and 6: (method, its adapter's init, stages), and the paper's row beside it.
METHOD_ROWS = {
    "base model": (("base", None, ()), "LLaMA-2-7B"),
    "LoRA": (("lora", "normal", ("sft_all",)), "LoRA"),
    "OLoRA": (("olora", "olora", ("sft_all",)), "OLoRA"),
    "PiSSA": (("pissa", "pissa", ("sft_all",)), "PiSSA"),
    "DoRA": (("dora", "normal", ("sft_all",)), None),
    "Prompt Tuning": (("prompt_tuning", "normal", ("sft_all",)), "Prompt Tuning"),
    "P-Tuning": (("p_tuning", "normal", ("sft_all",)), "P-Tuning"),
    "Prefix-Tuning": (("prefix_tuning", "normal", ("sft_all",)), "Prefix-Tuning"),
    "IA3": (("ia3", "normal", ("sft_all",)), "IA3"),
    "SHiRA": (("shira", "normal", ("sft_all",)), None),
    "LoRA + RL": (("lora", "normal", ("sft", "grpo")), "LoRA + RL"),
    "PiSSA + RL": (("pissa", "pissa", ("sft", "grpo")), "PiSSA + RL"),
    "LoRA-PAR over LoRA": (("lorapar", "normal", ("sft", "grpo")), "LoRA-PAR, LoRA, theta=0.9"),
    "LoRA-PAR over OLoRA": (("lorapar", "olora", ("sft", "grpo")), None),
    "LoRA-PAR over PiSSA": (("lorapar", "pissa", ("sft", "grpo")), "LoRA-PAR, PiSSA, theta=0.9"),
}
# LoRA-PAR as the paper has it: anything else is an ablation.
USUAL = {"selection": "importance", "theta": 0.9, "alpha": 1.0, "beta": 1.0, "split_by": None, "panel": None}
# The paper's columns beside each of our benchmarks; its MMLU was trained on Dolly-15k, or on Open-Platypus.
PUBLISHED = {"pool": "gsm8k", "gsm8k": "gsm8k", "mmlu": "mmlu_dolly", "humaneval": "humaneval"}
TRAINED_ON = {("mmlu", "open-platypus"): "mmlu_platypus"}


def method_runs(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each row of Tables 4 and 6, one a seed; of LoRA-PAR only those at `USUAL` parameters."""
    rows = {key: title for title, (key, _) in METHOD_ROWS.items()}
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        if "stages" not in parameters:
            continue
        stages = tuple(parameters["stages"])
        key = (parameters["method"], parameters.get("init", "normal"), stages) if stages else ("base", None, ())
        usual = {name: parameters.get(name) for name in USUAL} == USUAL
        usual &= parameters.get("score") in (None, "second_order")
        if key not in rows or (key[0] == "lorapar" and not usual):
            continue
        found.setdefault(rows[key], {}).setdefault(record.run["seed"], record)
    return {title: list(found[title].values()) for title in METHOD_ROWS if title in found}


def benchmark_table(records: Iterable[Record], benchmark: str = "pool") -> pd.DataFrame:
    """Tables 4 and 6 at our scale: every method on one benchmark, over its seeds, the paper's numbers beside it.

    Ours are accuracies after stage 1, where there are two, and at the end; the paper's are after its two epochs: of
    SFT, or one of SFT and one of GRPO. The gap to LoRA is paired over test items and seeds. A method without a record
    reads "not run". `truncated` is the share of completions that never ended: they can only be wrong.
    """
    runs = method_runs(records)
    pools = {run.run["parameters"].get("pool") for group in runs.values() for run in group}
    column = TRAINED_ON.get((benchmark, pools.pop())) if len(pools) == 1 else None
    published = _published(column or PUBLISHED[benchmark])
    rows = []
    for title, (_, row) in METHOD_ROWS.items():
        found = runs.get(title, [])
        last = _last(found)
        ours = [_over_seeds(found, _stage_of(stage, benchmark)) for stage in ("stage1", last)]
        first, second = published.get(row, (None, None))
        rows.append(
            {
                "method": title,
                "seeds": len(found),
                "active": written(found[0].metrics.get(f"active/{last}") if found else None, Metric.share, "–"),
                "ours, after stage 1": ours[0] if last == "stage2" else "–",
                "ours, at the end": ours[1] if found else "not run",
                "gap to LoRA": _gap_to_lora(runs, title, benchmark),
                "truncated": _truncated(found, _stage_of(last, benchmark)),
                "paper, epoch 1 %": _or_dash(first),
                "paper, epoch 2 %": _or_dash(second),
                "records": _labels(found),
            }
        )
    return pd.DataFrame(rows)


def cost_points(records: Iterable[Record]) -> pd.DataFrame:
    """One row a trained method: accuracy at the end with interval, active elements, time and peak bytes of training.

    Time is in core-seconds (on a GPU: seconds), since profiles differ in threads. It and bytes are means over the
    seeds; NaN where a record does not have them.
    """
    rows = []
    for title, found in method_runs(records).items():
        last = _last(found)
        if last == "base":
            continue
        stages = [stage for stage in ("stage1", "stage2") if score_after(found[0], stage)]
        active = found[0].metric(f"active/{last}")
        rows.append(
            {
                "method": title,
                "active": active.value * active.n,
                "core_seconds": pd.Series(
                    [_cores(run) * sum(_value(run, f"{s}/train_seconds") for s in stages) for run in found]
                ).mean(),
                "peak_bytes": pd.Series([_value(run, f"{last}/peak_bytes") for run in found]).mean(),
                **statistics.share(list(mean_outcomes(found, last).values()))._asdict(),
            }
        )
    return pd.DataFrame(rows)


def _cores(record: Record) -> int:
    hardware = record.environment["hardware"]
    return 1 if hardware["gpu"] else hardware["threads"]


def _value(record: Record, metric: str) -> float:
    return record.metrics.get(metric, Metric(float("nan"), 0)).value


def _published(column: str) -> dict[str, tuple]:
    """The paper's two epochs of one benchmark by its row: Table 4, and for GSM8K also Table 6."""
    main = paper("table4_benchmarks")
    place = [main["columns"].index(f"{column}_{epoch}") for epoch in ("e1", "e2")]
    found = {row[0]: tuple(row[i] for i in place) for row in main["rows"]}
    if column == "gsm8k":
        found = {row[0]: tuple(row[1:3]) for row in paper("table6_broader_peft")["rows"]} | found
    return found


def _last(runs: list[Record]) -> str:
    return next((stage for stage in ("stage2", "stage1") if runs and score_after(runs[0], stage)), "base")


def _stage_of(stage: str, benchmark: str) -> str:
    """How items name a stage's outcomes on a benchmark."""
    return stage if benchmark == "pool" else f"{stage}/{benchmark}"


def _over_seeds(runs: Iterable[Record], stage: str, system: int | None = None) -> str:
    """Accuracy over the seeds, its interval over test items."""
    outcomes = mean_outcomes(runs, stage, system)
    return written(statistics.share(list(outcomes.values())) if outcomes else None)


def _truncated(runs: list[Record], stage: str) -> str:
    found = [item["truncated"] for run in runs for item in run.items if item["stage"] == stage]
    found = [cut for cut in found if cut is not None]
    return f"{100 * sum(found) / len(found):.1f} %" if found else "–"


def _gap_to_lora(runs: dict[str, list[Record]], title: str, benchmark: str) -> str:
    if title == "LoRA" or "LoRA" not in runs or title not in runs:
        return "–"
    sides = common_seeds([runs[title], runs["LoRA"]])
    return _paired([mean_outcomes(side, _stage_of(_last(side), benchmark)) for side in sides])


def alpha_beta_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 2 at our scale: accuracy after each stage by alpha and beta, over the seeds, the paper's beside it.

    The gap to alpha = beta = 1 after both stages is paired over items, at the seeds that both cells have.
    """
    published = {tuple(row[:2]): row for row in paper("table2_alpha_beta")["rows"]}
    runs: dict[tuple[float, float], list[Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        runs.setdefault((parameters["alpha"], parameters["beta"]), []).append(record)
    return pd.DataFrame(
        [
            {
                "alpha": alpha,
                "beta": beta,
                "seeds": len(group),
                "active (stage 1)": group[0].metric("active/stage1").share(),
                "active (stage 2)": group[0].metric("active/stage2").share(),
                "after SFT": _over_seeds(group, "stage1"),
                "after RL": _over_seeds(group, "stage2"),
                "gap to alpha = beta = 1": _gap(group, runs.get((1.0, 1.0), []), "stage2"),
                "paper, after SFT %": published.get((alpha, beta), ["–"] * 4)[2],
                "paper, after RL %": published.get((alpha, beta), ["–"] * 4)[3],
                "records": _labels(group),
            }
            for (alpha, beta), group in sorted(runs.items())
        ]
    )


def order_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 7 at our scale: LoRA-PAR's stages in both orders, over the seeds, the paper's (Qwen-2.5-7B) beside."""
    published = {row[0]: row for row in paper("table7_order")["rows"]}
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        if parameters.get("method") == "lorapar" and set(parameters["stages"]) == {"sft", "grpo"}:
            runs.setdefault(tuple(parameters["stages"]), []).append(record)
    rows = []
    for stages, group in sorted(runs.items(), reverse=True):
        row = published["SFT then RL (LoRA-PAR)" if stages == ("sft", "grpo") else "RL then SFT"]
        rows.append(
            {
                "schedule": " then ".join("RL" if stage == "grpo" else "SFT" for stage in stages),
                "seeds": len(group),
                "after phase 1": _over_seeds(group, "stage1"),
                "after phase 2": _over_seeds(group, "stage2"),
                "gap to SFT then RL": _gap(group, runs.get(("sft", "grpo"), []), "stage2"),
                "paper, phase 1 %": row[1],
                "paper, phase 2 %": row[2],
                "records": _labels(group),
            }
        )
    return pd.DataFrame(rows)


def certain_table(record: Record) -> pd.DataFrame:
    """Of the voting record: agreement with construction among the examples with the largest summed margins."""
    return pd.DataFrame(
        [
            {
                "kept": f"{row['kept']:.0%} most certain",
                "System 1": f"{100 * row['system1_share']:.0f} %",
                "agrees with construction": Metric(**row["accuracy"]).percent(),
            }
            for row in record.result["tables"]["certain"]
        ]
    )


# Our strategies beside the paper's rows of Table 1; its second single teacher has no counterpart.
SPLITS = {
    "split_random": "random partition",
    "split_one_plain": "QwQ, no role play",
    "split_one": "QwQ, role play",
    "split_three": "role play + voting, n=3",
    "split_five": "role play + voting, n=5",
    "split_construction": None,
}


def voting_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 1 at our scale: stage 1 accuracy by how the examples were split, and the gap to a random split.

    The gap is paired over test items, each its mean over the seeds in common, with a 95 % bootstrap interval.
    """
    published = {row["strategy"]: row["accuracy"] for row in paper("table1_data_classification")}
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.name.rsplit("-seed", 1)[0], []).append(record)
    rows = []
    for name, strategy in SPLITS.items():
        if name not in runs:
            continue
        accuracies = [record.metric("stage1/accuracy").value for record in runs[name]]
        rows.append(
            {
                "split": runs[name][0].run["parameters"]["title"],
                "seeds": len(runs[name]),
                "ours, accuracy": _over_seeds(runs[name], "stage1"),
                "each seed": ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies),
                **{
                    f"gap to a random split{part}": _gap(runs[name], runs.get("split_random", []), "stage1", system)
                    for part, system in (("", None), (", System 1", 1), (", System 2", 2))
                },
                "paper, GSM8K %": published.get(strategy, "–"),
                "records": _labels(runs[name]),
            }
        )
    return pd.DataFrame(rows)


def _gap(runs: list[Record], control: list[Record], stage: str, system: int | None = None) -> str:
    if not control or runs is control:
        return "–"
    return _paired([mean_outcomes(side, stage, system) for side in common_seeds([runs, control])])


def _paired(sides: list[dict[str, float]]) -> str:
    """Mean difference of two sides' outcomes over the items in common, with its interval."""
    first, second = sides
    common = sorted(first.keys() & second.keys())
    if not common:
        return "no seed in common"
    return statistics.mean([first[key] - second[key] for key in common]).gap()


def label(record: Record) -> str:
    """`cpu-full/lora-seed0`: a record and the profile that made it."""
    return f"{record.run['profile']}/{record.name}"


def _labels(records: Iterable[Record]) -> str:
    return ", ".join(map(label, records))


def _or_dash(value: float | None) -> float | str:
    return "–" if value is None else value
