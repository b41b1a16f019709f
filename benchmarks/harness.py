"""GSM8K and MMLU against `lm-eval`'s own model: the same scores, item by item, in how much of its time.

Real items in the hub's layout are needed; the repeats are paired, and the medians of the ratios are printed.
    python benchmarks/harness.py FOLDER [gsm8k] [mmlu]
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from lm_eval.models.huggingface import HFLM

from lorapar_utils import models
from lorapar_utils.evaluation.benchmarks import score_harness
from lorapar_utils.fast.lm_eval_model import LeanLM
from lorapar_utils.settings import load_profile

REPEATS, BATCH_SIZE = 3, 32


def main(folder: Path, chosen: list[str]) -> None:
    asked = {
        "gsm8k": {"path": str(folder / "gsm8k"), "shots": 2, "items": 100, "max_new_tokens": 128},
        "mmlu": {
            "path": str(folder / "mmlu"),
            "shots": 1,
            "items": 5,
        },  # with five the stock model needs too long for repeats
    }
    exact = load_profile("laptop", model={"dtype": "float32"}, evaluation=asked)
    low = load_profile("laptop", evaluation=asked)
    for name in chosen or asked:
        compare(name, exact, 1)
        if models.compute_dtype(low) == torch.bfloat16:
            compare(name, low, REPEATS)


def compare(name: str, settings, repeats: int) -> None:
    """Agreement and time; in bf16 two orders of summation may choose another token, so only fp32 must agree."""
    model, tokenizer = models.load_base(settings)
    found, ratios = {}, []
    for _ in range(repeats):
        seconds = {}
        for kind in (LeanLM, HFLM):
            lm = kind(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_SIZE)
            start = time.perf_counter()
            found[kind] = score_harness(lm, name, settings)
            seconds[kind] = time.perf_counter() - start
        ratios.append(seconds[LeanLM] / seconds[HFLM])
    pairs = list(zip(found[LeanLM], found[HFLM], strict=True))
    same = sum(a["correct"] == b["correct"] for a, b in pairs)
    alike = sum(a["completion"] == b["completion"] for a, b in pairs)
    right = sum(a["correct"] for a, _ in pairs)
    print(
        f"{name}, {model.dtype}: ours / lm-eval {statistics.median(ratios):.2f} of {[round(r, 2) for r in ratios]} "
        f"(goal: 1, generative 0.5); {same} of {len(pairs)} scores and {alike} completions equal; {right} right",
        flush=True,
    )
    if model.dtype == torch.float32 and same < len(pairs):
        sys.exit(f"{name}: scores differ from lm-eval's")


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("benchmarks/harness.py needs a folder with gsm8k/ and mmlu/ in the hub's layout")
    main(Path(sys.argv[1]), sys.argv[2:])
