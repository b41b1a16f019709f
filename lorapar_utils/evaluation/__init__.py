"""Accuracy on the pool and on benchmarks (paper, section 4); it must not import training or pipeline."""

from lorapar_utils.evaluation.accuracy import (
    accuracy_metrics,
    benchmark_items,
    benchmark_metrics,
    check_benchmarks,
    evaluate,
    generate,
    pass_at,
    score_greedy,
    score_losses,
    score_pool,
)

__all__ = [
    "accuracy_metrics",
    "benchmark_items",
    "benchmark_metrics",
    "check_benchmarks",
    "evaluate",
    "generate",
    "pass_at",
    "score_greedy",
    "score_losses",
    "score_pool",
]
