"""Stage 1 (SFT) and stage 2 (GRPO) with TRL's trainers and `ActiveAdamW` (paper, section 3.4).

Deviation: elements outside a stage's mask do not change at all (see `optim`), each stage trains on one system's
examples, and the KL term is a setting, `grpo.kl` (TRL's `beta`; the paper's beta is the partition's), to the policy
that stage 2 starts from. TRL's reference at the paper's time was the base model, which knows nothing of the layout.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import datasets
import torch
from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lorapar_utils import distributed
from lorapar_utils.data.encoding import encode_examples, prompt_ids
from lorapar_utils.errors import InputError, require
from lorapar_utils.fast.answer_head import drop_trl_head, use_answer_head
from lorapar_utils.fast.checks import shortcuts_of
from lorapar_utils.fast.decoding import answering, without_input_casts
from lorapar_utils.fast.grpo_trainer import LeanGRPOTrainer
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.settings import GrpoSection, Settings, SftSection
from lorapar_utils.training.callbacks import Completions, Curve, Diverged, Progress, Watch
from lorapar_utils.training.checkpoints import MarkFinished, check_processes, checkpointing, finished_checkpoints
from lorapar_utils.training.rewards import REWARDS
from lorapar_utils.training.rollouts import Rollouts, by_the_policy, by_vllm

# With a KL term, TRL keeps the adapter as stage 2 found it under this name, and measures the divergence from there.
REFERENCE = "ref"
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
    with checkpointing(checkpoints, settings) as saving:
        config = SFTConfig(**PAPER["sft"], **PINNED_DEFAULTS["sft"], **profile, **saving)
        optimizer = _optimizer(model, masks, config)
        with _adapter_as_it_is(model):
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=datasets.Dataset.from_list(encoded),
                processing_class=tokenizer,
                optimizers=(optimizer, None),
                callbacks=_callbacks("SFT", "loss", watch, settings),
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
        "beta": grpo.kl,
        "loss_type": grpo.loss_type,
        "scale_rewards": grpo.scale_rewards,
        "mask_truncated_completions": grpo.mask_truncated_completions,
        "warmup_steps": round(grpo.warmup_ratio * grpo.steps),
        "log_completions": settings.show_rollouts > 0,
        # TRL's table is yellow and white on white in a notebook; ours is made from the file that it writes.
        "num_completions_to_print": 0,
        **_rollouts(grpo),
        **_common(settings, grpo, model),
    }
    with checkpointing(checkpoints, settings) as saving:
        config = GRPOConfig(**PAPER["grpo"], **PINNED_DEFAULTS["grpo"], **profile, **saving)
        optimizer = _optimizer(model, masks, config)
        with _adapter_as_it_is(model):
            trainer = (LeanGRPOTrainer if "grpo_trainer" in settings.shortcuts else GRPOTrainer)(
                model=model,
                rollout_func=_rollout_function(tokenizer, settings),
                reward_funcs=REWARDS[settings.reward],
                args=config,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                optimizers=(optimizer, None),
                callbacks=[
                    *_callbacks("GRPO", "reward", watch, settings),
                    *([Completions(settings.show_rollouts)] if settings.show_rollouts else []),
                ],
            )
        try:
            return _train(trainer, optimizer)
        finally:
            if REFERENCE in model.peft_config:
                model.delete_adapter(REFERENCE)


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


def _rollout_function(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Rollouts:
    read_prompt = partial(prompt_ids, tokenizer=tokenizer, settings=settings)
    if settings.grpo.rollouts != "here":
        return by_vllm(read_prompt)
    return by_the_policy(read_prompt, _each_process("grpo.rollout_batch", settings.grpo.rows_at_once))


def _each_process(field: str, batch: int) -> int:
    """Rows of a batch per process. All processes together compute the same step as one process would."""
    count = distributed.state().num_processes
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
        logging_nan_inf_filter=False,  # a NaN or infinite loss ends the stage, see `Diverged`
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


@contextmanager
def _adapter_as_it_is(model: PeftModel) -> Iterator[None]:
    """Keep adapter and base while TRL builds a trainer.

    Over a 4-bit base it rounds all adapter weights to bf16. For a KL term it adds a copy of the adapter, and with it
    PEFT would take PiSSA's or OLoRA's part out of the base a second time.
    """
    weights = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    config = model.peft_config["default"]
    initial = getattr(config, "init_lora_weights", None)
    if initial is not None:
        config.init_lora_weights = True
    try:
        yield
    finally:
        if initial is not None:
            config.init_lora_weights = initial
        for parameter, data in weights:
            parameter.data = data


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


def _callbacks(title: str, figure: str, watch: Callable[[], dict] | None, settings: Settings) -> list[TrainerCallback]:
    shown = [Curve(title, figure)] if settings.show_curves else []
    return [Progress(title, figure), Watch(watch, settings.evaluation.watch_every), *shown]


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
    trainer.add_callback(MarkFinished)
    trainer.add_callback(Diverged(trainer.args.output_dir))
    finished = finished_checkpoints(Path(trainer.args.output_dir))
    if finished:
        check_processes(finished[-1])
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
    """Check that TRL's fused head computes the model's own loss. Models with the `answer_head` shortcut need no check.

    Raises
    ------
    InputError
        The losses differ, for instance because the model has a layer between backbone and head.
    """
    if shortcuts_of(model).answer_head:
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
