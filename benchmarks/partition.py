"""The theta rule on adapters of LLaMA-2-7B's size: time against sorting, memory against the scores, and a row loop.

Paired: each repeat times `build_partition` on both systems, masks included, and two `torch.sort` calls of the same
vectors, in turn. Peak memory is read in a process of its own.
"""

import statistics
import subprocess
import sys

import torch
from measure import peak_bytes, timed

from lorapar_utils.partition import build_partition

SIZES = {"LLaMA-2-7B, QKVGUD, r = 8": 17_891_328, "LLaMA-2-7B, QKVGUD, r = 64": 143_130_624}
REPEATS, THETA, LOOP = 3, 0.9, 1_000_000


def score_pair(count: int) -> list[dict[str, torch.Tensor]]:
    """Two correlated score vectors over many orders of magnitude, in 224 matrices, as importance scores are."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(count, generator=generator)
    pair = []
    for _ in range(2):
        scores = torch.randn(count, generator=generator).add_(common).mul_(2).exp_().mul_(1e-10)
        pair.append({f"m{i}": part for i, part in enumerate(scores.chunk(224))})
    return pair


def row_loop(systems: list[torch.Tensor]) -> None:
    """The straightforward way: a sorted list of rows for each system, walked until theta is reached."""
    for scores in systems:
        rows = sorted(enumerate(scores.tolist()), key=lambda row: -row[1])
        goal, reached, chosen = THETA * sum(score for _, score in rows), 0.0, set()
        for index, score in rows:
            chosen.add(index)
            reached += score
            if reached >= goal:
                break


def peak(count: int) -> None:
    """Print peak memory above what the scores took, in bytes for each byte of scores."""
    pair = score_pair(count)
    print(f"{peak_bytes(lambda: build_partition(*pair, theta=THETA)) / (8 * count):.2f}")


def main() -> None:
    for label, count in SIZES.items():
        pair = score_pair(count)
        flat = [torch.cat(list(scores.values())) for scores in pair]
        ratios = []
        for _ in range(REPEATS):
            ours = timed(lambda pair=pair: build_partition(*pair, theta=THETA))
            sorts = timed(lambda flat=flat: [torch.sort(scores) for scores in flat])
            ratios.append(ours / sorts)
        del pair, flat
        print(
            f"{label}, {count:,} elements: build_partition / two sorts, median of {REPEATS}: "
            f"{statistics.median(ratios):.3f} (goal: at most 0.3)"
        )
        extra = subprocess.run([sys.executable, __file__, str(count)], capture_output=True, text=True, check=True)
        print(f"  extra memory, bytes for each byte of scores: {extra.stdout.strip()} (goal: at most 2)")
    pair = score_pair(LOOP)
    flat = [torch.cat(list(scores.values())) for scores in pair]
    ratios = []
    for _ in range(REPEATS):
        ours = timed(lambda: build_partition(*pair, theta=THETA))
        ratios.append(timed(lambda: row_loop(flat)) / ours)
    print(f"row loop / build_partition at {LOOP:,} elements, median of {REPEATS}: {statistics.median(ratios):.0f}")


if __name__ == "__main__":
    peak(int(sys.argv[1])) if len(sys.argv) > 1 else main()
