"""Records in, tables out: ours beside the paper's, each with n and interval. No training, no torch.

Column `records` names the records of a row's numbers, and a column `X, each seed` holds the values whose mean column X
is, in the records' order; `notebook.linked` makes links and dots of them.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import yaml

from lorapar_utils.records import Record, common_seeds, intervals, mean_outcomes, score_after
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import project_root


def paper(table: str) -> dict | list:
    """One table of the paper, as `book/paper_tables.yaml` holds it (accuracies in percent)."""
    return yaml.safe_load((project_root() / "book" / "paper_tables.yaml").read_text(encoding="utf-8"))[table]


def written(
    metric: Metric | None, style: Callable[[Metric], str] = Metric.percent, missing: str = "not measured"
) -> str:
    """`metric` as text in one of the styles of `Metric`, or `missing` where it is None."""
    return missing if metric is None else style(metric)


# Key of a stage in records -> its words.
STAGES = {"base": "base model", "stage1": "after stage 1", "stage2": "after stage 2"}


def stage_table(records: Iterable[Record]) -> pd.DataFrame:
    """One row per experiment and stage: test accuracy on System 1 and System 2 over the seeds, and the active share.

    Where the answers are free text, overlap with the reference and loss take the place of the accuracies.
    """
    rows = []
    for what, group in _trained(records).items():
        first, stage = group[0], what[-1]
        free_text = f"{stage}/overlap" in first.metrics
        row = {"experiment": first.run["parameters"]["title"], "stage": STAGES[stage]}
        for name, system in ({"overlap": None} if free_text else {"System 1": 1, "System 2": 2}).items():
            row |= _seen(name, group, stage, system)
        if free_text:
            losses = [run.metrics[f"{stage}/loss"].value for run in group if f"{stage}/loss" in run.metrics]
            row["loss"] = f"{sum(losses) / len(losses):.2f}" if losses else "–"
        row["active"] = written(first.metrics.get(f"active/{stage}"), Metric.share, "–")
        rows.append(row | {"records": _labels(group)})
    return _records_last(pd.DataFrame(rows)).fillna("–")


# What tells one trained model from another, beside its stages.
IDENTITY = ("method", "init", "r", "score", "modules", "selection", "theta", "alpha", "beta")
IDENTITY += ("flipped", "panel", "split_by")


def on_test(records: Iterable[Record]) -> list[Record]:
    """Those that answered the test split: runs that chose settings are left out."""
    return [record for record in records if record.run["parameters"].get("measured_on", "test") == "test"]


def _trained(records: Iterable[Record]) -> dict[tuple, list[Record]]:
    """The records, one per seed, of what was scored: parameters, the stages up to this one, the stage's name."""
    groups: dict[tuple, dict[int, Record]] = {}
    for record in on_test(records):
        parameters = record.run["parameters"]
        identity = tuple(parameters.get(key) for key in IDENTITY)
        for number, stage in enumerate(("base", "stage1", "stage2")):
            if score_after(record, stage):
                trained = tuple(parameters.get("stages", ())[:number])
                what = (*(identity if trained else ()), trained, stage)
                groups.setdefault(what, {}).setdefault(record.run["seed"], record)
    return {what: [seeds[seed] for seed in sorted(seeds)] for what, seeds in groups.items()}


def _seen(column: str, runs: list[Record], stage: str, system: int | None = None) -> dict[str, str]:
    """A column of the mean score over the seeds, and the column of each seed's."""
    means = [_mean([run], stage, system) for run in runs]
    each = ", ".join(f"{100 * mean.value:.1f}" if mean else "–" for mean in means)
    return {column: _over_seeds(runs, stage, system), f"{column}, each seed": each}


def _records_last(frame: pd.DataFrame) -> pd.DataFrame:
    """`frame` with column `records` at the end: rows have different columns."""
    return frame[[column for column in frame if column != "records"] + ["records"] * ("records" in frame)]


def answers_table(records: Iterable[Record], questions: dict[str, str]) -> pd.DataFrame:
    """The first question of each task and its answers, a column a stage; a wrong answer is marked.

    Parameters
    ----------
    records
        An answer of a later record takes the place of an earlier one's at the same stage.
    questions
        Maps the id of an item to its question; items that it lacks, and those without an answer, are left out.
    """
    items = [item for record in records for item in record.items if item["id"] in questions and "completion" in item]
    if not items:
        return pd.DataFrame()
    frame = pd.DataFrame(items)
    few = frame.drop_duplicates(["system", "task"])["id"]
    frame["completion"] = [
        _whole_lines(item["completion"]) + ("" if item.get("correct", True) else "\n(wrong)") for item in items
    ]
    answers = frame.pivot_table(index="id", columns="stage", values="completion", aggfunc="last").loc[few]
    answers.insert(0, "question", [questions[name] for name in few])
    return answers.fillna("–").rename(columns=STAGES).reset_index(drop=True).rename_axis(columns=None)


def _whole_lines(text: str) -> str:
    """The first six lines of a text; short ones, such as those of a sum, do not break."""
    lines = text.split("\n")
    lines = [*lines[:6], "…"] if len(lines) > 6 else lines
    return "\n".join(line.replace(" ", "\N{NO-BREAK SPACE}") if len(line) < 20 else line for line in lines)


def theta_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 3 at our scale: stage 1 accuracy by modules, theta and selection, beside the paper's numbers."""
    rows = []
    for point in theta_points(records):
        modules, theta, selection = key = point["modules"], point["theta"], point["selection"]
        paper_point = _published_point(*key)
        rows.append(
            {
                "modules": modules,
                "theta": theta,
                "selection": selection,
                "active (stage 1)": f"{100 * point['active']:.1f} %",
                **_seen("ours, accuracy", point["records"], "stage1"),
                "paper, active %": _or_dash(paper_point.get("active")),
                "paper, accuracy %": _or_dash(paper_point.get("accuracy")),
                "records": _labels(point["records"]),
            }
        )
    return pd.DataFrame(rows)


def study_arms(records: Iterable[Record], *stages: str) -> dict[str, list[Record]]:
    """The study's arms of these stages that answered the test split: title -> records, one for each block (seed).

    Arms that share blocks stand together; among them LoRA-PAR comes first. Its own variants of stage 2 come last.
    """
    arms: dict[str, list[Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        if parameters.get("measured_on") == "test" and tuple(parameters.get("stages", ())) == stages:
            arms.setdefault(parameters["title"], []).append(record)
    arms = {title: sorted(runs, key=lambda run: run.run["seed"]) for title, runs in arms.items()}
    return dict(sorted(arms.items(), key=lambda arm: place(arm[1][0])))


def place(record: Record) -> tuple[bool, int, bool]:
    """Sorts arms by the first block, in it LoRA-PAR before the others, and its own variants of stage 2 behind all."""
    parameters = record.run["parameters"]
    plain = parameters.get("method") == "lorapar" and parameters.get("selection") == "importance"
    return parameters.get("sweep") == "alpha_beta", record.run["seed"], not plain


def arms_table(records: Iterable[Record]) -> pd.DataFrame:
    """The study's arms after stage 1 alone, on the test split, beside the paper's accuracies on GSM8K (LLaMA-2-7B).

    Means over blocks (seeds), with Student's 95 % interval from two blocks on. Losses are in nats a token.
    """
    rows = []
    loss = "loss of System 1, nats"
    for title, runs in study_arms(records, "sft").items():
        parameters, active = runs[0].run["parameters"], runs[0].metric("active/stage1")
        row = {"arm": title, "elements": f"{active.value * active.n / 1e6:.2f} M"}
        row["rate of stage 1"] = f"{parameters['learning_rate']:g}"
        row[loss] = _over_blocks(runs, "stage1/loss1", 1, ".4f")
        row[f"{loss}, each seed"] = ", ".join(f"{record.metric('stage1/loss1').value:.4f}" for record in runs)
        row["System 1, %"] = _over_blocks(runs, "stage1/system1", 100, ".1f")
        row["leniently, %"] = _over_blocks(runs, "stage1/lenient1", 100, ".1f")
        row["System 2, %"] = _over_blocks(runs, "stage1/system2", 100, ".1f")
        paper_point = _published_point(parameters["modules"], parameters["theta"], arm_of(parameters))
        row["paper, GSM8K %"] = _or_dash(paper_point.get("accuracy"))
        rows.append(row | {"seeds": len(runs), "records": _labels(runs)})
    return pd.DataFrame(rows)


def reinforced_table(records: Iterable[Record]) -> pd.DataFrame:
    """The study's arms after both stages: accuracy on the test split and what stage 2 changed, beside the paper's.

    Means over blocks (seeds) with Student's 95 % interval, in percent and points.
    """
    rows, published = [], _after_both_stages()
    for title, runs in study_arms(records, "sft", "grpo").items():
        active = runs[0].metric("active/stage2")
        rate = runs[0].run["parameters"]["grpo_learning_rate"]
        row = {"arm": title, "elements, rate of stage 2": f"{active.value * active.n / 1e6:.2f} M, {rate:g}"}
        for system in (1, 2):
            row[f"System {system}, %"] = _over_blocks(runs, f"stage2/system{system}", 100, ".1f")
            row[f"System {system}, gain"] = _over_blocks(runs, f"gain/system{system}", 100, "+z.1f")
        row["both, %"] = _over_blocks(runs, "stage2/accuracy", 100, ".1f")
        row["both, %, each seed"] = ", ".join(f"{100 * run.metric('stage2/accuracy').value:.1f}" for run in runs)
        row["paper, GSM8K %"] = published.get(title, "–")
        rows.append(row | {"seeds": len(runs), "records": _labels(runs)})
    return pd.DataFrame(rows)


def _after_both_stages() -> dict[str, str]:
    """Title of an arm -> the paper's accuracy on GSM8K after both stages, in percent, of LLaMA-2-7B and Qwen-2.5-7B."""
    of_llama = {row["method"]: row["gsm8k_e2"] for row in paper("table4_benchmarks") if "gsm8k_e2" in row}
    of_qwen = {row["method"]: row["epoch2"] for row in paper("table5_qwen")["rows"]}
    unshared = next(row["rl"] for row in paper("table2_alpha_beta") if (row["alpha"], row["beta"]) == (1, 0))
    return {
        "LoRA-PAR, theta 0.9": f"LLaMA {of_llama['LoRA-PAR, LoRA, theta=0.9']}, Qwen {of_qwen['LoRA-PAR']}",
        "LoRA, r = 8": f"Qwen {of_qwen['LoRA + RL']}",
        "LoRA-PAR, nothing shared in stage 2": f"LLaMA {unshared}",
    }


def _over_blocks(runs: Sequence[Record], key: str, unit: float, form: str) -> str:
    """The mean of a metric over blocks, with Student's interval from two blocks on."""
    values = [record.metric(key).value for record in runs]
    metric = intervals.over_seeds(values) if len(values) > 1 else Metric(values[0], 1)
    reach = "" if metric.low is None else f" [{unit * metric.low:{form}}, {unit * metric.high:{form}}]"
    return f"{unit * metric.value:{form}}{reach}"


def _published_point(modules: str, theta: float, selection: str) -> dict[str, float]:
    """The paper's active share and accuracy at one point of Table 3, in percent; {} where it has no such point."""
    table = paper("table3_theta")
    if selection == "all elements":
        return {"active": 100.0, "accuracy": table["full_lora_accuracy"].get(modules)}
    row = next((row for row in table.get(modules, ()) if row["theta"] == theta), {})
    if selection == "random":
        return row | {"accuracy": row.get("random")}
    return row if selection == "importance" else {}


# How elements are scored -> its name; see `importance.SCORES`.
SCORE_NAMES = {
    "second_order": "importance",
    "first_order": "gradient alone",
    "fisher": "curvature alone",
    "random": "random scores",
}
# How a control selects -> its name beside the ways of scoring.
CONTROLS = {
    "random": "random",
    "random_in_matrix": "random in each matrix",
    "magnitude": "largest values, as many",
    "swapped": "the other system's",
}


def selection_name(parameters: dict) -> str:
    """How LoRA-PAR's elements were chosen: by importance, by another score, or by a control."""
    score = parameters.get("score") or "second_order"
    return CONTROLS.get(parameters["selection"], SCORE_NAMES.get(score, score))


def arm_of(parameters: Mapping) -> str:
    """What a run trains, as figures name it; LoRA of another rank than 8 with its rank."""
    if parameters["method"] == "lorapar" and parameters.get("theta") != 1.0:
        return selection_name(parameters)
    if parameters.get("r", 8) != 8:
        return f"all elements, r = {parameters['r']}"
    return "all elements, PEFT's initialisation" if parameters.get("init") == "lora" else "all elements"


def theta_points(records: Iterable[Record]) -> list[dict]:
    """One point for each modules, theta and selection: mean accuracy over all its seeds, with an interval over items.

    Points may have different seeds; the study's arms are compared over common blocks, by `claims`.

    A point takes one record per seed, from any experiment. At theta = 1 every selection is LoRA with all elements.
    """
    groups: dict[tuple, dict[int, Record]] = {}
    for record in on_test(records):
        parameters = record.run["parameters"]
        if score_after(record, "stage1") is None:
            continue
        selection = arm_of(parameters)
        theta = 1.0 if selection.startswith("all elements") else parameters["theta"]
        groups.setdefault((parameters["modules"], theta, selection), {}).setdefault(record.run["seed"], record)
    return [
        {
            "modules": modules,
            "theta": theta,
            "selection": selection,
            "active": next(iter(runs.values())).metric("active/stage1").value,
            "seeds": [score_after(run, "stage1").value for _, run in sorted(runs.items())],
            "records": [run for _, run in sorted(runs.items())],
            "metric": intervals.share(list(mean_outcomes(runs.values(), "stage1").values())),
        }
        for (modules, theta, selection), runs in sorted(groups.items())
    ]


@dataclass(frozen=True)
class Row:
    """A row of Tables 4 and 6: the run parameters that belong there, and the name of the paper's row, if any."""

    title: str
    method: str
    init: str | None
    stages: tuple[str, ...]
    paper: str | None


METHOD_ROWS = (
    Row("base model", "base", None, (), "LLaMA-2-7B"),
    Row("LoRA", "lora", "normal", ("sft_all",), "LoRA"),
    Row("OLoRA", "olora", "olora", ("sft_all",), "OLoRA"),
    Row("PiSSA", "pissa", "pissa", ("sft_all",), "PiSSA"),
    Row("DoRA", "dora", "normal", ("sft_all",), None),
    Row("Prompt Tuning", "prompt_tuning", "normal", ("sft_all",), "Prompt Tuning"),
    Row("P-Tuning", "p_tuning", "normal", ("sft_all",), "P-Tuning"),
    Row("Prefix-Tuning", "prefix_tuning", "normal", ("sft_all",), "Prefix-Tuning"),
    Row("IA3", "ia3", "normal", ("sft_all",), "IA3"),
    Row("SHiRA", "shira", "normal", ("sft_all",), None),
    Row("LoRA + RL", "lora", "normal", ("sft", "grpo"), "LoRA + RL"),
    Row("PiSSA + RL", "pissa", "pissa", ("sft", "grpo"), "PiSSA + RL"),
    Row("LoRA-PAR over LoRA", "lorapar", "normal", ("sft", "grpo"), "LoRA-PAR, LoRA, theta=0.9"),
    Row("LoRA-PAR over OLoRA", "lorapar", "olora", ("sft", "grpo"), None),
    Row("LoRA-PAR over PiSSA", "lorapar", "pissa", ("sft", "grpo"), "LoRA-PAR, PiSSA, theta=0.9"),
)
# The parameters of LoRA-PAR in the paper; other values are ablations.
USUAL = {"selection": "importance", "theta": 0.9, "alpha": 1.0, "beta": 1.0, "split_by": None, "panel": None}
# The columns of Table 4 beside each of our benchmarks. For MMLU the paper trained on Dolly-15k or on Open-Platypus.
PUBLISHED = {"pool": "gsm8k", "gsm8k": "gsm8k", "gsm_symbolic": None, "mmlu": "mmlu_dolly", "humaneval": "humaneval"}
TRAINED_ON = {("mmlu", "open-platypus"): "mmlu_platypus"}


def _is_usual(parameters: Mapping, *but: str) -> bool:
    """Whether LoRA-PAR was run as in the paper, whatever the parameters named `but` are."""
    as_usual = all(parameters.get(name) == value for name, value in USUAL.items() if name not in but)
    return as_usual and parameters.get("score") in (None, "second_order")


def method_runs(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each row of Tables 4 and 6, one per seed; of LoRA-PAR only those at `USUAL` parameters.

    Of a method that was run at several ranks, those of the highest.
    """
    titles = {(row.method, row.init, row.stages): row.title for row in METHOD_ROWS}
    runs: dict[str, dict[int, dict[int, Record]]] = {}
    for record in on_test(records):
        parameters = record.run["parameters"]
        if "stages" not in parameters:
            continue
        stages = tuple(parameters["stages"])
        key = (parameters["method"], parameters.get("init", "normal"), stages) if stages else ("base", None, ())
        if key not in titles or (key[0] == "lorapar" and not _is_usual(parameters)):
            continue
        of_rank = runs.setdefault(titles[key], {}).setdefault(parameters.get("r") or 0, {})
        of_rank.setdefault(record.run["seed"], record)
    return {row.title: list(runs[row.title][max(runs[row.title])].values()) for row in METHOD_ROWS if row.title in runs}


def benchmark_table(records: Iterable[Record]) -> pd.DataFrame:
    """Tables 4 and 6 at our scale: every method on each benchmark, over the seeds, beside the paper's numbers.

    Our accuracies are after stage 1, where there are two stages, and at the end. The paper's are after each of two
    epochs: both SFT, or SFT then GRPO. The gap to LoRA is paired over test items and seeds. `truncated` is the share of
    completions that never ended, which count as wrong.
    """
    runs = method_runs(records)
    pools = {record.run["parameters"].get("pool") for group in runs.values() for record in group}
    pool = pools.pop() if len(pools) == 1 else None
    rows = []
    for benchmark, column in PUBLISHED.items():
        column = TRAINED_ON.get((benchmark, pool), column)
        published = _published_epochs(column) if column else {}
        for row in METHOD_ROWS:
            group = runs.get(row.title, [])
            last = _last(group)
            if _mean(group, _stage_of(last, benchmark)) is None:
                continue
            epochs = published.get(row.paper, (None, None))
            rows.append(
                {
                    "method": row.title,
                    "on": benchmark,
                    "seeds": len(group),
                    "active": written(group[0].metrics.get(f"active/{last}"), Metric.share, "–"),
                    "after stage 1": _over_seeds(group, _stage_of("stage1", benchmark)) if last == "stage2" else "–",
                    **_seen("at the end", group, _stage_of(last, benchmark)),
                    "gap to LoRA": _gap_to_lora(runs, row.title, benchmark),
                    "truncated": _truncated(group, _stage_of(last, benchmark)),
                    "paper, epoch 1 %": _or_dash(epochs[0]),
                    "paper, epoch 2 %": _or_dash(epochs[1]),
                    "records": _labels(group),
                }
            )
    return pd.DataFrame(rows)


def _published_epochs(column: str) -> dict[str, tuple[float | None, float | None]]:
    """The paper's accuracy after both epochs by method, from Table 4 and, for GSM8K, also Table 6; in percent."""
    epochs = {row["method"]: (row["epoch1"], row["epoch2"]) for row in paper("table6_broader_peft")}
    main = {row["method"]: (row[f"{column}_e1"], row.get(f"{column}_e2")) for row in paper("table4_benchmarks")}
    return epochs | main if column == "gsm8k" else main


def _last(runs: list[Record]) -> str:
    return next((stage for stage in ("stage2", "stage1") if runs and score_after(runs[0], stage)), "base")


def _stage_of(stage: str, benchmark: str) -> str:
    """The `stage` field of a benchmark's items."""
    return stage if benchmark == "pool" else f"{stage}/{benchmark}"


def _over_seeds(runs: Iterable[Record], stage: str, system: int | None = None) -> str:
    return written(_mean(runs, stage, system))


def _mean(runs: Iterable[Record], stage: str, system: int | None = None) -> Metric | None:
    """Mean accuracy over the seeds, with an interval over test items."""
    outcomes = mean_outcomes(runs, stage, system)
    return intervals.share(list(outcomes.values())) if outcomes else None


def _truncated(runs: list[Record], stage: str) -> str:
    flags = [item["truncated"] for run in runs for item in run.items if item["stage"] == stage]
    flags = [flag for flag in flags if flag is not None]
    return f"{100 * sum(flags) / len(flags):.1f} %" if flags else "–"


def _gap_to_lora(runs: dict[str, list[Record]], title: str, benchmark: str) -> str:
    if title == "LoRA" or "LoRA" not in runs:
        return "–"
    sides = common_seeds([runs[title], runs["LoRA"]])
    return _paired([mean_outcomes(side, _stage_of(_last(side), benchmark)) for side in sides])


def alpha_beta_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 2 at our scale: accuracy after each stage by alpha and beta, over the seeds, beside the paper's numbers.

    The gap to alpha = beta = 1 after both stages is paired over items, at the seeds that both cells have. One cell
    alone is no table.
    """
    published = {(row["alpha"], row["beta"]): row for row in paper("table2_alpha_beta")}
    cells = _ablated(records, lambda p: p["stages"] == ["sft", "grpo"] and (p["alpha"], p["beta"]), "alpha", "beta")
    return pd.DataFrame(
        [
            {
                "alpha": alpha,
                "beta": beta,
                "seeds": len(runs),
                "active (stage 1)": runs[0].metric("active/stage1").share(),
                "active (stage 2)": runs[0].metric("active/stage2").share(),
                "after SFT": _over_seeds(runs, "stage1"),
                **_seen("after RL", runs, "stage2"),
                "gap to alpha = beta = 1": _gap(runs, cells.get((1.0, 1.0), []), "stage2"),
                "paper, after SFT %": published.get((alpha, beta), {}).get("sft", "–"),
                "paper, after RL %": published.get((alpha, beta), {}).get("rl", "–"),
                "records": _labels(runs),
            }
            for (alpha, beta), runs in sorted(cells.items())
        ]
    )


def _ablated(records: Iterable[Record], cell: Callable[[dict], Hashable], *varied: str) -> dict[Hashable, list[Record]]:
    """LoRA-PAR after both stages, one record a seed, by the `cell` of its parameters; {} unless there are two cells.

    What is not `varied` is as in the paper; a record whose cell is False is left out.
    """
    cells: dict[Hashable, dict[int, Record]] = {}
    for record in on_test(records):
        parameters = record.run["parameters"]
        both = parameters.get("method") == "lorapar" and set(parameters.get("stages", ())) == {"sft", "grpo"}
        both &= parameters.get("init", "normal") == "normal"
        if both and _is_usual(parameters, *varied) and (key := cell(parameters)):
            cells.setdefault(key, {}).setdefault(record.run["seed"], record)
    return {key: list(runs.values()) for key, runs in cells.items()} if len(cells) > 1 else {}


def order_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 7 at our scale: LoRA-PAR's stages in both orders, over the seeds, beside the paper's (Qwen-2.5-7B).

    One order alone is no table.
    """
    published = {row["schedule"]: row for row in paper("table7_order")}
    orders = _ablated(records, lambda parameters: tuple(parameters["stages"]))
    rows = []
    for stages, runs in sorted(orders.items(), reverse=True):
        row = published["SFT then RL (LoRA-PAR)" if stages == ("sft", "grpo") else "RL then SFT"]
        rows.append(
            {
                "schedule": " then ".join("RL" if stage == "grpo" else "SFT" for stage in stages),
                "seeds": len(runs),
                "after phase 1": _over_seeds(runs, "stage1"),
                **_seen("after phase 2", runs, "stage2"),
                "gap to SFT then RL": _gap(runs, orders.get(("sft", "grpo"), []), "stage2"),
                "paper, phase 1 %": row["phase1"],
                "paper, phase 2 %": row["phase2"],
                "records": _labels(runs),
            }
        )
    return pd.DataFrame(rows)


def agreement_table(record: Record) -> pd.DataFrame:
    """From a voting record: how the teachers split the pool, and how far they agree."""
    labels = {
        "system1_share": "share voted System 1",
        "undecided": "undecided, left out",
        "kappa": "Fleiss' kappa",
        "alpha": "Krippendorff's alpha",
    }
    values = [written(record.metrics.get(key), Metric.number) for key in labels]
    return pd.DataFrame({"measure": labels.values(), "value": values})


def teacher_table(record: Record) -> pd.DataFrame:
    """From a voting record: agreement with the construction labels and AUC of each teacher and of the panel.

    With a column of abstentions where there are any.
    """
    metrics = record.metrics
    names = [key.removeprefix("accuracy/") for key in metrics if key.startswith("accuracy/")]
    abstained = {key: metric for key, metric in metrics.items() if key.startswith("abstained/")}
    rows = []
    for name in names:
        auc = metrics.get("auc/margins" if name == "majority" else f"auc/{name}")
        row = {"teacher": "the panel" if name == "majority" else name}
        row["agrees with construction"] = metrics[f"accuracy/{name}"].percent()
        row["AUC"] = written(auc, Metric.number, "–")
        if any(metric.value for metric in abstained.values()):
            row["abstained"] = written(abstained.get(f"abstained/{name}"), Metric.percent, "–")
        rows.append(row)
    return pd.DataFrame(rows)


# Our strategies -> the paper's rows of Table 1. We have no counterpart of DeepSeek-R1 alone.
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

    The gap is paired over test items, with a 95 % bootstrap interval. An item counts as the mean over common seeds.
    """
    published = {row["strategy"]: row["accuracy"] for row in paper("table1_data_classification")}
    runs = _by_experiment(on_test(records))
    return pd.DataFrame(
        [
            {
                "split": runs[name][0].run["parameters"]["title"],
                "seeds": len(runs[name]),
                **_seen("ours, accuracy", runs[name], "stage1"),
                **{
                    f"gap to a random split{part}": _gap(runs[name], runs.get("split_random", []), "stage1", system)
                    for part, system in (("", None), (", System 1", 1), (", System 2", 2))
                },
                "paper, GSM8K %": published.get(strategy, "–"),
                "records": _labels(runs[name]),
            }
            for name, strategy in SPLITS.items()
            if name in runs
        ]
    )


def _by_experiment(records: Iterable[Record]) -> dict[str, list[Record]]:
    """The records of each experiment, one per seed."""
    runs: dict[str, list[Record]] = {}
    for record in records:
        runs.setdefault(record.experiment, []).append(record)
    return runs


def _gap(runs: list[Record], control: list[Record], stage: str, system: int | None = None) -> str:
    if not control or runs is control:
        return "–"
    return _paired([mean_outcomes(side, stage, system) for side in common_seeds([runs, control])])


def _paired(sides: list[dict[str, float]]) -> str:
    """Mean difference of two sides' outcomes over common items, with an interval."""
    first, second = sides
    common = sorted(first.keys() & second.keys())
    return intervals.mean([first[key] - second[key] for key in common]).gap() if common else "no seed in common"


def label(record: Record) -> str:
    """Profile and name of a record, such as `study/lorapar-seed0`."""
    return f"{record.run['profile']}/{record.name}"


def _labels(records: Iterable[Record]) -> str:
    return ", ".join(map(label, records))


def _or_dash(value: float | None) -> float | str:
    return "–" if value is None else value
