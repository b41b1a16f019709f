"""Cost of exact importance scoring: against one plain pass, and against the one-example loop.

Paired: each repeat times all three on the same batches, in turn; the medians of the ratios are printed.
    make bench
"""

import statistics
import time

import torch

from lorapar_utils import data, models
from lorapar_utils.encoding import encode_examples
from lorapar_utils.importance import _backward, _batches, score_importance
from lorapar_utils.settings import load_profile

EXAMPLES, BATCH, REPEATS = 48, 16, 3


def timed(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    settings = load_profile("cpu")
    base, tokenizer = models.load_base(settings)
    model = models.attach_adapter(base, settings)
    rows = [row for row in data.load_pool(settings) if row["split"] == "train"][:EXAMPLES]
    examples = encode_examples(rows, tokenizer, settings)
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def plain() -> None:
        for batch in _batches(examples, BATCH):
            _backward(model, batch)

    ratios = {"batched / plain pass": [], "one by one / batched": []}
    for _ in range(REPEATS):
        bare = timed(plain)
        batched = timed(lambda: score_importance(model, examples, batch_size=BATCH))
        single = timed(lambda: score_importance(model, examples, batch_size=1))
        ratios["batched / plain pass"].append(batched / bare)
        ratios["one by one / batched"].append(single / batched)
    for name, values in ratios.items():
        print(f"{name}: median {statistics.median(values):.2f} of {[round(v, 2) for v in values]}")
    print(f"{EXAMPLES} examples, batch {BATCH}, {torch.get_num_threads()} threads, {models.compute_dtype(settings)}")


if __name__ == "__main__":
    main()
