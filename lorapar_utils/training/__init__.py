"""Stage 1 (SFT) and stage 2 (GRPO) over TRL's trainers (paper, 3.4); it must not import voting, evaluation, records."""

__all__ = ["check_references", "prompts_to_reinforce", "run_grpo", "run_sft"]


def __getattr__(name: str):
    """Import TRL at the first use of a trainer, because the pages need only `rewards`, and TRL takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lorapar_utils.training import stages

    return getattr(stages, name)
