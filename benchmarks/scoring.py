"""Cost of exact importance scoring: against one plain pass, and against the one-example loop.

Paired: each repeat times all of them on the same batches, in turn; the medians of the ratios are printed. A plain pass
is the forward and backward of the same batches with the adapter's gradients. Peak memory is read in a process of its
own for each.
    make bench
"""

import statistics
import subprocess
import sys

import numpy as np
import torch
from measure import peak_bytes, timed
from scipy.stats import spearmanr

from lorapar_utils import data, importance, models
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.importance import _batches, _summed_loss, score_importance
from lorapar_utils.settings import load_profile

EXAMPLES, BATCH, REPEATS, LOOP = 200, 16, 3, 24


def prepared(dtype: str = "auto"):
    settings = load_profile("laptop", model={"dtype": dtype})
    base, tokenizer = models.load_base(settings)
    model = models.attach_adapter(base, settings)
    rows = spread([row for row in data.load_pool(settings) if row["split"] == "train"], EXAMPLES)
    return settings, model, encode_examples(rows, tokenizer, settings)


def spread(rows: list, count: int) -> list:
    """`count` rows from all over the list: the pool is in order of system and length."""
    return [rows[i * len(rows) // count] for i in range(count)]


def plain_pass(model, examples) -> None:
    parameters = list(importance.lora_parameters(model).values())
    for parameter in parameters:
        parameter.requires_grad_(True)
    for batch in _batches(examples, BATCH):
        _summed_loss(model, batch)[0].backward()
        for parameter in parameters:
            parameter.grad = None


def score(model, examples, batch_size=BATCH) -> None:
    score_importance(model, examples, batch_size=batch_size)


def ranked(dtype: str) -> np.ndarray:
    """Scores of every element under a base in `dtype`."""
    _, model, examples = prepared(dtype)
    scores = score_importance(model, spread(examples, LOOP), batch_size=BATCH)
    return torch.cat([values.flatten() for values in scores.values()]).numpy()


def peak(which: str) -> None:
    """Print the peak resident memory of one way, in MB above what the model takes."""
    _, model, examples = prepared()
    way = plain_pass if which == "plain" else score
    print(peak_bytes(lambda: way(model, examples)) / 1e6)


def main() -> None:
    settings, model, examples = prepared()
    score(model, examples[:BATCH])
    plain_pass(model, examples[:BATCH])
    cost, loop = [], []
    for _ in range(REPEATS):
        bare = timed(lambda: plain_pass(model, examples))
        batched = timed(lambda: score(model, examples))
        single = timed(lambda: score(model, spread(examples, LOOP), batch_size=1))
        cost.append(batched / bare)
        loop.append(single / LOOP / (batched / EXAMPLES))
    for name, values in (
        ("scoring / plain pass (goal: at most 1.15)", cost),
        ("one by one / batched, seconds an example", loop),
    ):
        print(f"{name}: median {statistics.median(values):.3f} of {[round(v, 3) for v in values]}", flush=True)
    found = {
        which: [
            round(float(subprocess.run([sys.executable, __file__, which], stdout=-1, text=True, check=True).stdout))
            for _ in range(REPEATS)
        ]
        for which in ("plain", "score")
    }
    ratio = statistics.median(found["score"]) / statistics.median(found["plain"])
    print(f"peak memory above the model, scoring / plain pass: {ratio:.2f} of {found} MB (goal: at most 1.25)")
    low, high = (ranked(dtype) for dtype in ("bfloat16", "float32"))
    correlation = spearmanr(low, high).statistic
    print(f"rank correlation of bf16 and fp32 scores: {correlation:.4f} ({len(low):,} elements, {LOOP} examples)")
    print(f"{EXAMPLES} examples, batch {BATCH}, {torch.get_num_threads()} threads, {models.compute_dtype(settings)}")


if __name__ == "__main__":
    peak(sys.argv[1]) if len(sys.argv) > 1 else main()
