"""The frozen base model and its adapter; it must not import voting, training, evaluation or anything above them."""

from lorapar_utils.models.base import (
    attach_adapter,
    check_modules,
    compute_dtype,
    load_base,
    load_config,
    load_tokenizer,
    restore_adapter,
    save_adapter,
    share_out,
)

__all__ = [
    "attach_adapter",
    "check_modules",
    "compute_dtype",
    "load_base",
    "load_config",
    "load_tokenizer",
    "restore_adapter",
    "save_adapter",
    "share_out",
]
