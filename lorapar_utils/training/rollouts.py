"""Completions for GRPO, handed to TRL's trainer as its `rollout_func`: prompts are read as in every other phase."""

from collections.abc import Callable, Sequence

from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from lorapar_utils.fast.completions import complete, uniform

Rollouts = Callable[[Sequence[str], GRPOTrainer], dict]


def by_the_policy(read_prompt: Callable[[str], list[int]], rows_at_once: int) -> Rollouts:
    """Completions sampled by the model that is trained.

    Parameters
    ----------
    read_prompt
        Maps a prompt to token ids.
    rows_at_once
        Completions that this process generates in one batch, in whole groups. The samples do not depend on it.
    """

    def roll_out(prompts: Sequence[str], trainer: GRPOTrainer) -> dict:
        prompt_ids = [read_prompt(prompt) for prompt in prompts]
        # Every process draws the numbers of all rows, so that samples do not depend on the number of processes.
        rows, width = len(prompt_ids), trainer.max_completion_length
        world, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        draws = uniform(world * rows, width, trainer.args.seed, trainer.state.global_step)[rank * rows :][:rows]
        groups = list(dict.fromkeys(map(tuple, prompt_ids)))
        samples = rows // len(groups)
        if [prompt for prompt in groups for _ in range(samples)] != list(map(tuple, prompt_ids)):
            groups, samples = prompt_ids, 1
        completions, size = [], max(1, rows_at_once // samples)
        with unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
            generation_kwargs=trainer.generation_kwargs,
            gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
        ) as model:
            for first in range(0, len(groups), size):
                completions += complete(
                    model,
                    groups[first : first + size],
                    ends=trainer.eos_token_ids,
                    max_new_tokens=width,
                    samples=samples,
                    temperature=trainer.temperature,
                    draws=draws[first * samples :],
                )
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": None}

    return roll_out


def by_vllm(read_prompt: Callable[[str], list[int]]) -> Rollouts:
    """Completions sampled by vLLM, with their log-probabilities, for which TRL corrects."""

    def roll_out(prompts: Sequence[str], trainer: GRPOTrainer) -> dict:
        prompt_ids = [read_prompt(prompt) for prompt in prompts]
        _, completions, logprobs, _ = trainer.vllm_generation.generate(
            prompts=prompt_ids, images=None, num_generations=trainer.num_generations
        )
        # Of the most likely tokens that vLLM returns, the first is the sampled one.
        sampled = [[token[0] for token in sequence] for sequence in logprobs]
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": sampled}

    return roll_out
