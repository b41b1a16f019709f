"""Records in, tables out: ours beside the paper's, each with n and interval. No training, no torch."""

from collections.abc import Iterable

import pandas as pd
import yaml

from lorapar_utils import statistics
from lorapar_utils.records import Record, common_seeds, mean_outcomes
from lorapar_utils.settings import project_root


def paper(table: str) -> dict | list:
    """One table of the paper, as `book/paper_tables.yaml` holds it (accuracies in percent)."""
    return yaml.safe_load((project_root() / "book" / "paper_tables.yaml").read_text())[table]


def percent(metric: dict | None) -> str:
    """`23.1 % [17.0, 30.2], n = 150`; what is missing reads "not measured"."""
    if metric is None:
        return "not measured"
    text = f"{100 * metric['value']:.1f} %"
    if "low" in metric:
        text += f" [{100 * metric['low']:.1f}, {100 * metric['high']:.1f}]"
    return f"{text}, n = {metric['n']:,}"


def number(metric: dict | None) -> str:
    """`0.27 [0.22, 0.32], n = 512`; what is missing reads "not measured"."""
    if metric is None:
        return "not measured"
    interval = f" [{metric['low']:.2f}, {metric['high']:.2f}]" if "low" in metric else ""
    return f"{metric['value']:.2f}{interval}, n = {metric['n']:,}"


def stage_table(records: Iterable[Record]) -> pd.DataFrame:
    """One row an experiment: System 1 and System 2 test accuracy after each stage, and the active share."""
    rows = []
    for record in records:
        metrics = record.result["metrics"]
        for stage in ("base", "stage1", "stage2"):
            if f"{stage}/accuracy" in metrics:
                rows.append(
                    {
                        "experiment": record.run["parameters"]["title"],
                        "seed": record.run["seed"],
                        "stage": stage,
                        "System 1": percent(metrics.get(f"{stage}/system1")),
                        "System 2": percent(metrics.get(f"{stage}/system2")),
                        "active": _share(metrics.get(f"active/{stage}")),
                    }
                )
    return pd.DataFrame(rows)


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
                "ours, accuracy": percent(point),
                "each seed": ", ".join(f"{100 * value:.1f}" for value in point["seeds"]),
                "paper, active %": 100.0 if every else cells[1] if column else None,
                "paper, accuracy %": full if every else cells[column] if column else None,
            }
        )
    return pd.DataFrame(rows).astype({"paper, active %": "object", "paper, accuracy %": "object"}).fillna("–")


def theta_points(records: Iterable[Record]) -> list[dict]:
    """One point for each modules, theta and selection: mean accuracy over the seeds, its interval over test items.

    One record a seed counts, whatever experiment it belongs to: at theta = 1 every way of selecting is LoRA with all
    elements.
    """
    groups: dict[tuple, dict[int, Record]] = {}
    for record in records:
        parameters = record.run["parameters"]
        if "stage1/accuracy" not in record.result["metrics"]:
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
            "active": next(iter(runs.values())).metric("active/stage1")["value"],
            "seeds": [run.metric("stage1/accuracy")["value"] for _, run in sorted(runs.items())],
            **statistics.mean(list(mean_outcomes(runs.values(), "stage1").values())),
        }
        for (modules, theta, selection), runs in sorted(groups.items())
    ]


# The paper's row for (our method, our adapter's init, trained by GRPO too), in its Table 6.
PUBLISHED = {
    ("lora", "normal", False): "LoRA",
    ("olora", "olora", False): "OLoRA",
    ("pissa", "pissa", False): "PiSSA",
    ("pissa", "pissa", True): "PiSSA + RL",
    ("prompt_tuning", "normal", False): "Prompt Tuning",
    ("p_tuning", "normal", False): "P-Tuning",
    ("prefix_tuning", "normal", False): "Prefix-Tuning",
    ("ia3", "normal", False): "IA3",
    ("lorapar", "normal", True): "LoRA-PAR, LoRA, theta=0.9",
    ("lorapar", "pissa", True): "LoRA-PAR, PiSSA, theta=0.9",
}


def benchmark_table(records: Iterable[Record]) -> pd.DataFrame:
    """Tables 4 and 6 at our scale: each method after its first and its second stage, beside the paper's GSM8K.

    The paper's columns are epochs: two of SFT, or one of SFT and one of GRPO.
    """
    published = {row[0]: row for row in paper("table6_broader_peft")["rows"]}
    rows = []
    for record in records:
        metrics, parameters = record.result["metrics"], record.run["parameters"]
        key = (parameters["method"], parameters.get("init", "normal"), "grpo" in parameters["stages"])
        row = published.get(PUBLISHED.get(key) if parameters["stages"] else None, [None, "–", "–"])
        rows.append(
            {
                "method": parameters["title"],
                "ours, first stage": percent(metrics.get("stage1/accuracy") or metrics.get("base/accuracy")),
                "ours, second stage": percent(metrics.get("stage2/accuracy")),
                "paper, GSM8K e1 %": row[1],
                "paper, GSM8K e2 %": row[2],
                "seed": record.run["seed"],
            }
        )
    return pd.DataFrame(rows)


def alpha_beta_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 2 at our scale: accuracy after each stage by alpha and beta, over the seeds, the paper's beside it."""
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
                "active (stage 1)": _share(group[0].metric("active/stage1")),
                "active (stage 2)": _share(group[0].metric("active/stage2")),
                "after SFT": percent(statistics.mean(list(mean_outcomes(group, "stage1").values()))),
                "after RL": percent(statistics.mean(list(mean_outcomes(group, "stage2").values()))),
                "paper, after SFT %": published.get((alpha, beta), ["–"] * 4)[2],
                "paper, after RL %": published.get((alpha, beta), ["–"] * 4)[3],
            }
            for (alpha, beta), group in sorted(runs.items())
        ]
    )


def order_table(records: Iterable[Record]) -> pd.DataFrame:
    """Table 7 at our scale: SFT then RL against RL then SFT, over the seeds, the paper's (Qwen-2.5-7B) beside it."""
    published = {row[0]: row for row in paper("table7_order")["rows"]}
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        runs.setdefault(tuple(record.run["parameters"]["stages"]), []).append(record)
    rows = []
    for stages, group in sorted(runs.items(), reverse=True):
        row = published["SFT then RL (LoRA-PAR)" if stages == ("sft", "grpo") else "RL then SFT"]
        rows.append(
            {
                "schedule": " then ".join("RL" if stage == "grpo" else "SFT" for stage in stages),
                "seeds": len(group),
                "after phase 1": percent(statistics.mean(list(mean_outcomes(group, "stage1").values()))),
                "after phase 2": percent(statistics.mean(list(mean_outcomes(group, "stage2").values()))),
                "paper, phase 1 %": row[1],
                "paper, phase 2 %": row[2],
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
                "agrees with construction": percent(row["accuracy"]),
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
        accuracies = [record.metric("stage1/accuracy")["value"] for record in runs[name]]
        rows.append(
            {
                "split": runs[name][0].run["parameters"]["title"],
                "seeds": len(runs[name]),
                "ours, accuracy": percent(statistics.mean(list(mean_outcomes(runs[name], "stage1").values()))),
                "each seed": ", ".join(f"{100 * accuracy:.1f}" for accuracy in accuracies),
                **{
                    f"gap to a random split{part}": _gap(runs[name], runs.get("split_random", []), system)
                    for part, system in (("", None), (", System 1", 1), (", System 2", 2))
                },
                "paper, GSM8K %": published.get(strategy, "–"),
            }
        )
    return pd.DataFrame(rows)


def _gap(runs: list[Record], control: list[Record], system: int | None) -> str:
    if not control or runs is control:
        return "–"
    first, second = (mean_outcomes(side, "stage1", system) for side in common_seeds([runs, control]))
    if not first:
        return "no seed in common"
    gap = statistics.mean([first[key] - second[key] for key in sorted(first.keys() & second.keys())])
    return f"{100 * gap['value']:+.1f} [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}], n = {gap['n']}"


def _share(metric: dict | None) -> str:
    return "–" if metric is None else f"{100 * metric['value']:.1f} %"
