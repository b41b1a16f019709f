"""TRL's GRPO trainer with our completions, and without gradients that are zero."""

from collections.abc import Callable

import torch
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from lorapar_utils.fast.completions import complete, uniform


class PromptedGRPOTrainer(GRPOTrainer):
    """TRL's trainer with prompts as token ids, so that they are those of every other phase.

    Parameters
    ----------
    read_prompt
        Maps a prompt to token ids.
    """

    def __init__(self, *arguments, read_prompt: Callable[[str], list[int]], **others):
        self._read_prompt = read_prompt
        super().__init__(*arguments, **others)

    def _tokenize_prompts(self, prompts):
        return [self._read_prompt(prompt) for prompt in prompts], None, {}


class LeanGRPOTrainer(PromptedGRPOTrainer):
    """The same with the same result for less work.

    A prompt is read once for all completions, and a finished completion leaves the batch. A completion whose advantage
    is zero has a zero gradient, so it is scored (for the entropy) but not differentiated. Rollouts and training use
    the same dtypes.

    Parameters
    ----------
    rows_at_once
        Completions that this process generates in one batch, in whole groups. The samples do not depend on it.
    """

    def __init__(self, *arguments, rows_at_once: int, **others):
        self._rows_at_once = rows_at_once
        super().__init__(*arguments, **others)

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
