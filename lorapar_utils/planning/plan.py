"""`make plan`: memory and time of every phase of a profile, before anything starts; refused where it cannot fit.

Memory follows from the model's configuration, time from a pass's arithmetic and a rate: on this machine's CPU the one
that a few layers with random weights reach, on a GPU a measured share of its data sheet. Deviation from what runs:
lengths are a pool's means, completions reach their limit, and every completion teaches.
"""

import copy
import json
import math
import timeit
from collections import Counter
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil
import torch
import yaml
from peft.tuners.lora import LoraLayer
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lorapar_utils import models
from lorapar_utils.cache import is_whole
from lorapar_utils.errors import InputError
from lorapar_utils.fast.architecture import has_other_states
from lorapar_utils.fast.decoding import answering
from lorapar_utils.fast.shared_prefix import LONGEST
from lorapar_utils.machine import threads_from_environment
from lorapar_utils.models.files import unreachable_hub
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.experiment import is_kept
from lorapar_utils.pipeline.scores import STABILITY_DRAWS, scores_folder
from lorapar_utils.planning import duration, preflight
from lorapar_utils.records.record import shell_word
from lorapar_utils.settings import Settings, project_root
from lorapar_utils.voting import split

if TYPE_CHECKING:  # it brings Snakemake, which a borrowed GPU machine may lack (`benchmarks/gpu.py`)
    from lorapar_utils.planning.jobs import Job

# Mean tokens of a chat prompt, of a solution, and of what every prompt begins with (SmolLM2's tokenizer; counted, those
# of other sources assumed); of persona, template and question around a teacher's example.
LENGTHS, ASSUMED_LENGTHS, TEACHER_TOKENS = (
    {"builtin": (47, 9, 33), "ladder": (56, 22, 33), "gsm8k": (98, 123, 33)},
    (150, 200, 33),
    90,
)
# What Python and the libraries take: resident memory on a CPU, the context and kernels on a GPU.
LIBRARIES = {"cpu": 0.58e9, "cuda": 0.8e9}
# A pass in forward passes: its arithmetic (frozen weights have no gradient), and the time in which Python calls a GPU's
# kernels, `CALLS` seconds a layer; `AGAIN` where activations are computed again; `SCORED`, what scores take beside a
# base in bf16, on a CPU with adapters in fp32. Fitted, as the cards' rates are, to LLaMA-2-7B on H100s
# (`book/_static/gpu-h100.json`, scores to `gpu-h100-third.json`).
FORWARDS = {"read": (1, 1), "decode": (1, 1), "score": (2, 4), "sft": (2, 4), "grpo": (2, 4)}
AGAIN, CALLS, SCORED = (1, 2.6), 1.37e-3, {"cpu": 1.6, "cuda": 1.28}
ENOUGH, TOO_MANY = 8e6, 2e8  # weights: of the layers that are run here, two at least, and of which none are
SHARED_WORK = 0.85  # threads to this power are so many times as fast as one (assumed)
clock = timeit.default_timer


class Machine(NamedTuple):
    """Bytes of memory and of libraries; operations (in bf16, in fp32) and bytes a second, measured where None."""

    name: str
    memory: float
    libraries: float
    flops: float | None = math.inf
    flops32: float = math.inf
    bandwidth: float = math.inf
    cpu: bool = False


class Need(NamedTuple):
    """What passes take: seconds of all; bytes of the base, and of what one holds beside it."""

    seconds: float
    weights: float
    held: float


class Phase(NamedTuple):
    """One phase's need: seconds of all that it does, bytes at its fullest moment, by what they are for."""

    name: str
    runs: int
    seconds: float
    memory: dict[str, float]
    kind: tuple | None = None  # of experiments: their stages, and whether they are LoRA-PAR's

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def machine_named(name: str) -> Machine:
    """A GPU of `profiles/architectures/machines.yaml`; `here`: this machine's GPU if listed, else its CPU, measured."""
    listed = project_root() / "profiles" / "architectures" / "machines.yaml"
    known = yaml.safe_load(listed.read_text(encoding="utf-8"))
    if name == "here":
        if not torch.cuda.is_available():
            return memory_here()._replace(flops=None)
        device = torch.cuda.get_device_name()
        name = next((key for key in known if key in device), device)
    if name not in known:
        raise InputError(f"MACHINE = {name!r}: choose one of here, {', '.join(known)}, or add it to machines.yaml")
    return Machine(f"one {name}", libraries=LIBRARIES["cuda"], **known[name])


def memory_here() -> Machine:
    """This machine's memory, where time does not matter."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        return Machine(torch.cuda.get_device_name(), total, LIBRARIES["cuda"])
    return Machine("this machine's CPU", psutil.virtual_memory().total, LIBRARIES["cpu"], cpu=True)


class Row(NamedTuple):
    """A row of the plan: what would be made, how many of how many, why, the most memory of one, seconds of all."""

    phase: str
    runs: int
    kept: int
    why: str
    bytes: float
    seconds: float


def rows(settings: Settings, phases: list[Phase], jobs: "Sequence[Job]", cores: int, start: float) -> list[Row]:
    """What a build would do: one row a phase, of those with a job to run.

    Parameters
    ----------
    jobs
        Those that would run (`jobs.would_run`).
    cores
        Of the machine: jobs run beside each other where their threads leave room.
    start
        Seconds in which a job's libraries are imported.
    """
    by_rule: dict[str, list[Job]] = {}
    for job in jobs:
        by_rule.setdefault(job.rule, []).append(job)
    examples = Examples(settings)
    # Before the first run nothing is kept, and the data may not have come from the hub yet.
    voted = (settings.runs / "votes").is_dir() and is_whole(split.votes_folder(settings, examples.pool))
    scored = voted and is_whole(scores_folder(settings, examples.systems))
    table, beside = [], max(1, cores // settings.threads)
    whole = min(1.0, (settings.threads / cores) ** SHARED_WORK)  # what all cores take of the threads' time
    for phase in phases:
        if phase.kind is None:
            here, kept = by_rule.get("prepare", []), voted if phase.name.startswith("voting") else scored
            made = [] if kept else here
            seconds = start + whole * phase.seconds
        else:
            here = [job for job in by_rule.get("experiment", []) if _kind(settings, job) == phase.kind]
            made = [job for job in here if not (voted and scored and is_kept(settings, *_run(job), examples))]
            seconds = (1.5 * start * len(made) + phase.seconds * len(made) / phase.runs) / min(
                beside, max(1, len(made))
            )
        if here:
            kept = len(here) - len(made)
            table.append(Row(phase.name, len(made), kept, _why(here[0].reason), phase.bytes, seconds * bool(made)))
    for rule, name, starts in (
        ("again", "published adapters, asked again", 4),
        ("page", "pages", 1),
        ("book", "book", 2),
    ):
        if here := by_rule.get(rule):
            seconds = starts * start * len(here) / min(beside, len(here))
            table.append(Row(name, len(here), 0, _why(here[0].reason), LIBRARIES["cpu"], seconds))
    return table


def _run(job: "Job") -> tuple[str, int]:
    name, _, seed = job.what.rpartition("-seed")
    return name, int(seed)


def _kind(settings: Settings, job: "Job") -> tuple:
    spec = settings.experiments[_run(job)[0]]
    return spec.stages, spec.method == "lorapar"


# What Snakemake gives as a reason -> in short; the first that applies. Of changed files the first two are named.
REASONS = {
    "Updated input files: ": "changed: {}",
    "Missing output files": "not made yet",
    "Set of input files has changed": "other files to read",
    "Params have changed": "other parameters",
    "Input files updated by another job": "what it reads is made anew",
}


def _why(reason: str) -> str:
    for long, short in REASONS.items():
        if long in reason:
            names = reason.partition(long)[2].partition(";")[0].split(", ")
            return short.format(", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else ""))
    return reason[:60]


def as_text(settings: Settings, machine: Machine, table: list[Row]) -> str:
    """The plan for a terminal: a line each row, and the sum in one sentence."""
    cells = [("phase", "runs", "read back", "GB", "time", "why")]
    cells += [
        (
            row.phase,
            str(row.runs or "–"),
            str(row.kept or "–"),
            f"{row.bytes / 1e9:.1f}",
            duration(row.seconds) if row.runs else "–",
            row.why,
        )
        for row in table
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    most, seconds = max(row.bytes for row in table) / 1e9, sum(row.seconds for row in table)
    sentence = f"{settings.profile} needs {most:.1f} GB a job and about {duration(seconds)} on {machine.name}."
    return "\n".join([*lines, "", _who_splits(settings), sentence])


def _who_splits(settings: Settings) -> str:
    """Who puts the training examples into the two systems, and which teachers are asked on servers."""
    voting = settings.voting
    servers = [teacher for teacher in voting.teachers if teacher.kind == "api"]
    unset = sorted({teacher.key_to_set() for teacher in servers} - {None})
    keys = f" ({', '.join(unset)} {'are' if len(unset) > 1 else 'is'} not set yet)" if unset else ""
    on_servers = (
        f"\nAsked on servers: {', '.join(teacher.name for teacher in servers)}{keys}. Questions and cost: "
        f"`.venv/bin/python -m lorapar_utils.voting.split {shell_word(settings)} --dry-run`"
    ) * bool(servers)
    if voting.split_by != "votes":
        return f"Training examples are split by {voting.split_by}, not by votes.{on_servers}"
    panel = f" (panel {voting.panel})" if voting.panel else ""
    quorum = f", quorum {voting.quorum}" if voting.quorum else ""
    tie = f", a tie is {voting.tie}" if voting.tie else ""
    members = ", ".join(voting.members())
    return f"Training examples are split by votes of {members}{panel}{quorum}{tie}.{on_servers}"


def check_fits(settings: Settings, machine: Machine, phases: list[Phase]) -> None:
    """Refuse phases that the machine has no memory for, with the arithmetic."""
    worst = max(phases, key=lambda phase: phase.bytes)
    if worst.bytes > machine.memory:
        parts = " + ".join(f"{part} {size / 1e9:.1f}" for part, size in worst.memory.items() if size)
        raise InputError(
            f"profile {settings.profile}: {worst.name} needs {worst.bytes / 1e9:.1f} GB ({parts}), and {machine.name} "
            f"has {machine.memory / 1e9:.1f}; {_smaller(settings, worst)}, set model.quantization or model.sharded, or "
            "take a smaller model; make plan MACHINE=H200 plans for another machine"
        )


def _smaller(settings: Settings, phase: Phase) -> str:
    """Which settings to lower, with their values, for a phase to hold less."""
    stages = phase.kind[0] if phase.kind else ()
    if "grpo" in stages:
        names, checkpointed = ["grpo.micro_batch", "grpo.rollout_batch"], settings.grpo.gradient_checkpointing
    elif stages:
        names, checkpointed = ["sft.batch_size"], settings.sft.gradient_checkpointing
    else:
        batch = {"importance": "importance", "base model": "evaluation"}.get(phase.name, "voting")
        names, checkpointed = [f"{batch}.batch_size"], True

    def value(name: str) -> object:
        section, _, field = name.partition(".")
        # A rollout batch that is not set is the whole step's.
        return getattr(getattr(settings, section), "rows_at_once" if field == "rollout_batch" else field)

    lower = "lower " + " and ".join(f"{name} ({value(name)})" for name in names)
    return lower if checkpointed else f"{lower}, set {names[0].partition('.')[0]}.gradient_checkpointing"


def phases_of(model: "Model", machine: Machine) -> list[Phase]:
    """Every phase of `make book` for the model's profile, experiments of one kind together."""
    settings, batch, phases = model.settings, model.batches(machine), []
    pool, sft, evaluation = settings.pool, settings.sft, settings.evaluation
    tested, train = pool.system1.test + pool.system2.test, (pool.system1.train, pool.system2.train)

    def add(name: str, runs: int, optimizer: float, times: dict[str, float], kind: tuple | None = None) -> None:
        seconds = runs * sum(count * need.seconds for kind, count in times.items() for need in batch[kind])
        memory = model.memory(machine, [need for kind in times for need in batch[kind]], optimizer)
        phases.append(Phase(name, runs, seconds, memory, kind))

    teachers = sum(teacher.kind in ("local", "success") for teacher in settings.voting.teachers)
    asked = {"voting": teachers * sum(train) / settings.voting.batch_size}
    sizes = settings.importance.stability
    compared = STABILITY_DRAWS * (2 * sum(sizes) + max(sizes, default=0))
    scored = {"importance": 2 * (settings.importance.examples + compared) / settings.importance.batch_size}
    if teachers:
        add("voting by local teachers", 1, 0.0, asked)
    add("importance", 1, 8.0 * model.elements, scored)  # g and F of every element
    specs = [settings.experiments[name] for name, _ in settings.experiment_runs()]
    for (stages, lorapar), runs in Counter((spec.stages, spec.method == "lorapar") for spec in specs).items():
        sampled = min(pool.system2.validation, evaluation.pass_k_prompts) * evaluation.pass_k * ("grpo" in stages)
        times = {"answers": (max(1, len(stages)) * tested + len(stages) * sampled) / evaluation.batch_size}
        for stage in stages:
            steps = sft.epochs * sum(train[: 1 + (stage == "sft_all")]) / (sft.batch_size * sft.accumulation)
            times[stage] = times.get(stage, 0) + (settings.grpo.steps if stage == "grpo" else steps)
        # About the share of elements that theta = 0.9 leaves active; all of them for a baseline.
        active = model.elements * (0.4 if lorapar else 1.0)
        # fp32 gradients; two fp32 moments and an 8-byte place for each active element; masks of a byte.
        optimizer = (5 * model.elements + 16 * active) * bool(stages)
        name = (" then ".join(stages) or "base model") + ", LoRA-PAR" * lorapar
        add(name, runs, optimizer, times, (stages, lorapar))
    return phases


class Model:
    """A profile's model by its sizes, and what passes through it take; `lengths`: other ones than the pool's."""

    def __init__(self, settings: Settings, lengths: tuple[int, int, int] | None = None):
        self.settings, self.dtype, self.config = settings, models.compute_dtype(settings), configuration(settings)
        self.prompt, self.solution, self.shared = lengths or LENGTHS.get(settings.pool.source, ASSUMED_LENGTHS)
        text = self.config.get_text_config()

        def size(*names: str) -> int:
            return next((value for name in names if isinstance(value := getattr(text, name, 0), int) and value), 0)

        self.layers, self.hidden = size("num_hidden_layers", "num_blocks", "num_layers") or 1, size("hidden_size")
        experts = size("num_experts", "num_local_experts", "n_routed_experts")
        routed = (experts and size("num_experts_per_tok")) or 1
        self.inner = routed * (size(*["moe_intermediate_size"] * bool(experts), "intermediate_size") or 4 * self.hidden)
        heads = size("num_attention_heads") or max(1, self.hidden // 64)
        width = size("head_dim") or self.hidden // heads
        self.queries, self.keys = heads * width, (size("num_key_value_heads") or heads) * width
        with torch.device("meta"):
            model = self._built()
        self.elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.vocabulary = model.get_input_embeddings().num_embeddings
        ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one, where they are tied
        self.outside = sum(p.numel() for p in ends)
        self.inside = sum(p.numel() for p in model.parameters()) - self.elements - self.outside
        idle = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) if experts else 0
        self.multiplied = self.inside - idle * (1 - routed / max(1, experts))
        inputs = [(n.rpartition(".")[0], m.in_features) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
        # Widths that the adapters of a layer read; those of one block read the same vector.
        self.inputs, self.inputs_once = (sum(w for _, w in some) / self.layers for some in (inputs, set(inputs)))

    def _built(self, depth: int | None = None) -> torch.nn.Module:
        """The model with random weights and its adapter, or its first layers with next to no vocabulary."""
        config = copy.deepcopy(self.config)
        if depth:
            text = config.get_text_config()
            text.num_hidden_layers, text.vocab_size, text.pad_token_id = depth, 8, None
            if "layer_types" in vars(text):
                text.layer_types = text.layer_types[:depth]
        base = AutoModelForCausalLM.from_config(config, dtype=self.dtype).requires_grad_(False)
        return models.attach_adapter(base, self.settings.changed(model={"sharded": False})).eval()

    def batches(self, machine: Machine) -> dict[str, list[Need]]:
        """What batches of teachers' questions, of examples to score and of answers need, and training steps."""
        sft, grpo, evaluation = self.settings.sft, self.settings.grpo, self.settings.evaluation
        passes, length, width = partial(self.passes, machine), self.prompt + self.solution, grpo.max_completion_length

        def share(batch: int) -> int:  # one process's part of what a step sees in all
            return -(-batch // self.settings.processes)

        def complete(prompts: int, tokens: int, samples: int = 1) -> list[Need]:
            """The prompts are read, then all completions take so many steps, each of what the middle one takes."""
            steps = passes("decode", prompts * samples, 1, 1, before=self.prompt + tokens // 2, times=tokens - 1)
            return [passes("read", prompts, self.prompt, 1), steps]

        step = [passes("sft", share(sft.batch_size), length, self.solution, times=sft.accumulation)]
        loss = passes("grpo", share(grpo.micro_batch), self.prompt + width, width, times=grpo.rows // grpo.micro_batch)
        rollout = complete(share(grpo.rows_at_once // grpo.completions), width, grpo.completions)
        return {
            "voting": [passes("read", self.settings.voting.batch_size, self.prompt + TEACHER_TOKENS, 2)],
            "importance": [passes("score", self.settings.importance.batch_size, length, self.solution)],
            "answers": complete(share(evaluation.batch_size), evaluation.max_new_tokens),
            **{"sft": step, "sft_all": step, "grpo": [loss, *rollout * (grpo.rows // grpo.rows_at_once)]},
        }

    def memory(self, machine: Machine, needs: list[Need], optimizer: float = 0.0) -> dict[str, float]:
        """Bytes by what they are for, at the fullest moment."""
        fullest = max(needs, key=lambda need: need.weights + need.held)
        parts = {"libraries": machine.libraries, "weights": fullest.weights, "adapter": 4.0 * self.elements}
        return parts | {"gradients and optimizer": optimizer, "activations, cache, logits": fullest.held}

    def passes(self, machine, kind: str, rows: int, length: int, scored: int, before: int = 0, times: int = 1) -> Need:
        """So many equal passes: rows of `length` tokens after `before` in a cache, logits of `scored` of each."""
        each, low, learns = self.dtype.itemsize, self.dtype != torch.float32, kind in ("sft", "grpo")
        # Bytes of the frozen base in one process: one that is shared out is whole while completions are written.
        inside = each / (self.settings.processes if self.settings.model.sharded and kind != "decode" else 1)
        if self.settings.model.quantization:
            inside = 0.5 + 1 / 64 + 4 / (64 * 256)  # nf4, a byte a block of 64, double quantisation
        weights = self.inside * inside + self.outside * each
        again = learns and getattr(self.settings, kind).gradient_checkpointing
        arithmetic, calls = (of + again * more for of, more in zip(FORWARDS[kind], AGAIN, strict=True))
        arithmetic *= SCORED["cpu" if machine.cpu else "cuda"] if kind == "score" and low else 1
        width, bundles, cached = length, rows, 2 * self.layers * rows * self.keys * each  # of each token before
        if machine.cpu and kind not in ("score", "decode"):
            # A bundle reads once what its sequences share, GRPO's completions their prompt.
            shared, group = (self.prompt, self.settings.grpo.completions) if kind == "grpo" else (self.shared, rows)
            own = max(1, length - shared)
            together = min(rows, group, 1 + max(0, LONGEST - length) // own)
            width, bundles = length + (together - 1) * own, rows / together
        tokens = bundles * width
        # A forward pass: weights, attention, head.
        operations = tokens * 2 * (self.multiplied + self.layers * self.queries * (2 * before + width))
        operations += 2 * rows * scored * self.hidden * self.vocabulary
        if machine.flops is None:
            together = rows if kind == "decode" else max(1, LONGEST // length) if kind == "score" else 1
            shape = together, min(width, LONGEST)
            seconds = arithmetic * operations / self._rate_here(FORWARDS[kind][1] > 1, shape, before)
        else:
            computing = arithmetic * operations / (machine.flops if low else machine.flops32)
            # A step of decoding reads the cache and writes it anew, longer by a token.
            moving = (weights + 3 * before * cached) / machine.bandwidth
            seconds = max(computing, moving, self.layers * calls * CALLS)
        # What a layer keeps of a token: two norms their input in fp32; attention its queries, keys, values, result; a
        # gated layer three inner vectors; adapters their input (in a CPU's scores fp32), with dropout each and a mask.
        layer = 8 * self.hidden + each * (4 * self.queries + 3 * self.inner)
        layer += 4 * self.inputs if kind == "score" and low and machine.cpu else each * self.inputs_once
        if kind == "sft" and self.settings.adapter.dropout:
            layer += each * (2 * self.inputs - self.inputs_once)
        held = tokens * self.layers * (each * self.hidden if again else layer)
        if kind in ("read", "decode"):
            held = cached * (1 + 1 / self.layers) * (before + times / 2) if before else 0
        # One layer at work, or four times the logits in fp32.
        held += max(layer * (width if machine.cpu else tokens), 16 * rows * scored * self.vocabulary)
        return Need(times * seconds, weights, held)

    @cache  # noqa: B019
    def _rate_here(self, learns: bool, shape: tuple[int, int], before: int) -> float:
        """Operations a second of a few layers on this CPU, or (of a large or unusual model) 0.7 of a product's."""
        depth, usual = min(self.layers, max(2, int(ENOUGH / self.inside * self.layers))), torch.get_num_threads()
        torch.set_num_threads(1)  # other processes disturb that less than threads that wait for each other
        try:
            if self.inside * depth / self.layers > TOO_MANY:
                raise MemoryError
            each = self.multiplied / self.layers + self.queries * (2 * before + shape[1])
            operations = 2 * (1 + learns) * math.prod(shape) * depth * each
            seconds = self._seconds(depth, learns, shape, before)
        except Exception:  # layers of a build that do not run so
            square = torch.ones(self.hidden, self.hidden, dtype=self.dtype)
            operations, seconds = 0.7 * 2 * len(square[:256]) * square.numel(), _fastest(lambda: square[:256] @ square)
        finally:
            torch.set_num_threads(usual)
        return threads_from_environment(self.settings.threads) ** SHARED_WORK * operations / seconds

    def _seconds(self, depth: int, learns: bool, shape: tuple[int, int], before: int) -> float:
        model = self._built(depth)
        base, past = model.get_base_model(), DynamicCache(config=model.config) if before else None
        embedded = torch.randn(*shape, self.hidden, dtype=self.dtype).requires_grad_(learns)
        bundle = shape[0] == 1 and not before and not has_other_states(base)
        mask = torch.zeros(1, 1, shape[1], shape[1], dtype=self.dtype) if bundle else None
        layers = partial(base.base_model, past_key_values=past, use_cache=bool(before))

        def run() -> None:
            states = layers(inputs_embeds=embedded, attention_mask=mask).last_hidden_state
            if learns:
                states.sum().backward()

        with torch.set_grad_enabled(learns), answering(model):
            if before:
                layers(input_ids=torch.ones(shape[0], before, dtype=torch.long))
            return _fastest(run)


def _fastest(run) -> float:
    """Seconds of the fastest of some calls, more of a short one, after one that warms up."""
    first = timeit.timeit(run, timer=clock, number=1)
    return min(timeit.repeat(run, timer=clock, number=1, repeat=2 + min(20, int(0.1 / first))))


def configuration(settings: Settings) -> AutoConfig:
    """The model's configuration: its own, or the copy in `profiles/architectures` where that cannot be reached."""
    if Path(settings.model.source).expanduser().exists():
        preflight.check_model(settings)
        return models.load_config(settings)
    name = "SmolLM2-135M-Instruct" if settings.model.source == "packaged" else Path(settings.model.source).name
    kept = project_root() / "profiles" / "architectures" / f"{name}.json"
    if kept.is_file():
        return AutoConfig.for_model(**json.loads(kept.read_text(encoding="utf-8")))
    try:
        if reason := unreachable_hub(settings.model.source):
            raise OSError(reason)
        return AutoConfig.from_pretrained(settings.model.source, revision=settings.model.revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.source = {settings.model.source!r}: no such folder beside the profile or in the clone, "
            f"as a hub id no configuration ({str(error).splitlines()[0]}), and no "
            f"{kept.relative_to(project_root())}; put the model's config.json at that place to plan without the model"
        ) from None
