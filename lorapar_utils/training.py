"""Stage 1 (SFT) and stage 2 (GRPO) with TRL's trainers and `ActiveAdamW` (paper, section 3.4).

Deviation: everything outside a stage's mask is frozen to the bit (see `optim`), each stage reads its own
system's examples, and the KL term is off (`beta=0` in TRL's sense; the paper's beta is a partition setting).
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
from lorapar_utils.settings import GrpoSection, Settings
from lorapar_utils.shortcuts import shortcuts_of

# In a checkpoint, once it is written to its end: the hash of each of its files.
FINISHED = "finished"


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
        Base with its adapter; trained in place.
    examples
        Rows of the pool (`prompt`, `solution`, `id`).
    masks
        Parameter name -> BoolTensor, True = trained.
    settings
        Section `sft`; `checkpoint_every`.
    checkpoints
        A folder for checkpoints: a run that finds some there goes on from the last, to the same end, bit for bit.
        One that was damaged since is deleted with a printed line, and the one before it counts. None keeps none.
    watch
        Called every `evaluation.watch_every` steps; what it returns joins the log. It must draw no random number.

    Returns
    -------
    list of dict
        TRL's log, an entry a step: loss, grad_norm, learning_rate, mean_token_accuracy, …
    """
    sft = settings.sft
    encoded = encode_examples(examples, tokenizer, settings)
    with _checkpointing(checkpoints, settings) as saving:
        config = SFTConfig(
            num_train_epochs=sft.epochs,
            learning_rate=sft.learning_rate,
            per_device_train_batch_size=_each_process("sft.batch_size", sft.batch_size),
            gradient_accumulation_steps=sft.accumulation,
            warmup_steps=_warmup(len(encoded), sft.batch_size * sft.accumulation, sft.epochs, sft.warmup_ratio),
            weight_decay=sft.weight_decay,
            max_grad_norm=sft.max_grad_norm,
            activation_checkpointing=sft.gradient_checkpointing,
            max_length=sft.max_length,
            packing=False,
            pad_to_multiple_of=None,
            loss_type="nll",
            **_common(settings, model),
            **saving,
        )
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
    """Stage 2: GRPO of the active elements, from the model's present weights, on verifiable rewards.

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
        TRL's log, one entry a step: reward, reward_std, completions/mean_length, entropy,
        frac_reward_zero_std, …
    """
    grpo = settings.grpo
    rows = prompts_to_reinforce(examples, tokenizer, settings)
    with _checkpointing(checkpoints, settings) as saving:
        config = GRPOConfig(
            max_steps=grpo.steps,
            learning_rate=grpo.learning_rate,
            per_device_train_batch_size=_each_process("grpo.micro_batch", grpo.micro_batch),
            gradient_accumulation_steps=grpo.rows // grpo.micro_batch,
            num_generations=grpo.completions,
            num_iterations=1,
            steps_per_generation=None,  # one rollout for each optimizer step
            max_completion_length=grpo.max_completion_length,
            temperature=grpo.temperature,
            top_p=1.0,
            top_k=0,
            repetition_penalty=1.0,
            adam_beta1=0.9,
            adam_beta2=0.99,
            beta=0.0,
            epsilon=0.2,
            loss_type=grpo.loss_type,
            scale_rewards=grpo.scale_rewards,
            epsilon_high=None,
            importance_sampling_level="token",
            multi_objective_aggregation="sum_then_normalize",
            top_entropy_quantile=1.0,
            min_p=None,
            sync_ref_model=False,
            mask_truncated_completions=grpo.mask_truncated_completions,
            warmup_steps=round(grpo.warmup_ratio * grpo.steps),
            weight_decay=grpo.weight_decay,
            max_grad_norm=grpo.max_grad_norm,
            activation_checkpointing=grpo.gradient_checkpointing,
            disable_dropout=True,
            shuffle_dataset=True,
            remove_unused_columns=False,
            pad_to_multiple_of=None,
            **_rollouts(grpo),
            log_completions=settings.show_rollouts > 0,
            num_completions_to_print=settings.show_rollouts,
            **_common(settings, model),
            **saving,
        )
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

    A prompt is read once for all its completions, which leave the batch as they end; a completion without an
    advantage, whose gradient is zero, is scored (for the entropy) but not differentiated. The policy is sampled in
    the arithmetic that it is trained in.

    Parameters
    ----------
    rows_at_once
        Completions that this process writes together, whole groups of a prompt; a row's random numbers are the same.
    read_prompt
        Token ids of a prompt, the same as in every other phase.
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
        # Every process draws the numbers of all and uses those of its rows: any number of them samples the same.
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
            completions, together = [], max(1, self._rows_at_once // samples)
            for first in range(0, len(prompts), together):
                completions += complete(
                    model,
                    prompts[first : first + together],
                    ends=self.eos_token_ids,
                    max_new_tokens=width,
                    samples=samples,
                    temperature=self.temperature,
                    draws=draws[first * samples :],
                )
        return completions, None

    def _compute_loss(self, model, inputs):
        self._teaches = inputs["advantages"] != 0
        # A loss needs something to differentiate, even a zero.
        self._teaches[0] |= not self._teaches.any()
        return super()._compute_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, *args, **kwargs):
        # Several processes have to make the same number of passes: each of them waits for the others'.
        alone = self.accelerator.num_processes == 1
        if not alone or not torch.is_grad_enabled() or self._teaches.all():
            return super()._get_per_token_logps_and_entropies(model, input_ids, attention_mask, *args, **kwargs)

        def scored(rows):
            found = super(LeanGRPOTrainer, self)._get_per_token_logps_and_entropies(
                model, input_ids[rows], attention_mask[rows], *args, **kwargs
            )
            return found[:2]

        # In this order: autocast keeps the first cast of each weight, and one made without gradients has none.
        taught = scored(self._teaches)
        with torch.no_grad():
            idle = scored(~self._teaches)
        place = torch.cat([self._teaches.nonzero(), (~self._teaches).nonzero()]).squeeze(1).argsort()
        return *(torch.cat(pair)[place] for pair in zip(taught, idle, strict=True)), None


# TRL names each logged reward after its function and calls it with the columns of the batch.


def correct(completions, answer, **_):
    return [rewards.correctness(c, a) for c, a in zip(completions, answer, strict=True)]


def layout(completions, **_):
    return [rewards.layout(c) for c in completions]


def steps(completions, solution, **_):
    return [rewards.step_share(c, s) for c, s in zip(completions, solution, strict=True)]


def overlap(completions, solution, **_):
    return [rewards.overlap(c, s) for c, s in zip(completions, solution, strict=True)]


# What `grpo.reward` adds up.
REWARDS = {"answer": [correct, layout, steps], "overlap": [overlap]}


def check_references(examples: Sequence[dict], settings: Settings) -> None:
    """Whether `grpo.reward` can compare completions with each example's reference; an `InputError` that names one."""
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
    """The rows that GRPO reads of System 2's examples: `prompt`, `answer`, `solution`.

    Prompts longer than `grpo.max_prompt_length` are left out, and their number is printed.

    Raises
    ------
    InputError
        No example, none that is short enough, or one whose reference the reward cannot compare with.
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
    """Who samples: this process, or vLLM, whose probabilities differ a little, which TRL corrects by their ratio."""
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
    """One process's part of a batch: as many processes as there are compute the same step together."""
    count = processes.state().num_processes
    if batch % count:
        raise InputError(f"{field} = {batch} cannot be shared by {count} processes; make it a multiple of that")
    return batch // count


def _common(settings: Settings, model: PeftModel) -> dict:
    """What both stages share; bf16 autocast follows the dtype that the base was loaded in."""
    return dict(
        lr_scheduler_type="cosine",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=next(model.parameters()).dtype == torch.bfloat16,
        logging_steps=1,
        router_aux_loss_coef=0.0,  # the paper's loss is the answer's alone; TRL adds a mixture's own otherwise
        logging_nan_inf_filter=False,  # a loss that is no number ends the stage, see `_Diverged`
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def _adapter_as_it_is(model: PeftModel) -> Iterator[None]:
    """TRL rounds the adapters over a 4-bit base to bf16 as it makes a trainer, what is inactive too; ours stay fp32."""
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    yield
    for parameter, data in kept:
        parameter.data = data


@contextmanager
def _checkpointing(folder: Path | None, settings: Settings) -> Iterator[dict]:
    """The trainer's settings for checkpoints in `folder`; without one it still wants a place of its own."""
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
    # Two: the trainer deletes the older one before it has called the newer one finished.
    every = {"save_strategy": "steps", "save_steps": settings.checkpoint_every, "save_total_limit": 2}
    yield {"output_dir": str(folder), **every}


def _finished(folder: Path) -> list[Path]:
    """Checkpoints that were written to their end, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"checkpoint-*/{FINISHED}")), key=lambda p: int(p.name[11:]))


def _damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that is not as it was when the checkpoint was finished; None where all are."""
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
    """Each process goes on from its own random state, so there have to be as many as before."""
    before, now = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), processes.state().num_processes
    if before != now:
        raise InputError(
            f"processes = {now}: {checkpoint} was written by {before}; set processes to {before} to go on from it, "
            f"or delete {checkpoint.parent} to train this stage from its start"
        )


class _MarkFinished(TrainerCallback):
    """The trainer writes a checkpoint file by file: a killed one leaves some of them, and no note."""

    def on_save(self, args, state, control, **kwargs):
        processes.state().wait_for_everyone()  # each writes the state of its own random numbers
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
            hashes = {str(path.relative_to(checkpoint)): _sha256(path) for path in files}
            write_atomically(checkpoint / FINISHED, json.dumps(hashes))


def _optimizer(model: PeftModel, masks: dict[str, torch.Tensor], config: SFTConfig | GRPOConfig) -> ActiveAdamW:
    """Fresh state for each stage; only parameters named in `masks` are ever trained."""
    config_of_model = model.config.get_text_config()
    if hasattr(config_of_model, "num_local_experts") and not hasattr(config_of_model, "num_experts"):
        config_of_model.num_experts = config_of_model.num_local_experts  # TRL 1.16 reads it of every mixture
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
        base.activation_checkpointing_disable()  # trainers switch it on and never off
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
        # Autocast multiplies adapters in bf16 anyway; PEFT's casts of their inputs to fp32 and back cost time only.
        with without_input_casts(trainer.model, active=trainer.args.bf16):
            if finished and last.global_step >= last.max_steps:
                # Nothing is left to train, and a trainer that is told its number of steps would make one more.
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
    """Whether the loss that TRL's fused head computes is the model's own; for models that `shortcuts` know, it is.

    Raises
    ------
    InputError
        It is another, as of a model that puts a layer of its own between the backbone and the head.
    """
    if shortcuts_of(model).head:
        return
    ids = torch.arange(3, 9, device=model.device)[None]
    with answering(model):
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float() / temperature
        own = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        try:
            fused = model(input_ids=ids, labels=ids, fused_lm_head=True).loss.float()
        except (AttributeError, TypeError, RuntimeError, IndexError) as error:
            fused, reason = None, str(error).splitlines()[0][:200]
        else:
            reason = f"{fused:.4f} in place of {own:.4f}"
    if fused is None or abs(fused - own) > 0.02 * abs(own):
        raise InputError(
            f"model: TRL's trainers compute another loss for {type(model).__name__} than the model itself ({reason}); "
            "take another model"
        )


def _warmup(examples: int, batch: int, epochs: float, ratio: float) -> int:
    return round(ratio * epochs * -(-examples // batch))


class _Diverged(TrainerCallback):
    """Ends a stage whose loss or gradient is no number any more, before that step's checkpoint is written."""

    def __init__(self, checkpoints: str):
        self.checkpoints = Path(checkpoints)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: float(logs[key]) for key in ("loss", "grad_norm") if key in (logs or {})}
        broken = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
        if broken:
            finished = _finished(self.checkpoints)
            kept = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint had been written"
            raise InputError(
                f"training diverged at step {state.global_step} of {state.max_steps}: {', '.join(broken)}; {kept}. "
                "Lower the stage's learning_rate (sft or grpo), or train in float32 (model.dtype)"
            )


class _Watch(TrainerCallback):
    """Measures the policy while it trains; what it finds is part of the log, and of its checkpoints."""

    def __init__(self, watch: Callable[[], dict] | None, every: int):
        self.watch, self.every = watch, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.watch is not None and state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step, **self.watch()})
            model.train()


class _Progress(TrainerCallback):
    """A `tqdm.auto` bar that shows the one figure worth watching."""

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
