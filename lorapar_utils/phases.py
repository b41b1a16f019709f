"""The pipeline: scores -> partition -> experiments, each phase made once and kept (see `manifests`).

The phase before these, votes and the split they make, is `splits`.
"""

import json
import shutil
import time
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

from lorapar_utils import data, evaluation, models, statistics, training
from lorapar_utils.encoding import encode_examples
from lorapar_utils.importance import score_importance
from lorapar_utils.manifests import completed, inputs_of, is_current
from lorapar_utils.partition import Partition, build_partition, full_partition, random_partition
from lorapar_utils.records import Record, fingerprint, new_record, read_record, write_atomically, write_record
from lorapar_utils.settings import Settings
from lorapar_utils.splits import system_examples

Scores = dict[str, torch.Tensor]
STAGE_NAMES = {"sft": "stage1", "sft_all": "stage1", "grpo": "stage2"}


def scores(settings: Settings) -> tuple[Scores, Scores]:
    """Importance of every LoRA element to System 1 and to System 2, on `importance.examples` of each."""
    folder = settings.scores_folder
    inputs = _scores_inputs(settings)
    if not is_current(folder, inputs):
        count = settings.importance.examples
        found = _score(settings, [_shuffled(system_examples(settings, k), settings)[:count] for k in (1, 2)])
        with completed(folder, inputs) as scratch:
            for system, values in enumerate(found, start=1):
                save_file(values, scratch / f"system{system}.safetensors")
    order = None
    loaded = []
    for system in (1, 2):
        values = load_file(folder / f"system{system}.safetensors")
        order = order or _model_order(values)
        loaded.append({name: values[name] for name in order})
    return loaded[0], loaded[1]


def stability(settings: Settings) -> list[dict]:
    """How far two disjoint samples of `n` examples agree on a system's importance, for n in `importance.stability`.

    Returns
    -------
    list of dict
        `system`, `n`, `rank_correlation` (Spearman, over all elements), `jaccard` of the sets selected at the
        profile's theta. Sizes that leave no second sample are left out.
    """
    folder = settings.runs / "stability" / settings.scores_folder.name
    inputs = _scores_inputs(settings) | {"sizes": settings.importance.stability, "theta": settings.partition.theta}
    inputs = json.loads(json.dumps(inputs))
    if not is_current(folder, inputs):
        model = None
        rows = []
        for system in (1, 2):
            examples = _shuffled(system_examples(settings, system), settings)
            for n in settings.importance.stability:
                if 2 * n > len(examples):
                    continue
                model = model or _fresh_adapter(settings)
                first, second = _score(settings, [examples[:n], examples[n : 2 * n]], model)
                pair = build_partition(first, second, theta=settings.partition.theta)
                flat = [torch.cat([v.flatten() for v in values.values()]).numpy() for values in (first, second)]
                rank_correlation = float(spearmanr(*flat).statistic)
                rows.append({"system": system, "n": n, "rank_correlation": rank_correlation, "jaccard": pair.jaccard})
        with completed(folder, inputs) as scratch:
            write_atomically(scratch / "stability.json", json.dumps(rows))
    return json.loads((folder / "stability.json").read_text())


def partition(settings: Settings, selection: str = "importance") -> Partition:
    """The profile's partition, its random control of equal size, or all elements (plain LoRA)."""
    system1, system2 = scores(settings)
    if selection == "all":
        return full_partition({name: tuple(values.shape) for name, values in system1.items()})
    values = settings.partition
    built = build_partition(system1, system2, theta=values.theta, alpha=values.alpha, beta=values.beta)
    return random_partition(built, settings.seed) if selection == "random" else built


def experiment(settings: Settings, name: str, seed: int) -> Record:
    """Train and score one configuration of `experiments`; read it back if nothing it rests on changed.

    A stage that was finished before an interruption is not trained again; one that was begun goes on from its last
    checkpoint, to the same end.

    Returns
    -------
    Record
        Metrics `STAGE/system1`, `STAGE/system2`, `STAGE/accuracy`, … for STAGE in `base` (no training), `stage1`,
        `stage2`; `active/stage1`, …; tables `history_STAGE` and `samples`; items with test outcomes.
    """
    spec = settings.experiments.get(name)
    settings = settings.for_experiment(name, seed)
    folder = settings.runs / "experiments" / f"{name}-seed{seed}"
    path = settings.runs / "records" / f"{name}-seed{seed}.json"
    inputs = _experiment_inputs(settings, spec)
    if path.is_file() and is_current(folder, inputs):
        return read_record(path)
    stages = _Stages(settings, spec, folder, inputs)
    outcomes = {stage: stages.run(stage) for stage in (spec.stages or ("base",))}
    record = _experiment_record(settings, spec, f"{name}-seed{seed}", outcomes, stages.active_metrics())
    write_record(record, path)
    write_atomically(folder / "manifest.json", json.dumps(inputs, indent=1))
    return record


class _Stages:
    """The stages of one experiment over one model, loaded only when a stage really has to run."""

    def __init__(self, settings: Settings, spec, folder: Path, inputs: dict):
        self.settings, self.spec, self.folder, self.inputs = settings, spec, folder, inputs
        self._model = self._tokenizer = None
        self._previous: Path | None = None
        self.partition = None
        if spec.stages:
            self.partition = partition(settings, "all" if spec.method == "lora" else spec.selection)

    def run(self, stage: str) -> dict:
        """Train `stage` from the one before and score it, or read back what was finished."""
        name = STAGE_NAMES.get(stage, "base")
        home = self.folder / name
        wanted = {**self.inputs, "stage": stage}
        if not is_current(home, wanted):
            model, tokenizer = self._loaded()
            began = time.time()
            checkpoints = self.folder / f".{name}-{fingerprint(wanted)}"
            history = [] if stage == "base" else self._train(stage, model, tokenizer, checkpoints)
            trained = time.time()
            outcome = {"history": history, **self._score(model, tokenizer, name)}
            outcome |= {"train_seconds": round(trained - began, 1), "score_seconds": round(time.time() - trained, 1)}
            with completed(home, wanted) as scratch:
                if stage != "base":
                    model.save_pretrained(scratch / "adapter")
                write_atomically(scratch / "outcome.json", json.dumps(outcome))
            for unneeded in self.folder.glob(f".{name}-*"):
                shutil.rmtree(unneeded)
        self._previous = home / "adapter"
        return json.loads((home / "outcome.json").read_text())

    def active_metrics(self) -> dict[str, dict]:
        if self.partition is None:
            return {}
        total = self.partition.active[0].numel()
        shares = {f"active/{key}": {"value": v, "n": total} for key, v in self.partition.active_share.items()}
        return shares | {"jaccard": {"value": self.partition.jaccard, "n": total}}

    def _loaded(self):
        if self._model is None:
            base, self._tokenizer = models.load_base(self.settings)
            if not self.spec.stages:
                self._model = base
            elif self._previous is not None:
                self._model = PeftModel.from_pretrained(base, self._previous, is_trainable=True)
            else:
                self._model = models.attach_adapter(base, self.settings)
        return self._model, self._tokenizer

    def _train(self, stage: str, model: PeftModel, tokenizer, checkpoints: Path) -> list[dict]:
        masks = self.partition.stage_mask(2 if stage == "grpo" else 1)
        if stage == "grpo":
            prompts = system_examples(self.settings, 2)
            return training.run_grpo(model, tokenizer, prompts, masks, self.settings, checkpoints)
        examples = system_examples(self.settings, 1)
        if stage == "sft_all":
            examples = examples + system_examples(self.settings, 2)
        return training.run_sft(model, tokenizer, examples, masks, self.settings, checkpoints)

    def _score(self, model, tokenizer, name: str) -> dict:
        rows = list(data.load_pool(self.settings))
        test = [row for row in rows if row["split"] == "test"]
        validation = [
            row for row in rows if row["split"] == "validation" and data.construction_system(row["steps"]) == 2
        ]
        outcome = {"items": evaluation.score_greedy(model, tokenizer, test, self.settings), "pass": {}}
        if "grpo" in self.spec.stages and validation:
            chosen = validation[: self.settings.evaluation.pass_k_prompts]
            outcome["pass"] = evaluation.pass_at(model, tokenizer, chosen, self.settings)
        return outcome


def _experiment_record(settings, spec, name: str, outcomes: dict, active: dict) -> Record:
    metrics, tables, items = dict(active), {}, []
    for stage, outcome in outcomes.items():
        label = STAGE_NAMES.get(stage, "base")
        metrics |= {f"{label}/{key}": value for key, value in evaluation.accuracy_metrics(outcome["items"]).items()}
        metrics |= {f"{label}/{key}": value for key, value in outcome["pass"].items()}
        metrics[f"{label}/train_seconds"] = {"value": outcome["train_seconds"], "n": 1}
        tables[f"history_{label}"] = outcome["history"]
        items += [{"stage": label, **item} for item in outcome["items"]]
    if {"sft", "grpo"} <= set(outcomes):
        for system in (1, 2):
            before, after = (
                [item["correct"] for item in outcomes[stage]["items"] if item["system"] == system]
                for stage in ("sft", "grpo")
            )
            metrics[f"gain/system{system}"] = statistics.paired_difference(before, after)
    return new_record(
        name,
        settings,
        metrics=metrics,
        tables=tables,
        items=items,
        parameters=spec.model_dump()
        | settings.partition.model_dump()
        | {"modules": settings.adapter.modules, "score": settings.importance.score},
        notebook=f"experiment.ipynb out.ipynb -p name {name.rsplit('-seed', 1)[0]} -p seed {settings.seed}",
        seconds=sum(o["train_seconds"] + o["score_seconds"] for o in outcomes.values()),
        hashes=_hashes(settings),
    )


def _scores_inputs(settings: Settings) -> dict:
    return inputs_of(
        settings,
        ("importance", "encoding", "models"),
        # What the votes came to, not how: asking again with the same outcome trains nothing again.
        **{f"system{k}": fingerprint(_what_is_learnt(system_examples(settings, k))) for k in (1, 2)},
        adapter=settings.adapter.model_dump(),
        examples=settings.importance.examples,
        score=settings.importance.score,
        max_length=settings.sft.max_length,
        seed=settings.seed,
    )


def _what_is_learnt(rows: list[dict]) -> list[list]:
    return [[row[key] for key in ("id", "prompt", "answer", "solution")] for row in rows]


def _experiment_inputs(settings: Settings, spec) -> dict:
    used = {"sft": settings.sft, "grpo": settings.grpo, "evaluation": settings.evaluation}
    if "grpo" not in spec.stages:
        del used["grpo"]
    return inputs_of(
        settings,
        (
            "training",
            "answer_head",
            "bundles",
            "generation",
            "optim",
            "partition",
            "rewards",
            "encoding",
            "evaluation",
            "models",
        ),
        scores=fingerprint(_scores_inputs(settings)),
        experiment=spec.model_dump(exclude={"title", "seeds", "sweep"}),
        partition=settings.partition.model_dump(),
        **{key: section.model_dump() for key, section in used.items()},
    )


def _hashes(settings: Settings) -> dict[str, str]:
    return {
        "model": fingerprint(settings.model.model_dump()),
        "data": fingerprint([row for row in data.load_pool(settings)]),
    }


def _shuffled(rows: list[dict], settings: Settings) -> list[dict]:
    generator = torch.Generator().manual_seed(settings.seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def _fresh_adapter(settings: Settings) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    base, tokenizer = models.load_base(settings)
    return models.attach_adapter(base, settings), tokenizer


def _score(settings: Settings, sets: list[list[dict]], loaded: tuple | None = None) -> list[Scores]:
    model, tokenizer = loaded or _fresh_adapter(settings)
    chosen = settings.importance
    return [
        score_importance(
            model, encode_examples(rows, tokenizer, settings), batch_size=chosen.batch_size, score=chosen.score
        )
        for rows in sets
    ]


def _model_order(values: Scores) -> list[str]:
    """Layer by layer, A before B: safetensors keeps names, not order, and ties are broken by order."""

    def key(name: str):
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

    return sorted(values, key=key)
