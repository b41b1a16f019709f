"""The same numbers as TRL, transformers and lm-eval in less time (skip it at first); it must not import `models`."""
