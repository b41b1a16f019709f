"""The frozen base model and its adapter; it must not import voting, training, evaluation or anything above them."""

__all__ = [
    "attach_adapter",
    "check_modules",
    "compute_dtype",
    "load_base",
    "load_config",
    "load_tokenizer",
    "restore_adapter",
    "save_adapter",
]


def __getattr__(name: str):
    """Import torch and transformers at the first use of a model, because a plan of votes needs neither."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lorapar_utils.models import adapters, base

    return getattr(adapters if hasattr(adapters, name) else base, name)
