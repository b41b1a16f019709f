"""Questions with verifiable answers, and how they become tokens; it imports no room."""

from lorapar_utils.data.gsm_symbolic import gsm_symbolic
from lorapar_utils.data.pool import (
    COLUMNS,
    HUB,
    HUB_CONFIG,
    BadRow,
    construction_system,
    from_gsm8k,
    learnt_from,
    load_pool,
    read_tables,
    text_of,
)

__all__ = [
    "COLUMNS",
    "HUB",
    "HUB_CONFIG",
    "BadRow",
    "construction_system",
    "from_gsm8k",
    "gsm_symbolic",
    "learnt_from",
    "load_pool",
    "read_tables",
    "text_of",
]
