"""Numbers with n, interval and provenance, as files; it must not import training, evaluation, pipeline or report."""

from lorapar_utils.records.blocks import blocks, check_block
from lorapar_utils.records.evidence import (
    common_seeds,
    mean_outcomes,
    own_records,
    published_records,
    published_votes,
    score_after,
    study,
)
from lorapar_utils.records.links import cite, cite_tuning, is_tuning, linked_dots, linked_text, record_link
from lorapar_utils.records.record import (
    Record,
    claim_runs,
    command,
    new_record,
    read_record,
    read_records,
    write_record,
)

__all__ = [
    "Record",
    "blocks",
    "check_block",
    "cite",
    "cite_tuning",
    "claim_runs",
    "command",
    "common_seeds",
    "is_tuning",
    "linked_dots",
    "linked_text",
    "mean_outcomes",
    "new_record",
    "own_records",
    "published_records",
    "published_votes",
    "read_record",
    "read_records",
    "record_link",
    "score_after",
    "study",
    "write_record",
]
