"""What `test_two_processes` launches: one stage of training on the tiny model, its weights written by each process."""

import sys
from pathlib import Path

from accelerate import PartialState
from safetensors.torch import save_file
from test_training import train


def main(stage: str, folder: str) -> None:
    state = PartialState(cpu=True)
    model, _, _ = train(stage)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    save_file(weights, Path(folder) / f"{stage}-{state.process_index}-of-{state.num_processes}.safetensors")
    # Left open, the group's threads may still hold tensors when the interpreter ends, which then aborts.
    state.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
