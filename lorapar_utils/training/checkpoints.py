"""Checkpoints of a stage: written whole or not at all, checked before a stage goes on from one."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainerCallback

from lorapar_utils import distributed
from lorapar_utils.cache import hash_now, write_atomically
from lorapar_utils.errors import InputError
from lorapar_utils.settings import Settings

# A file that marks a complete checkpoint. It holds the hash of each file of the checkpoint.
FINISHED = "finished"


@contextmanager
def checkpointing(folder: Path | None, settings: Settings) -> Iterator[dict]:
    """Trainer options for checkpoints in `folder`. Without a folder the trainer gets a temporary one."""
    if folder is None:
        with tempfile.TemporaryDirectory() as scratch:
            yield {"output_dir": scratch, "save_strategy": "no"}
        return
    with distributed.state().main_process_first():
        folder.mkdir(parents=True, exist_ok=True)
        for unfinished in set(folder.glob("checkpoint-*")) - set(finished_checkpoints(folder)):
            shutil.rmtree(unfinished)
        for checkpoint in finished_checkpoints(folder):
            if damage := _damage(checkpoint):
                print(f"{checkpoint} is damaged ({damage}) and deleted; training goes on from before it")
                shutil.rmtree(checkpoint)
    # Keep two checkpoints. The trainer deletes the older one before our 'finished' mark is on the newer one.
    options = {"save_strategy": "steps", "save_steps": settings.checkpoint_every, "save_total_limit": 2}
    yield {"output_dir": str(folder), **options}


def finished_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted((mark.parent for mark in folder.glob(f"checkpoint-*/{FINISHED}")), key=lambda p: int(p.name[11:]))


def _damage(checkpoint: Path) -> str | None:
    """The first file of a checkpoint that has changed since the checkpoint was finished, or None."""
    try:
        hashes = json.loads((checkpoint / FINISHED).read_text(encoding="utf-8"))
        changed = [name for name, digest in hashes.items() if not _has_hash(checkpoint / name, digest)]
    except (ValueError, AttributeError, OSError):
        changed = [FINISHED]
    return changed[0] if changed else None


def _has_hash(path: Path, digest: str) -> bool:
    try:
        return hash_now(path) == digest
    except OSError:
        return False


def check_processes(checkpoint: Path) -> None:
    """Require the same number of processes as before, because each process has a saved random state."""
    before, now = max(1, len(list(checkpoint.glob("rng_state_*.pth")))), distributed.state().num_processes
    if before != now:
        raise InputError(
            f"processes = {now}: {checkpoint} was written by {before}; set processes to {before} to go on from it, "
            f"or delete {checkpoint.parent} to train this stage from its start"
        )


class MarkFinished(TrainerCallback):
    """Marks complete checkpoints. A trainer killed while saving leaves an incomplete checkpoint without a mark."""

    def on_save(self, args, state, control, **kwargs):
        distributed.state().wait_for_everyone()  # each process writes a random state
        if state.is_world_process_zero:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file()]
            hashes = {str(path.relative_to(checkpoint)): hash_now(path) for path in files}
            write_atomically(checkpoint / FINISHED, json.dumps(hashes))
