"""`make plan`: memory and time of every phase of a profile, before anything starts; refused where it cannot fit.

Deviation from what runs: lengths are a pool's means, completions are taken to reach their limit, System 1 and System 2
to be as large as they are constructed, and every completion to teach: where a model learns to end, it takes less time.
"""

import copy
import json
import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache, partial

import pandas as pd
import psutil
import torch
import yaml
from torch.optim.adamw import adamw
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache

from lorapar_utils import models, preflight
from lorapar_utils.bundles import bundled
from lorapar_utils.costs import Machine, Work, timed_here, traced
from lorapar_utils.errors import InputError
from lorapar_utils.importance import accumulating_hooks
from lorapar_utils.settings import Settings, project_root

# Mean tokens of a chat prompt, of a solution, and of what every prompt begins with (SmolLM2's tokenizer; `builtin` and
# `gsm8k` counted, the others assumed).
LENGTHS = {"builtin": (47, 9, 33), "gsm8k": (98, 123, 33)}
ASSUMED_LENGTHS = (150, 200, 33)
TEACHER_TOKENS = 90  # persona, template and question around the example
# What Python and the libraries take: resident memory on a CPU, the context and kernels on a GPU.
LIBRARIES = {"cpu": 0.58e9, "cuda": 0.8e9}
DEPTHS = (3, 6)  # layers of the models that are traced
# Seconds of a call to a GPU from Python, and how much longer it takes where autograd records it: fitted to one H100's
# host (`book/_static/gpu-h100.json`).
GPU_CALL, RECORDED = 17e-6, 2.0


@dataclass(frozen=True)
class Phase:
    """One phase's need: seconds of all that it does, bytes at its fullest moment, and what those are made of."""

    name: str
    runs: int
    seconds: float
    memory: dict[str, float]

    @property
    def bytes(self) -> float:
        return sum(self.memory.values())


def machine_named(name: str, settings: Settings) -> Machine:
    """A GPU of `profiles/architectures/machines.yaml`, or `here`: this machine's CPU, timed, or its GPU if listed."""
    known = yaml.safe_load((_architectures() / "machines.yaml").read_text())
    if name == "here":
        if not torch.cuda.is_available():
            return replace(memory_here(), overhead=_overhead(settings), flops=None, bandwidth=None)
        device = torch.cuda.get_device_name()
        name = next((key for key in known if key in device), device)
    if name not in known:
        raise InputError(f"MACHINE = {name!r}: choose one of here, {', '.join(known)}, or add it to machines.yaml")
    of = known[name]
    return Machine(
        f"one {name}",
        of["memory"],
        LIBRARIES["cuda"],
        GPU_CALL,
        *(of["share"] * of[rate] for rate in ("flops", "bandwidth", "flops32")),
    )


def memory_here() -> Machine:
    """This machine's memory, where time does not matter."""
    if torch.cuda.is_available():
        total, libraries = torch.cuda.get_device_properties(0).total_memory, LIBRARIES["cuda"]
        return Machine(torch.cuda.get_device_name(), total, libraries, 0.0, math.inf, math.inf)
    total = psutil.virtual_memory().total
    return Machine("this machine's CPU", total, LIBRARIES["cpu"], 0.0, math.inf, math.inf, cpu=True)


def phases_of(settings: Settings, machine: Machine, passes: "Passes") -> list[Phase]:
    """Every phase of `make book` for one profile, experiments of one kind together."""
    found = [_voting(settings, machine, passes), _importance(settings, machine, passes)]
    kinds: dict[tuple, int] = {}
    for name, _ in settings.experiment_runs():
        spec = settings.experiments[name]
        key = (spec.stages, spec.method == "lorapar")
        kinds[key] = kinds.get(key, 0) + 1
    for (stages, lorapar), runs in kinds.items():
        found.append(_experiment(settings, machine, passes, stages, lorapar, runs))
    return [phase for phase in found if phase.runs]


def table(phases: list[Phase]) -> pd.DataFrame:
    """One row a phase: GB by part, hours."""
    rows = [
        {"phase": phase.name, "runs": phase.runs}
        | {part: size / 1e9 for part, size in phase.memory.items()}
        | {"GB": phase.bytes / 1e9, "hours": phase.seconds / 3600}
        for phase in phases
    ]
    return pd.DataFrame(rows).set_index("phase").fillna(0.0)


def summary(settings: Settings, machine: Machine, phases: list[Phase]) -> str:
    """The plan in one sentence."""
    most, hours = max(phase.bytes for phase in phases), sum(phase.seconds for phase in phases) / 3600
    time = f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.0f} min"
    return (
        f"{settings.profile} needs {most / 1e9:.1f} GB and at most about {time} on {machine.name}, one job at a time."
    )


class NotTraced(Exception):
    """A model whose build the tracing does not know; no reason not to run it."""


def traced_passes(settings: Settings, machine: Machine) -> "Passes":
    """Every pass of the profile, traced.

    Raises
    ------
    InputError
        The model's files, or an `adapter.modules` that it does not have.
    NotTraced
        An architecture that cannot be traced with a few layers and no memory.
    """
    configuration(settings)
    try:
        passes = Passes(settings, bundles=machine.cpu)
        phases_of(settings, replace(machine, overhead=0.0, flops=math.inf, bandwidth=math.inf), passes)
    except Exception as error:  # whatever a model of unknown build raises on the meta device
        reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
        raise NotTraced(f"plan: {settings.model.source} cannot be traced ({reason})") from None
    return passes


def check_fits(settings: Settings, machine: Machine, passes: "Passes") -> None:
    """Refuse a profile that the machine has no memory for, with the arithmetic; nothing is timed."""
    untimed = replace(machine, overhead=0.0, flops=math.inf, bandwidth=math.inf)
    worst = max(phases_of(settings, untimed, passes), key=lambda phase: phase.bytes)
    if worst.bytes > machine.memory:
        parts = " + ".join(f"{part} {size / 1e9:.1f}" for part, size in worst.memory.items() if size)
        raise InputError(
            f"profile {settings.profile}: {worst.name} needs {worst.bytes / 1e9:.1f} GB ({parts}), and {machine.name} "
            f"has {machine.memory / 1e9:.1f}; lower its batch sizes, set gradient_checkpointing, model.quantization or "
            "model.sharded, or take a smaller model; make plan MACHINE=H200 plans for another machine"
        )


# --- phases ----------------------------------------------------------------------------------------------------


def _voting(settings: Settings, machine: Machine, passes: "Passes") -> Phase:
    teachers = [t for t in settings.voting.teachers if t.kind == "local"]
    batch = settings.voting.batch_size
    examples = sum(system.train for system in (settings.pool.system1, settings.pool.system2))
    work = passes.work("read", batch, 2, TEACHER_TOKENS)
    seconds = len(teachers) * examples / batch * work.seconds(machine)
    memory = passes.memory(machine, work)
    return Phase("voting by local teachers", int(bool(teachers)), seconds, memory)


def _importance(settings: Settings, machine: Machine, passes: "Passes") -> Phase:
    chosen = settings.importance
    work = passes.work("score", chosen.batch_size)
    seconds = 2 * chosen.examples / chosen.batch_size * work.seconds(machine)
    # g and F of every element.
    return Phase("importance", 1, seconds, passes.memory(machine, work, optimizer=8 * passes.elements))


def _experiment(settings, machine, passes: "Passes", stages: tuple, lorapar: bool, runs: int) -> Phase:
    sizes = (settings.pool.system1, settings.pool.system2)
    evaluation, sft, grpo = settings.evaluation, settings.sft, settings.grpo
    test = sum(size.test for size in sizes)
    answer = passes.work("complete", evaluation.batch_size, evaluation.max_new_tokens)
    seconds = max(1, len(stages)) * test / evaluation.batch_size * answer.seconds(machine)
    works = [answer]
    # About the share of elements that theta = 0.9 leaves active; all of them for a baseline.
    active = passes.elements * (0.4 if lorapar else 1.0)
    update = passes.update(int(active)).seconds(machine)
    for stage in stages:
        if stage == "grpo":
            together = grpo.rows_at_once // grpo.completions
            rollout = passes.work("complete", together, grpo.max_completion_length, grpo.completions)
            loss = passes.work("train_grpo")
            seconds += grpo.steps * (
                grpo.rows / grpo.rows_at_once * rollout.seconds(machine)
                + grpo.rows / grpo.micro_batch * loss.seconds(machine)
                + update
            )
            sampled = min(sizes[1].validation, evaluation.pass_k_prompts) * evaluation.pass_k
            seconds += len(stages) * sampled / evaluation.batch_size * answer.seconds(machine)
            works += [rollout, loss]
        else:
            examples = sizes[0].train + (sizes[1].train if stage == "sft_all" else 0)
            loss = passes.work("train_sft")
            steps = sft.epochs * examples / sft.batch_size
            seconds += steps * (loss.seconds(machine) + update / sft.accumulation)
            works.append(loss)
    fullest = max(works, key=lambda work: work.peak)
    # fp32 gradients; two fp32 moments and an 8-byte place for each active element; masks of a byte.
    optimizer = 4 * passes.elements + 16 * active + passes.elements if stages else 0
    name = " then ".join(stages) or "base model"
    memory = passes.memory(machine, fullest, optimizer=optimizer)
    return Phase(f"{name}{', LoRA-PAR' if lorapar else ''}", runs, runs * seconds, memory)


# --- passes ----------------------------------------------------------------------------------------------------


class Passes:
    """What each kind of pass takes: traced with few layers, where every further layer adds the same.

    Parameters
    ----------
    bundles
        Whether what sequences share is read once, as on a CPU; else batches are padded.
    lengths
        Tokens of a prompt, of a solution, and of what all prompts begin with; None: the pool's.
    """

    def __init__(self, settings: Settings, bundles: bool, lengths: tuple[int, int, int] | None = None):
        config = configuration(settings)
        self.lengths = lengths or LENGTHS.get(settings.pool.source, ASSUMED_LENGTHS)
        self.more = config.num_hidden_layers - DEPTHS[0]
        self._shallow = [_Shallow(settings, bundles, self.lengths, config, depth) for depth in DEPTHS]
        self.elements = round(self._at_full_depth(*(model.elements for model in self._shallow)))
        self.weights = self._at_full_depth(*(model.weights for model in self._shallow))

    def work(self, kind: str, *arguments: int) -> Work:
        """The work of one pass: `read`, `score`, `train_sft`, `train_grpo`, `complete` (see `_Shallow`)."""
        first, second = (getattr(model, kind)(*arguments) for model in self._shallow)
        operations = Counter(
            {
                operation: self._at_full_depth(first.operations[operation], count)
                for operation, count in second.operations.items()
            }
        )
        return Work(operations, self._at_full_depth(first.peak, second.peak), second.pace)

    def _at_full_depth(self, first: float, second: float) -> float:
        return first + self.more * (second - first) / (DEPTHS[1] - DEPTHS[0])

    def memory(self, machine: Machine, work: Work, optimizer: float = 0.0) -> dict[str, float]:
        """Bytes by what they are for, at the fullest moment."""
        adapter = 4 * self.elements
        return {
            "libraries": machine.libraries,
            "weights": self.weights,
            "adapter": adapter,
            "gradients and optimizer": optimizer,
            "activations, cache, logits": work.peak,
        }

    @cache  # noqa: B019
    def update(self, active: int) -> Work:
        """One optimizer step over the gathered vector of active elements."""
        values, gradient, first, second = (torch.empty(active, device="meta") for _ in range(4))
        step = partial(adamw, [values], [gradient], [first], [second], [], [torch.tensor(0.0)], foreach=False)
        options = {"amsgrad": False, "beta1": 0.9, "beta2": 0.99, "lr": 1e-3, "weight_decay": 0.1, "eps": 1e-8}
        return traced(partial(step, maximize=False, **options))


class _Shallow:
    """Passes over a model of `depth` layers without memory (torch's meta device)."""

    def __init__(self, settings: Settings, bundles: bool, lengths: tuple[int, int, int], config, depth: int):
        self.settings, self.bundles = settings, bundles
        self.prompt, self.solution, self.shared = lengths
        self.dtype = models.compute_dtype(settings)
        self.config = copy.deepcopy(config)
        self.config.num_hidden_layers = depth
        if getattr(self.config, "layer_types", None):
            self.config.layer_types = self.config.layer_types[:depth]
        attention = "sdpa" if bundles else _gpu_attention.__name__
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype, attn_implementation=attention)
            base.requires_grad_(False)
            self.model = models.attach_adapter(base, settings.changed(model={"sharded": False})).eval()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout) and not bundles:
                module.forward = partial(_gpu_dropout, module)
        self.elements = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        self.weights = self._weights()

    def read(self, batch: int, scored: int, more: int = 0) -> Work:
        """Forward only: logits of the last `scored` tokens of `batch` prompts."""
        return self._traced("read", self._sequences(batch, self.prompt + more), batch * scored)

    def score(self, batch: int) -> Work:
        """Forward and backward through activations, and every example's gradient of every element."""
        rows = ((batch, self.prompt + self.solution),)
        return self._traced("score", rows, batch * self.solution)

    def train_sft(self) -> Work:
        sft = self.settings.sft
        mine = self._share(sft.batch_size)
        rows = self._sequences(mine, self.prompt + self.solution)
        return self._traced("train", rows, mine * self.solution, sft.gradient_checkpointing, dropout=True)

    def train_grpo(self) -> Work:
        grpo = self.settings.grpo
        mine, length = self._share(grpo.micro_batch), grpo.max_completion_length
        rows = self._sequences(mine, self.prompt + length, grpo.completions, self.prompt)
        return self._traced("train", rows, mine * length, grpo.gradient_checkpointing)

    def complete(self, prompts: int, tokens: int, samples: int = 1) -> Work:
        """Prefill of the prompts, then `tokens` steps of all completions; steps cost what the middle one does."""
        prompts = self._share(prompts)
        rows = prompts * samples
        prefill = self._cached(prompts, self.prompt, 0)
        middle = self._cached(rows, 1, self.prompt + tokens // 2)
        last = self._cached(rows, 1, self.prompt + tokens)
        operations = prefill.operations.copy()
        for operation, count in middle.operations.items():
            operations[operation] += tokens * count
        # The last step's trace holds the cache: each layer's is written anew, longer by a token.
        return Work(operations, max(prefill.peak, last.peak))

    def _share(self, batch: int) -> int:
        """One process's part of what a step sees in all."""
        return -(-batch // self.settings.processes)

    def _sequences(self, rows: int, length: int, group: int = 1, prefix: int = 0) -> tuple[tuple[int, int], ...]:
        """(rows, tokens) of each pass that these sequences take: padded together, or bundled by what they share."""
        if not self.bundles:
            return ((rows, length),)
        made = []
        for row in range(rows):
            start = [1] * self.shared + [2 + row // group] * (max(prefix, self.shared) - self.shared)
            made.append(start + [1000 + row] * (length - len(start)))
        return tuple(
            (1, bundle.prefix + sum(len(made[row]) - bundle.prefix for row in bundle.rows)) for bundle in bundled(made)
        )

    @cache  # noqa: B019
    def _traced(
        self, kind: str, rows: tuple[tuple[int, int], ...], scored: int, checkpointing=False, dropout=False
    ) -> Work:
        base = self.model.get_base_model()
        if checkpointing:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
            base.train()
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.train(dropout)
        hooks = self._scoring_hooks() if kind == "score" else []
        try:
            work = traced(lambda: self._pass(rows, scored, kind))
            return replace(work, pace=1.0 if kind == "read" else RECORDED)
        finally:
            for hook in hooks:
                hook.remove()
            if checkpointing:
                base.activation_checkpointing_disable()
            self.model.eval()

    def _pass(self, rows, scored: int, kind: str) -> None:
        """One pass of each (rows, tokens), then the log-probabilities of `scored` tokens of them together."""
        base, backward = self.model.get_base_model(), kind != "read"
        states = []
        low = self.dtype != torch.float32
        with torch.autocast("cpu", dtype=self.dtype, enabled=low), torch.set_grad_enabled(backward):
            for count, length in rows:
                embedded = base.get_input_embeddings()(torch.empty(count, length, dtype=torch.long, device="meta"))
                embedded = embedded.detach().requires_grad_(backward)
                hidden = base.base_model(
                    inputs_embeds=embedded,
                    attention_mask=torch.empty(1, 1, length, length, dtype=self.dtype, device="meta"),
                    position_ids=torch.empty(1, length, dtype=torch.long, device="meta"),
                    use_cache=False,
                ).last_hidden_state
                states.append(hidden.flatten(0, 1))
            chosen = torch.cat(states)
            # A prefix that is read once still predicts the first token of each sequence that shares it.
            chosen = chosen[:scored] if len(chosen) >= scored else chosen.repeat(-(-scored // len(chosen)), 1)[:scored]
            logits = base.get_output_embeddings()(chosen).float()
            if kind == "train":
                logits = logits / 1.2  # some temperature
            log_probs = logits.log_softmax(-1)
            targets = torch.empty(scored, 1, dtype=torch.long, device="meta")
            loss = -log_probs.gather(1, targets).sum()
            if kind == "train":
                # What the trainers log of every token: its entropy, and whether it was the likeliest (`answer_head`).
                with torch.no_grad():
                    (log_probs.exp() * log_probs).sum(-1)
                    logits.argmax(-1)
        if kind == "score":
            torch.autograd.grad(loss, embedded)
        elif backward:
            loss.backward()
            self.model.zero_grad(set_to_none=True)

    def _scoring_hooks(self) -> list:
        parameters = models.lora_parameters(self.model)
        sums = [{name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()} for _ in range(2)]
        return accumulating_hooks(self.model, *sums)

    @cache  # noqa: B019
    def _cached(self, rows: int, tokens: int, before: int) -> Work:
        """`tokens` of each row after a cache of `before`."""
        heads = getattr(self.config, "num_key_value_heads", self.config.num_attention_heads)
        width = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        cache_ = DynamicCache(config=self.config)
        for layer in range(self.config.num_hidden_layers if before else 0):
            keys = torch.empty(rows, heads, before, width, dtype=self.dtype, device="meta")
            cache_.update(keys, keys.clone(), layer)
        base = self.model.get_base_model()

        def go():
            hidden = base.base_model(
                input_ids=torch.empty(rows, tokens, dtype=torch.long, device="meta"),
                attention_mask=torch.empty(rows, 1, tokens, before + tokens, dtype=self.dtype, device="meta"),
                position_ids=torch.empty(1, tokens, dtype=torch.long, device="meta"),
                past_key_values=cache_,
                use_cache=True,
            ).last_hidden_state[:, -1:]
            (base.get_output_embeddings()(hidden).float() / 1.2).softmax(-1).cumsum(-1)

        low = self.dtype != torch.float32
        with torch.no_grad(), torch.autocast("cpu", dtype=self.dtype, enabled=low):
            return traced(go)

    def _weights(self) -> float:
        """Bytes of the frozen base in one process."""
        layers = models.decoder_layers(self.model.get_base_model())
        inside = sum(p.numel() for p in layers.parameters() if not p.requires_grad)
        outside = sum(p.numel() for p in self.model.parameters() if not p.requires_grad) - inside
        each = self.dtype.itemsize
        if self.settings.model.quantization:
            each_inside = 0.5 + 1 / 64 + 4 / (64 * 256)  # nf4, a byte a block of 64, double quantisation
        else:
            each_inside = each / (self.settings.processes if self.settings.model.sharded else 1)
        return inside * each_inside + outside * each


# Without a device torch takes these apart into many operations; a GPU has a kernel for each.


def _gpu_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """Attention of transformers' models by the kernel that takes any mask."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    bias = attention_mask.expand(len(query), query.shape[1], -1, -1)
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    attended = attend(query, key, value, bias, torch.is_grad_enabled(), dropout, scale=scaling)
    return attended[0].transpose(1, 2).contiguous(), None


def _gpu_dropout(module: torch.nn.Dropout, values: torch.Tensor) -> torch.Tensor:
    return torch.native_dropout(values, module.p, True)[0] if module.training and module.p else values


AttentionInterface.register(_gpu_attention.__name__, _gpu_attention)


def configuration(settings: Settings) -> AutoConfig:
    """The model's configuration: its own, or the copy in `profiles/architectures` where that cannot be reached."""
    if preflight.is_local(settings):
        preflight.check_model(settings)
        return models.load_config(settings)
    name = "SmolLM2-135M-Instruct" if settings.model.source == "packaged" else settings.model.source.rsplit("/")[-1]
    kept = _architectures() / f"{name}.json"
    if kept.is_file():
        return AutoConfig.for_model(**json.loads(kept.read_text()))
    try:
        return AutoConfig.from_pretrained(settings.model.source, revision=settings.model.revision)
    except (OSError, ValueError) as error:
        raise InputError(
            f"model.source = {settings.model.source!r}: no configuration there ({str(error).splitlines()[0]}) and no "
            f"{kept.relative_to(project_root())}; put the model's config.json at that place to plan without the model"
        ) from None


def _architectures():
    return project_root() / "profiles" / "architectures"


def _overhead(settings: Settings) -> float:
    """Seconds that a call takes beside its operation (Python, autograd), from a model too small to compute anything."""
    config = AutoConfig.for_model(
        "llama", hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=64
    )
    model = models.attach_adapter(AutoModelForCausalLM.from_config(config).requires_grad_(False), settings)
    ids = torch.ones(1, 4, dtype=torch.long)

    def go():
        model(input_ids=ids, labels=ids).loss.backward()

    work, taken = traced(go), []
    for _ in range(9):
        began = time.perf_counter()
        go()
        taken.append(time.perf_counter() - began)
    computing = sum(count * timed_here(operation) for operation, count in work.operations.items())
    return max(0.0, sorted(taken)[4] - computing) / sum(work.operations.values())
