"""What part of this machine's matrix rate votes, scoring and training steps reach.

The best time is the arithmetic of the weights, over the tokens that have to be read at least (what sequences share,
once), at the rate of a product of the model's own width. Rate and work are measured in turn; medians are printed.
    make bench
    python benchmarks/shares.py float32    # as on a machine without bf16 instructions
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from training import SFT_STEPS, Bench

from lorapar_utils import training
from lorapar_utils.data.encoding import encode_examples, prompt_ids, question_ids
from lorapar_utils.fast.label_scores import margins_in_batches
from lorapar_utils.importance import score_importance
from lorapar_utils.voting.teachers import teacher_prompt

REPEATS, VOTES, SCORED = 3, 64, 32
# Passes over the weights: a forward pass, and a backward one to the activations (frozen weights have no gradient).
READ, LEARN = 1, 2


class Weights:
    """Arithmetic of a model's weights: inside the layers for every token, of the head for tokens whose logits count."""

    def __init__(self, model: torch.nn.Module):
        base = model.get_base_model()
        head = base.get_output_embeddings().weight
        self.head = head.numel()
        self.inside = sum(
            p.numel()
            for n, p in base.named_parameters()
            if "lora_" not in n and "embed" not in n and "lm_head" not in n
        )
        self.width, self.dtype = head.shape[1], head.dtype

    def operations(self, tokens: int, logits: int, passes: int) -> float:
        return 2.0 * passes * (self.inside * tokens + self.head * logits)

    def rate(self) -> float:
        """Operations a second of a product of the model's width, the best of a few."""
        rows, matrix = (
            torch.randn(1024, self.width).to(self.dtype),
            torch.randn(4 * self.width, self.width).to(self.dtype),
        )
        best = min(timed(lambda: torch.nn.functional.linear(rows, matrix)) for _ in range(20))
        return 2.0 * rows.shape[0] * matrix.numel() / best


def timed(run: Callable) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def distinct(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens to read where every common beginning is read once: the nodes of the sequences' prefix tree."""
    nodes = {tuple(sequence[:end]) for sequence in map(tuple, sequences) for end in range(1, len(sequence) + 1)}
    return len(nodes)


def share_of_votes(bench: Bench, weights: Weights) -> float:
    """One local teacher's votes on some questions."""
    settings, rows = bench.settings, bench.system1[: VOTES // 2] + bench.system2[: VOTES // 2]
    section = settings.voting.teachers[0]
    texts = [teacher_prompt(section, row, settings) for row in rows]
    prompts = [question_ids(t, bench.tokenizer, plain_template=settings.model.plain_template) for t in texts]
    asked = (
        bench.model,
        bench.tokenizer,
        texts,
        section.labels,
        settings.model.plain_template,
        settings.voting.batch_size,
    )
    with bench.model.disable_adapter():
        seconds = timed(lambda: list(margins_in_batches(*asked)))
    return weights.operations(distinct(prompts), len(prompts), READ) / weights.rate() / seconds


def share_of_scoring(bench: Bench, weights: Weights) -> float:
    """A shared beginning is read once, but every example has its own gradient there."""
    size = bench.settings.importance.batch_size
    examples = encode_examples(
        bench.system1[: SCORED // 2] + bench.system2[: SCORED // 2], bench.tokenizer, bench.settings
    )
    seconds = timed(lambda: score_importance(bench.model, examples, batch_size=size))
    read, logits = learnt(examples, size)
    tokens = sum(len(example["input_ids"]) for example in examples)
    work = weights.operations(read, logits, READ) + weights.operations(tokens, logits, READ)
    return work / weights.rate() / seconds


def learnt(examples: list[dict], size: int) -> tuple[int, int]:
    """Tokens to read in batches of a size, and tokens whose logits count."""
    batches = [examples[start : start + size] for start in range(0, len(examples), size)]
    read = sum(distinct([example["input_ids"] for example in batch]) for batch in batches)
    return read, sum(label != -100 for example in examples for label in example["labels"])


def share_of_sft(bench: Bench, weights: Weights) -> float:
    size = bench.settings.sft.batch_size
    rows = bench.system1[: SFT_STEPS * size]
    seconds, _ = bench.ours(training.run_sft, rows, share=0.4)
    read, logits = learnt(encode_examples(rows, bench.tokenizer, bench.settings), size)
    return weights.operations(read / SFT_STEPS, logits / SFT_STEPS, LEARN) / weights.rate() / seconds


def share_of_grpo(bench: Bench, weights: Weights) -> float:
    """Completions are written token by token, then read once more to learn from, with their prompts."""
    grpo = bench.settings.grpo
    seconds, history = bench.ours(training.run_grpo, bench.system2, share=0.4)
    prompts = [
        prompt_ids(row["prompt"], bench.tokenizer, bench.settings) for row in bench.system2[: grpo.prompts_per_step]
    ]
    written = grpo.rows * statistics.mean(entry["completions/mean_length"] for entry in history)
    work = weights.operations(distinct(prompts) + written, written, READ)
    work += weights.operations(distinct(prompts) + written, written, LEARN)
    return work / weights.rate() / seconds


def main() -> None:
    bench = Bench(*sys.argv[1:])
    weights = Weights(bench.model)
    measured = [
        ("votes", 0.6, share_of_votes),
        ("scoring", 0.6, share_of_scoring),
        ("an SFT step", 0.6, share_of_sft),
        ("a GRPO step", 0.5, share_of_grpo),
    ]
    # From a policy that ends its answers, as stage 2 starts.
    bench.ours(training.run_sft, bench.system1)
    bench.start = {name: p.detach().clone() for name, p in bench.parameters()}
    for name, goal, share_of in measured:
        shares = [share_of(bench, weights) for _ in range(REPEATS)]
        listed = ", ".join(f"{share:.0%}" for share in shares)
        print(f"{name}: {statistics.median(shares):.0%} of the matrix rate ({listed}; goal: {goal:.0%})", flush=True)
    print(f"{weights.rate() / 1e9:.0f} GFLOP/s in {weights.dtype}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
