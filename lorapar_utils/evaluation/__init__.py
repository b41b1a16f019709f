"""Accuracy on the pool, GSM8K, GSM-symbolic, MMLU, HumanEval (paper, section 4); it must not import training, pipeline."""

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
