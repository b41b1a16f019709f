"""The record of an experiment, put together from what was kept of its stages."""

from collections.abc import Iterable

from lorapar_utils import evaluation
from lorapar_utils.cache import fingerprint
from lorapar_utils.data import learnt_from
from lorapar_utils.models.files import weights_hash
from lorapar_utils.models.identity import model_identity
from lorapar_utils.records import Record, intervals, new_record
from lorapar_utils.records.intervals import Metric
from lorapar_utils.settings import ExperimentSection, Settings


def experiment_record(
    settings: Settings,
    spec: ExperimentSection,
    name: str,
    outcomes: dict[str, dict],
    origin: dict,
    pool: Iterable[dict],
    systems: dict[int, list[dict]],
) -> Record:
    """The record of an experiment from what was kept of its stages.

    Parameters
    ----------
    outcomes
        `base` or `stage1`, `stage2` -> what training (`history`, `active`, …) and measuring (`items`, …) left.
    origin
        That of the newest outcome (see `cache.origin`).
    systems
        D1 and D2; empty without training.
    """
    metrics, tables, items = {}, {}, []
    first = next(iter(outcomes.values()))
    if first.get("jaccard") is not None:
        metrics["jaccard"] = Metric(first["jaccard"], first["elements"])
    for label, outcome in outcomes.items():
        metrics |= {f"{label}/{key}": value for key, value in evaluation.accuracy_metrics(outcome["items"]).items()}
        metrics |= {f"{label}/{key}": Metric(**values) for key, values in outcome["pass"].items()}
        for benchmark, answers in outcome["benchmarks"].items():
            scored = evaluation.benchmark_metrics(benchmark, answers)
            metrics |= {f"{label}/{benchmark}/{key}": value for key, value in scored.items()}
            items += [{"stage": f"{label}/{benchmark}", **item} for item in answers]
        if label != "base":
            metrics[f"active/{label}"] = Metric(outcome["active"], outcome["elements"])
            for key in ("train_seconds", "peak_bytes"):
                metrics[f"{label}/{key}"] = Metric(outcome[key], 1)
        tables[f"history_{label}"] = outcome["history"]
        items += [{"stage": label, **item} for item in outcome["items"]]
    if len(outcomes) == 2:
        for system in (1, 2):
            before, after = (
                [item["correct"] for item in outcome["items"] if item["system"] == system and "correct" in item]
                for outcome in outcomes.values()
            )
            if before:
                metrics[f"gain/system{system}"] = intervals.paired_difference(before, after)
        if settings.has_free_text:
            before, after = ([item["overlap"] for item in outcome["items"]] for outcome in outcomes.values())
            metrics["gain/overlap"] = intervals.mean([b - a for a, b in zip(before, after, strict=True)])
    modules = settings.adapter.modules
    modules = modules if isinstance(modules, str) else "+".join(modules)
    return new_record(
        name,
        settings,
        metrics=metrics,
        tables=tables,
        items=items,
        parameters=spec.model_dump()
        | settings.partition.model_dump()
        | {"modules": modules, "init": settings.adapter.init, "score": settings.importance.score}
        | {
            "learning_rate": settings.sft.learning_rate,
            "epochs": settings.sft.epochs,
            "grpo_learning_rate": settings.grpo.learning_rate,
            "kl": settings.grpo.kl,
            "r": settings.adapter.r,
            "lora_alpha": settings.adapter.lora_alpha,
            "flipped": settings.voting.flipped,
            "pool": settings.pool.source,
            "pool_seed": settings.pool.seed,
        },
        notebook=f"experiment.ipynb out.ipynb -p name {name.rsplit('-seed', 1)[0]} -p seed {settings.seed}",
        seconds=sum(o.get("train_seconds", 0.0) + o["score_seconds"] for o in outcomes.values()),
        hashes={
            "model": fingerprint(model_identity(settings)),
            "weights": weights_hash(settings),
            "data": fingerprint(list(pool)),
            **{f"D{k}": fingerprint(learnt_from(rows)) for k, rows in systems.items()},
        },
        origin=origin,
    )
