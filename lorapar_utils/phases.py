"""The pipeline: scores -> partition -> experiments, each phase made once and kept (see `manifests`).

The phase before these, votes and the split they make, is `splits`.
"""

import functools
import io
import itertools
import json
import resource
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

from lorapar_utils import data, evaluation, models, processes, statistics, training
from lorapar_utils.encoding import encode_examples
from lorapar_utils.errors import InputError
from lorapar_utils.importance import score_importance
from lorapar_utils.manifests import completed, folder_hashes, inputs_of, is_current, made_from, model_identity
from lorapar_utils.partition import Partition, build_partition, random_partition
from lorapar_utils.records import Record, fingerprint, new_record, read_record, write_atomically, write_record
from lorapar_utils.settings import Settings
from lorapar_utils.shortcuts import rotation_limit
from lorapar_utils.splits import system_examples
from lorapar_utils.statistics import Metric

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
    return json.loads((folder / "stability.json").read_text(encoding="utf-8"))


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
    """Train and score one configuration of `experiments`; what was made before from the same inputs is read back.

    A stage that was finished before an interruption is not trained again; one that was begun goes on from its last
    checkpoint, to the same end. What is measured after a stage is kept apart from its training, and the record is put
    together from both each time: a metric or a benchmark that was added later needs no training.

    Returns
    -------
    Record
        Metrics `STAGE/system1`, `STAGE/system2`, `STAGE/accuracy`, … for STAGE in `base` (no training), `stage1`,
        `stage2`; `active/stage1`, …; tables `history_STAGE` and `samples`; items with test outcomes.

    Raises
    ------
    InputError
        An unknown experiment, or, before anything is trained, examples that one of its stages cannot read.
    """
    spec, profile = settings.experiments.get(name), settings
    settings = settings.for_experiment(name, seed)
    folder = settings.runs / "experiments" / f"{name}-seed{seed}"
    path = settings.runs / "records" / f"{name}-seed{seed}.json"
    stages = _Stages(settings, spec, folder, _experiment_inputs(settings, spec))
    if not stages.are_done() and processes.are_to_start(settings):
        processes.launch("experiment", profile, name, seed)
    outcomes = {"base": stages.score_base()} if not spec.stages else stages.run()

    def keep():
        record = _experiment_record(settings, spec, f"{name}-seed{seed}", outcomes)
        before = None if stages.made else _kept_record(path)
        if before is not None:
            # Measured before: only what is read from it may have changed.
            kept = {key: before.run[key] for key in ("created", "seconds")}
            same = before.items == json.loads(json.dumps(record.items))
            same &= before.result == json.loads(json.dumps(record.result))
            if same and all(before.run[k] == json.loads(json.dumps(record.run[k])) for k in ("parameters", "command")):
                return
            record = replace(record, run=record.run | kept, environment=before.environment)
        write_record(record, path)

    processes.by_first(keep)
    return read_record(path)


class _Stages:
    """The stages of one experiment over one model, loaded only when a stage really has to be trained or scored.

    Attributes
    ----------
    made
        Whether anything was trained or scored anew.
    """

    def __init__(self, settings: Settings, spec, folder: Path, inputs: dict):
        self.settings, self.spec, self.folder, self.inputs = settings, spec, folder, inputs
        self.made = False
        self._model = self._tokenizer = self._trainable = self._holds = None
        self._converts = settings.adapter.init in ("olora", "pissa") and bool(spec.stages)

    @functools.cached_property
    def partition(self) -> Partition | None:
        return partition(self.settings, self.spec.selection) if self.spec.method == "lorapar" else None

    def are_done(self) -> bool:
        """Whether every stage was trained and scored from these inputs."""
        names = [f"stage{number}" for number in range(1, len(self.spec.stages) + 1)]
        wanted = {name: _stage_inputs(self.inputs, number) for number, name in enumerate(names, start=1)}
        wanted |= {f"{name}.scores": self._scoring(name) for name in names or ["base"]}
        return all(made_from(self.folder / name) == inputs for name, inputs in wanted.items())

    def score_base(self) -> dict:
        """Score the model without an adapter, or read back what was measured."""
        return {"history": [], **self._scored("base")}

    def run(self) -> dict[str, dict]:
        """Train and score each stage from the one before, or read back what was finished, by another experiment too."""
        outcomes = {}
        if not self.are_done():
            self._check()
        for number, stage in enumerate(self.spec.stages, start=1):
            name, previous = f"stage{number}", f"stage{number - 1}" if number > 1 else None
            trained = self._trained(name, stage, previous, _stage_inputs(self.inputs, number))
            outcomes[name] = trained | self._scored(name)
        return outcomes

    def _check(self) -> None:
        """Read all that training and scoring will read: what cannot be is named before the first stage is trained."""
        evaluation.check_benchmarks(self.settings)
        tokenizer = models.load_tokenizer(self.settings)
        with redirect_stdout(io.StringIO()):  # what is left out is said when the stage begins
            for stage in self.spec.stages:
                if stage == "grpo":
                    training.prompts_to_reinforce(self._examples(stage), tokenizer, self.settings)
                else:
                    encode_examples(self._examples(stage), tokenizer, self.settings)

    def _examples(self, stage: str) -> list[dict]:
        systems = {"grpo": (2,), "sft": (1,), "sft_all": (1, 2)}[stage]
        return [row for system in systems for row in system_examples(self.settings, system)]

    def _kept(self, name: str, wanted: dict, make: Callable[[], tuple[dict, Callable[[Path], None]]]) -> dict:
        """`name`'s outcome: as it lies there, as another experiment made it, or made now and kept."""
        home = self.folder / name
        # Asked by one: another could look after the first has already made it.
        if not processes.by_first(lambda: is_current(home, wanted)):
            twin = processes.by_first(lambda: _made_elsewhere(home, wanted))
            outcome, save = (None, None) if twin else make()
            self.made = True

            def keep():
                with completed(home, wanted) as scratch:
                    if twin:
                        shutil.copytree(twin, scratch, dirs_exist_ok=True)
                    else:
                        save(scratch)
                        write_atomically(scratch / "outcome.json", json.dumps(outcome))
                for unneeded in self.folder.glob(f".{name}-steps-*"):
                    shutil.rmtree(unneeded)

            processes.by_first(keep)
        return json.loads((home / "outcome.json").read_text(encoding="utf-8"))

    def _trained(self, name: str, stage: str, previous: str | None, wanted: dict) -> dict:
        def make():
            outcome = self._train(name, stage, previous, wanted)
            initial = self.folder / ".initial" if self._converts else None
            return outcome, lambda scratch: models.save_adapter(self._model, scratch, initial)

        return self._kept(name, wanted, make)

    def _scored(self, name: str) -> dict:
        return self._kept(f"{name}.scores", self._scoring(name), lambda: (self._score(name), lambda scratch: None))

    def _scoring(self, name: str) -> dict:
        """What the scores after a stage rest on: the stage, what is asked, and how answers are judged."""
        trained = None if name == "base" else fingerprint(_stage_inputs(self.inputs, int(name[-1])))
        return json.loads(json.dumps(self.inputs["scoring"] | {"trained": trained}, default=str))

    def _train(self, name: str, stage: str, previous: str | None, inputs: dict) -> dict:
        model, tokenizer = self._loaded(previous)
        masks = self._masks(model, stage)
        # Named by what the stage rests on: a checkpoint of other settings is never gone on from.
        checkpoints = self.folder / f".{name}-steps-{fingerprint(inputs)}"
        run = training.run_grpo if stage == "grpo" else training.run_sft
        began = time.time()
        self._holds = None
        history = run(
            model, tokenizer, self._examples(stage), masks, self.settings, checkpoints, self._watch(model, tokenizer)
        )
        self._holds = name
        active = sum(int(mask.sum()) for mask in masks.values())
        return {
            "history": history,
            "active": active / sum(mask.numel() for mask in masks.values()),
            "elements": sum(mask.numel() for mask in masks.values()),
            "jaccard": None if self.partition is None else self.partition.jaccard,
            "train_seconds": round(time.time() - began, 1),
            "peak_bytes": _peak_bytes(),
        }

    def _loaded(self, stage: str | None):
        """The model as it was after `stage`; None: with its adapter fresh."""
        if self._model is None:
            base, self._tokenizer = models.load_base(self.settings)
            self._model = models.attach_adapter(base, self.settings)
            self._trainable = [name for name, p in self._model.named_parameters() if p.requires_grad]
            if self._converts:
                processes.by_first(lambda: self._model.save_pretrained(self.folder / ".initial"))
        if stage != self._holds:
            models.restore_adapter(self._model, self.folder / stage)
            self._holds = stage
        return self._model, self._tokenizer

    def _masks(self, model: PeftModel, stage: str) -> dict[str, torch.Tensor]:
        if self.partition is not None:
            return self.partition.stage_mask(2 if stage == "grpo" else 1)
        parameters = dict(model.named_parameters())
        return {name: torch.ones_like(parameters[name], dtype=torch.bool) for name in self._trainable}

    def _watch(self, model: PeftModel, tokenizer) -> Callable[[], dict] | None:
        """Greedy accuracy of each system (of free text, overlap) on a few validation prompts; None if nobody asked."""
        prompts = _watched(self.settings)
        if not prompts or "grpo" not in self.spec.stages:
            return None

        def watch() -> dict:
            items = evaluation.score_greedy(model, tokenizer, prompts, self.settings)
            metrics = evaluation.accuracy_metrics(items)
            watched = [key for key in ("system1", "system2", "overlap") if key in metrics]
            return {f"validation/{key}": metrics[key].value for key in watched}

        return watch

    def _score(self, name: str) -> dict:
        loaded = models.load_base(self.settings) if name == "base" else self._loaded(name)
        began = time.time()
        test = [row for row in data.load_pool(self.settings) if row["split"] == "test"]
        outcome = {"items": evaluation.score_pool(*loaded, test, self.settings), "pass": {}}
        chains = _validation(self.settings).get(2, [])[: self.settings.evaluation.pass_k_prompts]
        # What could be reinforced is measured where something will be.
        if "grpo" in self.spec.stages and chains and not self.settings.has_free_text:
            sampled = evaluation.pass_at(*loaded, chains, self.settings)
            outcome["pass"] = {key: metric.as_json() for key, metric in sampled.items()}
        outcome["benchmarks"] = {
            name: evaluation.benchmark_items(*loaded, name, self.settings)
            for name in self.settings.evaluation.benchmarks
        }
        return outcome | {"score_seconds": round(time.time() - began, 1)}


def _validation(settings: Settings) -> dict[int, list[dict]]:
    """Validation rows by the system that they were constructed for (0: unknown), those that have any."""
    by_system: dict[int, list[dict]] = {}
    for row in data.load_pool(settings):
        if row["split"] == "validation":
            by_system.setdefault(data.construction_system(row["steps"]), []).append(row)
    return dict(sorted(by_system.items()))


def _watched(settings: Settings) -> list[dict]:
    """The validation rows that are answered now and then while a stage trains."""
    count = settings.evaluation.watch_prompts
    return [row for rows in _validation(settings).values() for row in rows[:count]]


def _kept_record(path: Path) -> Record | None:
    """The record as it was written; None where there is none, or one that is damaged."""
    try:
        record = read_record(path)
        return record if {"created", "seconds", "parameters", "command"} <= record.run.keys() else None
    except (InputError, ValueError, AttributeError):
        return None


def _peak_bytes() -> int:
    """The most memory that this process has held so far: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _experiment_record(settings, spec, name: str, outcomes: dict[str, dict]) -> Record:
    metrics, tables, items = {}, {}, []
    first = next(iter(outcomes.values()))
    if first.get("jaccard") is not None:
        metrics["jaccard"] = Metric(first["jaccard"], first["elements"])
    for label, outcome in outcomes.items():
        metrics |= {f"{label}/{key}": value for key, value in evaluation.accuracy_metrics(outcome["items"]).items()}
        metrics |= {f"{label}/{key}": Metric(**values) for key, values in outcome["pass"].items()}
        for benchmark, found in outcome["benchmarks"].items():
            scored = evaluation.benchmark_metrics(benchmark, found)
            metrics |= {f"{label}/{benchmark}/{key}": value for key, value in scored.items()}
            items += [{"stage": f"{label}/{benchmark}", **item} for item in found]
        if label != "base":
            metrics[f"active/{label}"] = Metric(outcome["active"], outcome["elements"])
            for key in ("train_seconds", "peak_bytes"):
                metrics[f"{label}/{key}"] = Metric(outcome[key], 1)
        tables[f"history_{label}"] = outcome["history"]
        items += [{"stage": label, **item} for item in outcome["items"]]
    if len(outcomes) == 2:
        for system in (1, 2):
            before, after = (
                [item["correct"] for item in outcome["items"] if item["system"] == system]
                for outcome in outcomes.values()
            )
            if before:
                metrics[f"gain/system{system}"] = statistics.paired_difference(before, after)
        if settings.has_free_text:
            before, after = ([item["overlap"] for item in outcome["items"]] for outcome in outcomes.values())
            metrics["gain/overlap"] = statistics.mean([b - a for a, b in zip(before, after, strict=True)])
    return new_record(
        name,
        settings,
        metrics=metrics,
        tables=tables,
        items=items,
        parameters=spec.model_dump()
        | settings.partition.model_dump()
        | {"modules": settings.adapter.modules, "init": settings.adapter.init, "score": settings.importance.score}
        | {"pool": settings.pool.source},
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
        long_rows=settings.sft.long_rows,
        seed=settings.seed,
    )


def _what_is_learnt(rows: list[dict]) -> list[list]:
    return [[row[key] for key in ("id", "prompt", "answer", "solution")] for row in rows]


def _experiment_inputs(settings: Settings, spec) -> dict:
    """What an experiment's training rests on, and under `scoring` what its measurements rest on besides."""
    used = {}
    if set(spec.stages) & {"sft", "sft_all"}:
        used["sft"] = settings.sft
    if "grpo" in spec.stages:
        used["grpo"] = settings.grpo
    watch = settings.evaluation.model_dump(include={"watch_prompts", "watch_every", "max_new_tokens"})
    # What they came to is in the history that training leaves.
    watch["rows"] = fingerprint(_watched(settings))
    if spec.method == "lorapar":
        learnt = {"scores": fingerprint(_scores_inputs(settings)), "partition": settings.partition.model_dump()}
    else:
        systems = [_what_is_learnt(system_examples(settings, k)) for k in (1, 2)] if spec.stages else []
        learnt = {"systems": fingerprint(systems), "adapter": settings.adapter.model_dump(), "seed": settings.seed}
    inputs = inputs_of(
        settings,
        ("training", "partition", "models"),
        experiment=spec.model_dump(exclude={"title", "seeds", "sweep"}),
        watch=watch if watch["watch_prompts"] and "grpo" in spec.stages else None,
        **learnt,
        **{key: section.model_dump() for key, section in used.items()},
    )
    held_out = [row for row in data.load_pool(settings) if row["split"] != "train"]
    return inputs | {
        "scoring": inputs_of(
            settings,
            ("evaluation", "models"),
            data=fingerprint(held_out),
            benchmark_data={
                name: folder_hashes(_benchmark_path(settings, name)) for name in settings.evaluation.benchmarks
            },
            evaluation=settings.evaluation.model_dump(exclude={"watch_prompts", "watch_every"}),
            reinforced="grpo" in spec.stages,
            seed=settings.seed,
        )
    }


def _benchmark_path(settings: Settings, name: str) -> str | None:
    return getattr(getattr(settings.evaluation, name), "path", None)


def _stage_inputs(inputs: dict, number: int) -> dict:
    """What of an experiment's inputs the stage of that number rests on: what only later stages read is left out."""
    experiment = inputs["experiment"]
    done = experiment["stages"][:number]
    about = {"method": experiment["method"], "selection": experiment["selection"], "stages": done}
    found = {key: value for key, value in inputs.items() if key != "scoring"}
    found["experiment"] = about
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
        "model": fingerprint(model_identity(settings)),
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
    scores = []
    for rows in sets:
        examples = encode_examples(rows, tokenizer, settings)
        longest = max(len(example["input_ids"]) for example in examples)
        # Beyond it a model rotates positions by the longest row of a batch, and scores would hang on the company.
        size = 1 if longest > rotation_limit(model.get_base_model()) else settings.importance.batch_size
        scores.append(score_importance(model, examples, batch_size=size, score=settings.importance.score))
    return scores


def _model_order(values: Scores) -> list[str]:
    """Layer by layer, A before B: safetensors keeps names, not order, and ties are broken by order."""

    def key(name: str):
        return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]

    return sorted(values, key=key)
