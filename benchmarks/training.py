"""Training steps against TRL's, and LoRA-PAR's against plain LoRA's, on the same model, data and settings.

Paired: each repeat trains a few steps in every way, in turn, from the same weights; the medians of the ratios are
printed. SFT sees the same batches, so its losses must agree; GRPO draws its own completions.
    make bench
"""

import statistics
import sys
import tempfile
import time
from unittest import mock

import datasets
import torch
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lorapar_utils import data, models, training
from lorapar_utils.data.encoding import encode_examples, prompt_ids
from lorapar_utils.fast.answer_head import drop_trl_head
from lorapar_utils.settings import load_profile
from lorapar_utils.training import stages
from lorapar_utils.training.rewards import REWARDS

REPEATS, SFT_STEPS, GRPO_STEPS = 3, 6, 2


class StepTimes(TrainerCallback):
    """Seconds of each step; the first also pays for warming up and is not counted."""

    def __init__(self):
        self.marks = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.marks.append(time.perf_counter())

    def on_step_end(self, args, state, control, **kwargs):
        self.marks[-1] = time.perf_counter() - self.marks[-1]

    @property
    def seconds(self) -> float:
        return statistics.median(self.marks[1:])


class Bench:
    """One model, put back to the same adapter before every run."""

    def __init__(self, dtype: str = "auto"):
        self.settings = load_profile("study", model={"dtype": dtype}, sft={"epochs": 1}, grpo={"steps": GRPO_STEPS})
        base, self.tokenizer = models.load_base(self.settings)
        self.model = models.attach_adapter(base, self.settings)
        rows = [row for row in data.load_pool(self.settings) if row["split"] == "train"]
        self.system1 = [row for row in rows if row["construction"] == 1]
        self.system2 = [row for row in rows if row["construction"] == 2]
        self.start = {name: p.detach().clone() for name, p in self.parameters()}

    def parameters(self):
        return [(name, p) for name, p in self.model.named_parameters() if "lora_" in name]

    def reset(self) -> None:
        for name, parameter in self.parameters():
            parameter.data.copy_(self.start[name])
            parameter.requires_grad_(True)
            parameter.grad = None

    def masks(self, share: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        return {name: torch.rand(p.shape, generator=generator) < share for name, p in self.parameters()}

    def ours(self, run, rows, share=1.1, optimizer=None) -> tuple[float, list[dict]]:
        """Seconds a step and the log of `run_sft` or `run_grpo`."""
        self.reset()
        times = StepTimes()
        build = stages._train

        def timed(trainer, chosen):
            trainer.add_callback(times)
            return build(trainer, chosen)

        with mock.patch.object(stages, "_train", timed):
            if optimizer is None:
                history = run(self.model, self.tokenizer, rows, self.masks(share), self.settings)
            else:
                with mock.patch.object(stages, "_optimizer", optimizer):
                    history = run(self.model, self.tokenizer, rows, self.masks(share), self.settings)
        return times.seconds, history

    def trl_sft(self, rows, **options) -> tuple[float, list[dict]]:
        """TRL's trainer as its documentation shows it, with our learning rate, schedule and batch."""
        self.reset()
        sft = self.settings.sft
        with tempfile.TemporaryDirectory() as scratch:
            config = SFTConfig(
                output_dir=scratch,
                per_device_train_batch_size=sft.batch_size,
                learning_rate=sft.learning_rate,
                lr_scheduler_type="cosine",
                num_train_epochs=1,
                max_grad_norm=sft.max_grad_norm,
                weight_decay=0.0,
                warmup_steps=0,
                **self.common(),
                **options,
            )
            encoded = datasets.Dataset.from_list(encode_examples(rows, self.tokenizer, self.settings))
            return self.finish(
                SFTTrainer(self.model, args=config, train_dataset=encoded, processing_class=self.tokenizer)
            )

    def trl_grpo(self, rows, **options) -> tuple[float, list[dict]]:
        """TRL's trainer as its documentation shows it, with our group size, lengths and temperature."""
        self.reset()
        grpo = self.settings.grpo
        with tempfile.TemporaryDirectory() as scratch:
            config = GRPOConfig(
                output_dir=scratch,
                max_steps=GRPO_STEPS,
                learning_rate=grpo.learning_rate,
                per_device_train_batch_size=32,
                gradient_accumulation_steps=grpo.rows // 32,
                num_generations=grpo.completions,
                max_completion_length=grpo.max_completion_length,
                temperature=grpo.temperature,
                beta=0.0,
                **self.common(),
                **options,
            )
            prompts = [
                {key: row[key] for key in ("answer", "solution")}
                | {"prompt": self.tokenizer.decode(prompt_ids(row["prompt"], self.tokenizer, self.settings))}
                for row in rows
            ]
            return self.finish(
                GRPOTrainer(
                    self.model,
                    reward_funcs=REWARDS["answer"],
                    args=config,
                    train_dataset=datasets.Dataset.from_list(prompts),
                    processing_class=self.tokenizer,
                )
            )

    def common(self) -> dict:
        low = models.compute_dtype(self.settings) == torch.bfloat16
        return dict(
            bf16=low,
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            logging_steps=1,
            save_strategy="no",
            seed=0,
            disable_tqdm=True,
        )

    def finish(self, trainer) -> tuple[float, list[dict]]:
        times = StepTimes()
        trainer.add_callback(times)
        if not trainer.args.activation_checkpointing:
            self.model.get_base_model().activation_checkpointing_disable()  # trainers switch it on and never off
        trainer.train()
        drop_trl_head(self.model.get_base_model())
        return times.seconds, [entry for entry in trainer.state.log_history if "train_runtime" not in entry]


def fused_adamw(model, masks, config):
    """Plain LoRA's optimizer, under the name by which `run_sft` asks for its own."""
    optimizer = torch.optim.AdamW(
        [p for name, p in model.named_parameters() if name in masks],
        lr=config.learning_rate,
        weight_decay=0.0,
        fused=True,
    )
    optimizer.release = lambda: None
    return optimizer


def report(title: str, ratios: list[float], goal: str) -> None:
    print(f"{title}: median {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]} ({goal})", flush=True)


def compare_sft(bench: Bench) -> None:
    rows = bench.system1[: SFT_STEPS * bench.settings.sft.batch_size]
    found = {"default": [], "no checkpointing": [], "masked": []}
    gaps = []
    for _ in range(REPEATS):
        default, losses = bench.trl_sft(rows)
        lean, _ = bench.trl_sft(rows, activation_checkpointing=False)
        ours, history = bench.ours(training.run_sft, rows)
        plain, _ = bench.ours(training.run_sft, rows, optimizer=fused_adamw)
        masked, _ = bench.ours(training.run_sft, rows, share=0.4)
        gaps += [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(history, losses, strict=True)]
        found["default"].append(default / ours)
        found["no checkpointing"].append(lean / ours)
        found["masked"].append(masked / plain)
    report("SFT, TRL's defaults / ours, seconds a step", found["default"], "goal: at least 2")
    report("SFT, TRL without gradient checkpointing / ours", found["no checkpointing"], "goal: at least 2")
    print(f"  losses differ by at most {max(gaps):.2%} of their value")
    report("SFT, 40 % active / all with fused AdamW", found["masked"], "goal: at most 1")


def compare_grpo(bench: Bench) -> None:
    """From a policy that answers in the layout and ends its turn, as stage 2 starts."""
    bench.ours(training.run_sft, bench.system1)
    bench.start = {name: p.detach().clone() for name, p in bench.parameters()}
    default, lean = [], []
    for _ in range(REPEATS):
        stock, theirs = bench.trl_grpo(bench.system2)
        without, _ = bench.trl_grpo(bench.system2, activation_checkpointing=False)
        ours, history = bench.ours(training.run_grpo, bench.system2)
        default.append(stock / ours)
        lean.append(without / ours)
        for name, log in (("TRL", theirs), ("ours", history)):
            means = [
                statistics.mean(e[k] for e in log)
                for k in ("reward", "completions/mean_length", "frac_reward_zero_std")
            ]
            print(
                f"  {name}: reward {means[0]:.2f}, {means[1]:.0f} tokens, {means[2]:.0%} of groups without advantage",
                flush=True,
            )
    report("GRPO, TRL's defaults / ours, seconds a step", default, "goal: at least 2")
    report("GRPO, TRL without gradient checkpointing / ours", lean, "goal: at least 2")


if __name__ == "__main__":
    bench = Bench()
    for compare in (compare_sft, compare_grpo):
        if sys.argv[1:] in ([], [compare.__name__]):
            compare(bench)
