"""The pipeline: scores -> partition -> experiments, each phase made once and kept (see `manifests`).

The phase before these, votes and the split they make, is `splits`.
"""

import itertools
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

from lorapar_utils import data, evaluation, models, processes, statistics, training
from lorapar_utils.encoding import encode_examples
from lorapar_utils.importance import score_importance
from lorapar_utils.manifests import completed, inputs_of, is_current, made_from
from lorapar_utils.partition import Partition, build_partition, random_partition
from lorapar_utils.records import Record, fingerprint, new_record, read_record, write_atomically, write_record
from lorapar_utils.settings import Settings
from lorapar_utils.splits import system_examples

Scores = dict[str, torch.Tensor]
STABILITY_DRAWS = 3


def scores(settings: Settings) -> tuple[Scores, Scores]:
    """Importance of every LoRA element to System 1 and to System 2, on `importance.examples` of each."""
    folder = settings.scores_folder
    inputs = _scores_inputs(settings)
    if not is_current(folder, inputs):
        if processes.are_to_start(settings):
            processes.launch("scores", settings)
        else:
            _make_scores(settings, folder, inputs)
    order = None
    loaded = []
    for system in (1, 2):
        values = load_file(folder / f"system{system}.safetensors")
        order = order or _model_order(values)
        loaded.append({name: values[name] for name in order})
    return loaded[0], loaded[1]


def _make_scores(settings: Settings, folder: Path, inputs: dict) -> None:
    count = settings.importance.examples
    found = _score(settings, [_shuffled(system_examples(settings, k), settings)[:count] for k in (1, 2)])

    def keep():
        with completed(folder, inputs) as scratch:
            for system, values in enumerate(found, start=1):
                save_file(values, scratch / f"system{system}.safetensors")

    processes.by_first(keep)


def stability(settings: Settings) -> list[dict]:
    """How far importance depends on which examples are scored, and on how the adapter was drawn.

    Returns
    -------
    list of dict
        `system`; `differ`: `examples` (two disjoint samples of `n` under one adapter, n from `importance.stability`) or
        `adapter` (one sample of the largest n under the adapters of two seeds); `draw` 1, 2, … `STABILITY_DRAWS`;
        `rank_correlation` (Spearman) of all elements; `by_matrix`, that of the matrices' mean scores; `jaccard` of the
        sets selected at the profile's theta. Sizes that leave no second sample are left out.
    """
    folder = settings.runs / "stability" / settings.scores_folder.name
    sizes = settings.importance.stability
    inputs = _scores_inputs(settings) | {"sizes": list(sizes), "draws": STABILITY_DRAWS}
    inputs["theta"] = settings.partition.theta
    if not is_current(folder, inputs):
        rows = _stability_rows(settings) if sizes else []
        with completed(folder, inputs) as scratch:
            write_atomically(scratch / "stability.json", json.dumps(rows))
    return json.loads((folder / "stability.json").read_text())


def _stability_rows(settings: Settings) -> list[dict]:
    seeded = [settings.changed(seed=settings.seed + draw) for draw in range(STABILITY_DRAWS)]
    examples = {system: system_examples(settings, system) for system in (1, 2)}
    rows = []
    model = _fresh_adapter(settings)
    for draw, drawn in enumerate(seeded, start=1):
        for system, n in itertools.product(examples, settings.importance.stability):
            order = _shuffled(examples[system], drawn)
            if 2 * n <= len(order):
                pair = _score(settings, [order[:n], order[n : 2 * n]], model)
                about = {"system": system, "differ": "examples", "n": n, "draw": draw}
                rows.append(about | _agreement(*pair, settings))
    largest = max(settings.importance.stability)
    samples = [_shuffled(examples[system], settings)[:largest] for system in examples]
    each = [_score(drawn, samples) for drawn in seeded]
    for draw, (first, second) in enumerate(itertools.combinations(each, 2), start=1):
        for system, sample in zip(examples, samples, strict=True):
            about = {"system": system, "differ": "adapter", "n": len(sample), "draw": draw}
            rows.append(about | _agreement(first[system - 1], second[system - 1], settings))
    return rows


def _agreement(first: Scores, second: Scores, settings: Settings) -> dict[str, float]:
    both = (first, second)
    flat = [torch.cat([values.flatten() for values in scores.values()]).numpy() for scores in both]
    means = [[float(values.mean()) for values in scores.values()] for scores in both]
    return {
        "rank_correlation": float(spearmanr(*flat).statistic),
        "by_matrix": float(spearmanr(*means).statistic),
        "jaccard": build_partition(first, second, theta=settings.partition.theta).jaccard,
    }


def partition(settings: Settings, selection: str = "importance") -> Partition:
    """The profile's partition, or its random control of equal size."""
    system1, system2 = scores(settings)
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
    spec, profile = settings.experiments.get(name), settings
    settings = settings.for_experiment(name, seed)
    folder = settings.runs / "experiments" / f"{name}-seed{seed}"
    path = settings.runs / "records" / f"{name}-seed{seed}.json"
    inputs = _experiment_inputs(settings, spec)
    if path.is_file() and is_current(folder, inputs):
        return read_record(path)
    if processes.are_to_start(settings):
        processes.launch("experiment", profile, name, seed)
        return read_record(path)
    stages = _Stages(settings, spec, folder, inputs)
    outcomes = {"base": stages.score_base()} if not spec.stages else stages.run()

    def keep():
        record = _experiment_record(settings, spec, f"{name}-seed{seed}", outcomes, stages.jaccard())
        write_record(record, path)
        write_atomically(folder / "manifest.json", json.dumps(inputs, indent=1))

    processes.by_first(keep)
    return read_record(path)


class _Stages:
    """The stages of one experiment over one model, loaded only when a stage really has to run."""

    def __init__(self, settings: Settings, spec, folder: Path, inputs: dict):
        self.settings, self.spec, self.folder, self.inputs = settings, spec, folder, inputs
        self._model = self._tokenizer = self._trainable = None
        self.partition = partition(settings, spec.selection) if spec.method == "lorapar" else None
        self._converts = settings.adapter.init in ("olora", "pissa") and bool(spec.stages)

    def score_base(self) -> dict:
        """Score the model without an adapter, or read back what was found."""
        return self._finished(
            "base", self.inputs, lambda: {"history": [], **self._score(*models.load_base(self.settings))}
        )

    def run(self) -> dict[str, dict]:
        """Train and score each stage from the one before, or read back what was finished, by another experiment too."""
        outcomes, previous = {}, None
        for number, stage in enumerate(self.spec.stages, start=1):
            name, inputs = f"stage{number}", _stage_inputs(self.inputs, number)
            make = partial(self._train_and_score, name, stage, previous, inputs)
            outcomes[name] = self._finished(name, inputs, make)
            previous = self.folder / name
        return outcomes

    def jaccard(self) -> dict[str, dict]:
        if self.partition is None:
            return {}
        return {"jaccard": {"value": self.partition.jaccard, "n": self.partition.active[0].numel()}}

    def _finished(self, name: str, wanted: dict, make: Callable[[], dict]) -> dict:
        home = self.folder / name
        if not is_current(home, wanted):
            twin = processes.by_first(lambda: _made_elsewhere(home, wanted))
            outcome = None if twin else make()

            def keep():
                with completed(home, wanted) as scratch:
                    if twin:
                        shutil.copytree(twin, scratch, dirs_exist_ok=True)
                    else:
                        initial = self.folder / ".initial" if self._converts else None
                        if self._model is not None:
                            models.save_adapter(self._model, scratch, initial)
                        write_atomically(scratch / "outcome.json", json.dumps(outcome))
                for unneeded in self.folder.glob(f".{name}-steps-*"):
                    shutil.rmtree(unneeded)

            processes.by_first(keep)
        return json.loads((home / "outcome.json").read_text())

    def _train_and_score(self, name: str, stage: str, previous: Path | None, inputs: dict) -> dict:
        model, tokenizer = self._loaded(previous)
        masks = self._masks(model, stage)
        began = time.time()
        # Named by what the stage rests on: a checkpoint of other settings is never gone on from.
        checkpoints = self.folder / f".{name}-steps-{fingerprint(inputs)}"
        history = self._train(stage, model, tokenizer, masks, checkpoints)
        trained = time.time()
        active = sum(int(mask.sum()) for mask in masks.values())
        return {
            "history": history,
            "active": active / sum(mask.numel() for mask in masks.values()),
            "elements": sum(mask.numel() for mask in masks.values()),
            "train_seconds": round(trained - began, 1),
            "peak_bytes": _peak_bytes(),
            **self._score(model, tokenizer),
        }

    def _loaded(self, previous: Path | None):
        if self._model is None:
            base, self._tokenizer = models.load_base(self.settings)
            self._model = models.attach_adapter(base, self.settings)
            self._trainable = [name for name, p in self._model.named_parameters() if p.requires_grad]
            if self._converts:
                processes.by_first(lambda: self._model.save_pretrained(self.folder / ".initial"))
            if previous is not None:
                models.restore_adapter(self._model, previous)
        return self._model, self._tokenizer

    def _masks(self, model: PeftModel, stage: str) -> dict[str, torch.Tensor]:
        if self.partition is not None:
            return self.partition.stage_mask(2 if stage == "grpo" else 1)
        parameters = dict(model.named_parameters())
        return {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in self._trainable}

    def _train(self, stage: str, model: PeftModel, tokenizer, masks: dict, checkpoints: Path) -> list[dict]:
        common = (masks, self.settings, checkpoints, self._watch(model, tokenizer))
        if stage == "grpo":
            return training.run_grpo(model, tokenizer, system_examples(self.settings, 2), *common)
        examples = system_examples(self.settings, 1)
        if stage == "sft_all":
            examples = examples + system_examples(self.settings, 2)
        return training.run_sft(model, tokenizer, examples, *common)

    def _watch(self, model: PeftModel, tokenizer) -> Callable[[], dict] | None:
        """Greedy accuracy of each system on a few validation prompts; None where nobody asked for it."""
        count = self.settings.evaluation.watch_prompts
        if count == 0 or "grpo" not in self.spec.stages:
            return None
        prompts = [row for system in (1, 2) for row in self._validation(system)[:count]]

        def watch() -> dict:
            items = evaluation.score_greedy(model, tokenizer, prompts, self.settings)
            metrics = evaluation.accuracy_metrics(items)
            return {f"validation/system{k}": metrics[f"system{k}"]["value"] for k in (1, 2)}

        return watch

    def _validation(self, system: int) -> list[dict]:
        rows = [row for row in data.load_pool(self.settings) if row["split"] == "validation"]
        return [row for row in rows if data.construction_system(row["steps"]) == system]

    def _score(self, model, tokenizer) -> dict:
        began = time.time()
        test = [row for row in data.load_pool(self.settings) if row["split"] == "test"]
        validation = self._validation(2)
        outcome = {"items": evaluation.score_greedy(model, tokenizer, test, self.settings), "pass": {}}
        if "grpo" in self.spec.stages and validation:
            chosen = validation[: self.settings.evaluation.pass_k_prompts]
            outcome["pass"] = evaluation.pass_at(model, tokenizer, chosen, self.settings)
        outcome["benchmarks"] = {
            name: evaluation.benchmark_items(model, tokenizer, name, self.settings)
            for name in self.settings.evaluation.benchmarks
        }
        return outcome | {"score_seconds": round(time.time() - began, 1)}


def _peak_bytes() -> int:
    """The most memory that this process has held so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _experiment_record(settings, spec, name: str, outcomes: dict[str, dict], jaccard: dict) -> Record:
    metrics, tables, items = dict(jaccard), {}, []
    for label, outcome in outcomes.items():
        metrics |= {f"{label}/{key}": value for key, value in evaluation.accuracy_metrics(outcome["items"]).items()}
        metrics |= {f"{label}/{key}": value for key, value in outcome["pass"].items()}
        for benchmark, found in outcome["benchmarks"].items():
            scored = evaluation.benchmark_metrics(benchmark, found)
            metrics |= {f"{label}/{benchmark}/{key}": value for key, value in scored.items()}
            items += [{"stage": f"{label}/{benchmark}", **item} for item in found]
        if label != "base":
            metrics[f"active/{label}"] = {"value": outcome["active"], "n": outcome["elements"]}
            for key in ("train_seconds", "peak_bytes"):
                metrics[f"{label}/{key}"] = {"value": outcome[key], "n": 1}
        tables[f"history_{label}"] = outcome["history"]
        items += [{"stage": label, **item} for item in outcome["items"]]
    if len(outcomes) == 2:
        for system in (1, 2):
            before, after = (
                [item["correct"] for item in outcome["items"] if item["system"] == system]
                for outcome in outcomes.values()
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
        | {"modules": settings.adapter.modules, "init": settings.adapter.init, "score": settings.importance.score},
        notebook=f"experiment.ipynb out.ipynb -p name {name.rsplit('-seed', 1)[0]} -p seed {settings.seed}",
        seconds=sum(o.get("train_seconds", 0.0) + o["score_seconds"] for o in outcomes.values()),
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
    used = {"pool": settings.pool, "evaluation": settings.evaluation}
    if set(spec.stages) & {"sft", "sft_all"}:
        used["sft"] = settings.sft
    if "grpo" in spec.stages:
        used["grpo"] = settings.grpo
    if spec.method == "lorapar":
        learnt = {"scores": fingerprint(_scores_inputs(settings)), "partition": settings.partition.model_dump()}
    else:
        systems = [_what_is_learnt(system_examples(settings, k)) for k in (1, 2)] if spec.stages else []
        learnt = {"systems": fingerprint(systems), "adapter": settings.adapter.model_dump(), "seed": settings.seed}
    code = [
        "training",
        "answer_head",
        "bundles",
        "generation",
        "optim",
        "partition",
        "rewards",
        "encoding",
        "evaluation",
    ]
    if settings.evaluation.benchmarks:
        code += ["harness", "humaneval", "sandbox"]
    return inputs_of(
        settings,
        (*code, "models"),
        experiment=spec.model_dump(exclude={"title", "seeds", "sweep"}),
        **learnt,
        **{key: section.model_dump() for key, section in used.items()},
    )


def _stage_inputs(inputs: dict, number: int) -> dict:
    """What of an experiment's inputs the stage of that number rests on: what only later stages read is left out."""
    experiment = inputs["experiment"]
    done = experiment["stages"][:number]
    # An experiment that will train by GRPO also measures, after each stage, what could be reinforced.
    about = {"method": experiment["method"], "selection": experiment["selection"], "stages": done}
    found = inputs | {"experiment": about | {"reinforced": "grpo" in experiment["stages"]}}
    # The share of the common region that a kind of stage trains, and its settings.
    for kinds, share, section in (({"sft", "sft_all"}, "alpha", "sft"), ({"grpo"}, "beta", "grpo")):
        if not kinds & set(done):
            found.pop(section, None)
            if "partition" in found:
                found["partition"] = {key: value for key, value in found["partition"].items() if key != share}
    return found


def _made_elsewhere(home: Path, inputs: dict) -> Path | None:
    """Where another experiment of the profile has already finished the same stage from the same inputs."""
    for other in sorted(home.parent.parent.glob(f"*/{home.name}")):
        if other != home and made_from(other) == inputs:
            print(f"{home.parent.name}: {home.name} is that of {other.parent.name}")
            return other
    return None


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
