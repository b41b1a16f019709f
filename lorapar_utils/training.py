"""Stage 1 (SFT) and stage 2 (GRPO) with TRL's trainers and `ActiveAdamW` (paper, section 3.4).

Deviation: elements outside a stage's mask do not change at all (see `optim`), each stage trains on one system's
examples, and the KL term is off (TRL's `beta=0`; the paper's beta is a setting of the partition).
"""

import hashlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer
from trl.models import unwrap_model_for_generation

from lorapar_utils import processes, rewards
from lorapar_utils.answer_head import drop_trl_head, use_answer_head
from lorapar_utils.encoding import encode_examples, prompt_ids
from lorapar_utils.errors import InputError, require
from lorapar_utils.generation import answering, complete, uniform, without_input_casts
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.records import write_atomically
from lorapar_utils.settings import GrpoSection, Settings, SftSection
from lorapar_utils.shortcuts import shortcuts_of

# A file that marks a complete checkpoint. It holds the hash of each file of the checkpoint.
FINISHED = "finished"
# What the paper or its script fixes.
PAPER = {
    # The paper's loss has no router loss. TRL would add that of a mixture of experts.
    "sft": {"lr_scheduler_type": "cosine", "router_aux_loss_coef": 0.0},
    "grpo": {"lr_scheduler_type": "cosine", "router_aux_loss_coef": 0.0, "adam_beta2": 0.99, "disable_dropout": True},
}
# TRL's defaults, written out so that an upgrade cannot change them.
PINNED_DEFAULTS = {
    "sft": {"packing": False, "loss_type": "nll"},
    "grpo": {
        "num_iterations": 1,
        "steps_per_generation": None,  # one rollout per optimizer step
        "top_p": 1.0,
        "top_k": 0,
        "min_p": None,
        "repetition_penalty": 1.0,
        "adam_beta1": 0.9,
        "beta": 0.0,  # no KL term
        "epsilon": 0.2,
        "epsilon_high": None,
        "importance_sampling_level": "token",
        "multi_objective_aggregation": "sum_then_normalize",
        "top_entropy_quantile": 1.0,
        "sync_ref_model": False,
        "shuffle_dataset": True,
        "remove_unused_columns": False,
    },
}


def run_sft(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    masks: dict[str, torch.Tensor],
    settings: Settings,
    checkpoints: Path | None = None,
    watch: Callable[[], dict] | None = None,
) -> list[dict]:
    """Stage 1: supervised fine-tuning of the active elements on worked solutions.

    Parameters
    ----------
    model
        Base with an adapter; trained in place.
    examples
        Rows of the pool (`prompt`, `solution`, `id`).
    masks
        Parameter name -> BoolTensor of the parameter's shape, True = trained.
    settings
        Section `sft`; `checkpoint_every`.
    checkpoints
        Folder for checkpoints; None keeps none. A new run continues from the last checkpoint there, and the result is
        the same bit for bit. Damaged checkpoints are deleted with a printed line, and the one before is used.
    watch
        Called every `evaluation.watch_every` steps. The returned dict is added to the log. It must draw no global
        random number.

    Returns
    -------
    list of dict
        TRL's log, one entry per step: loss, grad_norm, learning_rate, mean_token_accuracy, …
    """
    sft = settings.sft
    encoded = encode_examples(examples, tokenizer, settings)
    profile = {
        "num_train_epochs": sft.epochs,
        "per_device_train_batch_size": _each_process("sft.batch_size", sft.batch_size),
        "gradient_accumulation_steps": sft.accumulation,
        "warmup_steps": _warmup(len(encoded), sft.batch_size * sft.accumulation, sft.epochs, sft.warmup_ratio),
        "max_length": sft.max_length,
        **_common(settings, sft, model),
    }
    with _checkpointing(checkpoints, settings) as saving:
        config = SFTConfig(**PAPER["sft"], **PINNED_DEFAULTS["sft"], **profile, **saving)
        optimizer = _optimizer(model, masks, config)
        with _adapter_as_it_is(model):
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=datasets.Dataset.from_list(encoded),
                processing_class=tokenizer,
                optimizers=(optimizer, None),
                callbacks=[_Progress("SFT", "loss"), _Watch(watch, settings.evaluation.watch_every)],
            )
        return _train(trainer, optimizer)


def run_grpo(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    masks: dict[str, torch.Tensor],
    settings: Settings,
    checkpoints: Path | None = None,
    watch: Callable[[], dict] | None = None,
) -> list[dict]:
    """Stage 2: GRPO of the active elements on verifiable rewards, starting from the model's current weights.

    Parameters
    ----------
    examples
        Rows of the pool (`prompt`, `answer`, `solution`); see `prompts_to_reinforce`.
    settings
        Section `grpo`; `checkpoint_every`.
    model, tokenizer, masks, checkpoints, watch
        As in `run_sft`.

    Returns
    -------
    list of dict
        TRL's log, one entry per step: reward, reward_std, completions/mean_length, entropy, frac_reward_zero_std, …
    """
    grpo = settings.grpo
    rows = prompts_to_reinforce(examples, tokenizer, settings)
    profile = {
        "max_steps": grpo.steps,
        "per_device_train_batch_size": _each_process("grpo.micro_batch", grpo.micro_batch),
        "gradient_accumulation_steps": grpo.rows // grpo.micro_batch,
        "num_generations": grpo.completions,
        "max_completion_length": grpo.max_completion_length,
        "temperature": grpo.temperature,
        "loss_type": grpo.loss_type,
        "scale_rewards": grpo.scale_rewards,
        "mask_truncated_completions": grpo.mask_truncated_completions,
        "warmup_steps": round(grpo.warmup_ratio * grpo.steps),
        "log_completions": settings.show_rollouts > 0,
        "num_completions_to_print": settings.show_rollouts,
        **_rollouts(grpo),
        **_common(settings, grpo, model),
    }
    with _checkpointing(checkpoints, settings) as saving:
        config = GRPOConfig(**PAPER["grpo"], **PINNED_DEFAULTS["grpo"], **profile, **saving)
        optimizer = _optimizer(model, masks, config)
        with _adapter_as_it_is(model):
            trainer = LeanGRPOTrainer(
                model=model,
                rows_at_once=_each_process("grpo.rollout_batch", grpo.rows_at_once),
                read_prompt=partial(prompt_ids, tokenizer=tokenizer, settings=settings),
                reward_funcs=REWARDS[settings.reward],
                args=config,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                optimizers=(optimizer, None),
                callbacks=[_Progress("GRPO", "reward"), _Watch(watch, settings.evaluation.watch_every)],
            )
        return _train(trainer, optimizer)


class LeanGRPOTrainer(GRPOTrainer):
    """TRL's trainer with the same result for less work.

    A prompt is read once for all completions, and a finished completion leaves the batch. A completion whose advantage
    is zero has a zero gradient, so it is scored (for the entropy) but not differentiated. Rollouts and training use
    the same dtypes.

    Parameters
    ----------
    rows_at_once
        Completions that this process generates in one batch, in whole groups. The samples do not depend on it.
    read_prompt
        Maps a prompt to token ids, as in every other phase.
    """

    def __init__(self, *arguments, rows_at_once: int, read_prompt: Callable[[str], list[int]], **others):
        self._rows_at_once = rows_at_once
        self._read_prompt = read_prompt
        super().__init__(*arguments, **others)

    def _tokenize_prompts(self, prompts):
        return [self._read_prompt(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if self.use_vllm:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        # Every process draws the numbers of all rows, so that samples do not depend on the number of processes.
        rows, width = len(prompt_ids), self.max_completion_length
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        draws = uniform(world * rows, width, self.args.seed, self.state.global_step)[rank * rows :][:rows]
        prompts = list(dict.fromkeys(map(tuple, prompt_ids)))
        samples = len(prompt_ids) // len(prompts)
        if [prompt for prompt in prompts for _ in range(samples)] != list(map(tuple, prompt_ids)):
            prompts, samples = prompt_ids, 1
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gather_deepspeed3_params=self.args.ds3_gather_for_generation,
            generation_kwargs=self.generation_kwargs,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ) as model:
            completions, size = [], max(1, self._rows_at_once // samples)
            for first in range(0, len(prompts), size):
                completions += complete(
                    model,
                    prompts[first : first + size],
                    ends=self.eos_token_ids,
                    max_new_tokens=width,
                    samples=samples,
                    temperature=self.temperature,
                    draws=draws[first * samples :],
                )
        return completions, None

    def _compute_loss(self, model, inputs):
        self._has_gradient = inputs["advantages"] != 0
        # Backward needs at least one differentiated row, even with a zero gradient.
        self._has_gradient[0] |= not self._has_gradient.any()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        # All processes must run the same number of passes, because each waits for the others.
        single = self.accelerator.num_processes == 1
        if not single or not torch.is_grad_enabled() or self._has_gradient.all():
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

        def score(rows):
            log_probs, entropies, *_ = super(LeanGRPOTrainer, self)._get_per_token_logps_and_entropies(
                model, input_ids[rows], attention_mask[rows], *args, **kwargs
            )
            return log_probs, entropies

        # Differentiated rows first: autocast caches each weight's bf16 copy, and a copy made under `no_grad` carries no
        # gradient.
        differentiated = score(self._has_gradient)
        with torch.no_grad():
            constant = score(~self._has_gradient)
        order = torch.cat([self._has_gradient.nonzero(), (~self._has_gradient).nonzero()]).squeeze(1).argsort()
        return *(torch.cat(pair)[order] for pair in zip(differentiated, constant, strict=True)), None


# TRL calls each reward function with the columns of the batch, and logs the reward under the function's name.


def correct(completions, answer, **_):
    return [rewards.correctness(c, a) for c, a in zip(completions, answer, strict=True)]


def layout(completions, **_):
    return [rewards.layout(c) for c in completions]


def steps(completions, solution, **_):
    return [rewards.step_share(c, s) for c, s in zip(completions, solution, strict=True)]


def overlap(completions, solution, **_):
    return [rewards.overlap(c, s) for c, s in zip(completions, solution, strict=True)]


# Reward functions that are summed, by `grpo.reward`.
REWARDS = {"answer": [correct, layout, steps], "overlap": [overlap]}


def check_references(examples: Sequence[dict], settings: Settings) -> None:
    """Raise an `InputError` that names an example whose reference `grpo.reward` cannot compare with completions."""
    for example in examples:
        reference = example["solution" if settings.reward == "overlap" else "answer"]
        if not (reference or "").strip():
            raise InputError(f"example {example['id']}: it has no reference, so no completion of it can be rewarded")
        if settings.reward == "answer" and "\n" in reference:
            raise InputError(
                f"grpo.reward = 'answer': the reference of example {example['id']} has several lines, which no "
                "`#### answer` can equal; set grpo.reward: overlap for free text"
            )


def prompts_to_reinforce(
    examples: Sequence[dict], tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> list[dict[str, str]]:
    """Rows for GRPO from System 2's examples: `prompt`, `answer`, `solution`.

    Prompts longer than `grpo.max_prompt_length` are dropped, and the number of these is printed.

    Raises
    ------
    InputError
        There is no example, every prompt is too long, or the reward cannot use an example's reference.
    """
    if not examples:
        raise InputError("examples: System 2 is empty, so GRPO has no prompt; lower voting.quorum or add teachers")
    check_references(examples, settings)
    limit = settings.grpo.max_prompt_length
    rows = [
        {key: example[key] for key in ("prompt", "answer", "solution")}
        for example in examples
        if len(prompt_ids(example["prompt"], tokenizer, settings)) <= limit
    ]
    if not rows:
        raise InputError(f"grpo.max_prompt_length = {limit}: every prompt of System 2 is longer; raise it")
    if len(rows) < len(examples):
        print(
            f"{len(examples) - len(rows)} of {len(examples)} prompts are longer than grpo.max_prompt_length = {limit} "
            "and left out"
        )
    return rows


def _rollouts(grpo: GrpoSection) -> dict:
    """Options for sampling here or by vLLM. TRL corrects for vLLM's slightly different probabilities by a ratio."""
    if grpo.rollouts == "here":
        return {"use_vllm": False}
    require("vllm", f"grpo.rollouts = {grpo.rollouts!r}", "vllm")
    return {
        "use_vllm": True,
        "vllm_mode": grpo.rollouts.removeprefix("vllm-"),
        "vllm_gpu_memory_utilization": grpo.vllm_memory,
        "vllm_server_base_url": grpo.vllm_server,
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": "sequence_mask",
    }


def _each_process(field: str, batch: int) -> int:
    """Rows of a batch per process. All processes together compute the same step as one process would."""
    count = processes.state().num_processes
    if batch % count:
        raise InputError(f"{field} = {batch} cannot be shared by {count} processes; make it a multiple of that")
    return batch // count


def _common(settings: Settings, section: SftSection | GrpoSection, model: PeftModel) -> dict:
    """Options of both stages from the profile and the machine. bf16 autocast is on for a base loaded in bf16."""
    return dict(
        learning_rate=section.learning_rate,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        activation_checkpointing=section.gradient_checkpointing,
        pad_to_multiple_of=None,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=next(model.parameters()).dtype == torch.bfloat16,
        logging_steps=1,
        logging_nan_inf_filter=False,  # a NaN or infinite loss ends the stage, see `_Diverged`
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def _adapter_as_it_is(model: PeftModel) -> Iterator[None]:
    """Keep fp32 adapters. When TRL builds a trainer over a 4-bit base, it rounds all adapter weights to bf16."""
    weights = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in weights:
        parameter.data = data


@contextmanager
def _checkpointing(folder: Path | None, settings: Settings) -> Iterator[dict]:
    """Trainer options for checkpoints in `folder`. Without a folder the trainer gets a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield {"output_dir": scratch, "save_strategy": "no"}
        return
    with processes.state().main_process_first():
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in set(folder.glob("checkpoint-*")) - set(_finished(folder)):
            shutil.rmtree(unfinished)
        for checkpoint in _finished(folder):
            if damage := _damage(checkpoint):
                print(f"{checkpoint} is damaged ({damage}) and deleted: an earlier one is gone on from, or none")
                shutil.rmtree(checkpoint)
    # Keep two checkpoints. The trainer deletes the older one before our 'finished' mark is on the newer one.
    options = {"save_strategy": "steps", "save_steps": settings.checkpoint_every, "save_total_limit": 2}
    yield {"output_dir": str(folder), **options}


def _finished(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"checkpoint-*/{FINISHED}")), key=lambda p: int(p.name[11:]))


def _damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that has changed since the checkpoint was finished, or None."""
    try:
        hashes = json.loads((checkpoint / FINISHED).read_text(encoding="utf-8"))
        changed = [name for name, digest in hashes.items() if not _has_hash(checkpoint / name, digest)]
    except (ValueError, AttributeError, OSError):
        changed = [FINISHED]
    return changed[0] if changed else None


def _has_hash(path: Path, digest: str) -> bool:
    try:
        return _sha256(path) == digest
    except OSError:
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_processes(checkpoint: Path) -> None:
    """Require the same number of processes as before, because each process has a saved random state."""
    before, now = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), processes.state().num_processes
    if before != now:
        raise InputError(
            f"processes = {now}: {checkpoint} was written by {before}; set processes to {before} to go on from it, "
            f"or delete {checkpoint.parent} to train this stage from its start"
        )


class _MarkFinished(TrainerCallback):
    """Marks complete checkpoints. A trainer killed while saving leaves an incomplete checkpoint without a mark."""

    def on_save(self, args, state, control, **kwargs):
        processes.state().wait_for_everyone()  # each process writes a random state
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
            hashes = {str(path.relative_to(checkpoint)): _sha256(path) for path in files}
            write_atomically(checkpoint / FINISHED, json.dumps(hashes))


def _optimizer(model: PeftModel, masks: dict[str, torch.Tensor], config: SFTConfig | GRPOConfig) -> ActiveAdamW:
    """A new optimizer for each stage. It trains only parameters named in `masks`."""
    model_config = model.config.get_text_config()
    if hasattr(model_config, "num_local_experts") and not hasattr(model_config, "num_experts"):
        model_config.num_experts = model_config.num_local_experts  # TRL 1.16 reads num_experts of every mixture
    named = [(name, parameter) for name, parameter in model.named_parameters() if name in masks]
    return ActiveAdamW(
        named,
        masks,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )


def _train(trainer: SFTTrainer | GRPOTrainer, optimizer: ActiveAdamW) -> list[dict]:
    base = trainer.model.get_base_model()
    if not trainer.args.activation_checkpointing:
        base.activation_checkpointing_disable()  # an earlier trainer may have switched it on
    temperature = getattr(trainer.args, "temperature", 1.0)
    _check_head(base, temperature)
    if not torch.cuda.is_available():
        use_answer_head(base, temperature)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_MarkFinished)
    trainer.add_callback(_Diverged(trainer.args.output_dir))
    finished = _finished(Path(trainer.args.output_dir))
    if finished:
        _check_processes(finished[-1])
    last = TrainerState.load_from_json(finished[-1] / TRAINER_STATE_NAME) if finished else TrainerState()
    try:
        # Autocast multiplies adapters in bf16, so PEFT's casts of inputs to fp32 and back only cost time.
        with without_input_casts(trainer.model, active=trainer.args.bf16):
            if finished and last.global_step >= last.max_steps:
                # All steps are done, and with `max_steps` the trainer would still run one more.
                set_peft_model_state_dict(trainer.model, load_peft_weights(str(finished[-1])))
                trainer.state = last
            else:
                trainer.train(resume_from_checkpoint=str(finished[-1]) if finished else None)
    finally:
        optimizer.release()
        drop_trl_head(base)
    trainer.model.eval()
    return [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


@torch.no_grad()
def _check_head(model: PreTrainedModel, temperature: float) -> None:
    """Check that TRL's fused head computes the model's own loss. Models with the `head` shortcut need no check.

    Raises
    ------
    InputError
        The losses differ, for instance because the model has a layer between backbone and head.
    """
    if shortcuts_of(model).head:
        return
    ids = torch.arange(3, 9, device=model.device)[None]
    with answering(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        try:
            fused = model(input_ids=ids, labels=ids, fused_lm_head=True).loss.float()
        except (AttributeError, TypeError, RuntimeError, IndexError) as error:
            fused, reason = None, str(error).splitlines()[0][:200]
        else:
            reason = f"{fused:.4f} in place of {loss:.4f}"
    if fused is None or abs(fused - loss) > 0.02 * abs(loss):
        raise InputError(
            f"model: TRL's trainers compute another loss for {type(model).__name__} than the model itself ({reason}); "
            "take another model"
        )


def _warmup(examples: int, batch: int, epochs: float, ratio: float) -> int:
    return round(ratio * epochs * -(-examples // batch))


class _Diverged(TrainerCallback):
    """Ends a stage when the loss or gradient is NaN or infinite, before the checkpoint of this step is written."""

    def __init__(self, checkpoints: str):
        self.checkpoints = Path(checkpoints)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: float(logs[key]) for key in ("loss", "grad_norm") if key in (logs or {})}
        broken = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
        if broken:
            finished = _finished(self.checkpoints)
            last = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint had been written"
            raise InputError(
                f"training diverged at step {state.global_step} of {state.max_steps}: {', '.join(broken)}; {last}. "
                "Lower the stage's learning_rate (sft or grpo), or train in float32 (model.dtype)"
            )


class _Watch(TrainerCallback):
    """Calls `watch` during training and adds the result to the log, which checkpoints include."""

    def __init__(self, watch: Callable[[], dict] | None, every: int):
        self.watch, self.every = watch, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.watch is not None and state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step, **self.watch()})
            model.train()


class _Progress(TrainerCallback):
    """A `tqdm.auto` progress bar that shows one figure of the log."""

    def __init__(self, title: str, figure: str):
        self.title, self.figure = title, figure

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.figure in (logs or {}):
            self.bar.set_postfix({self.figure: f"{float(logs[self.figure]):.3f}"})

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
