"""What `test_two_processes` launches: a phase on the tiny model; each process writes what it ends with."""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from conftest import make_tiny_examples, make_tiny_model, make_tiny_policy, make_tiny_tokenizer
from safetensors.torch import save_file
from tiny_training import settings, train

from lorapar_utils import distributed, evaluation
from lorapar_utils.importance import score_importance
from lorapar_utils.models.adapters import decoder_layers


def shared_out(model, wanted):
    if wanted:
        distributed.share_out(model, decoder_layers(model.get_base_model()))
        whole = [p.numel() for layer in model.get_base_model().model.layers for p in layer.parameters()]
        held = [p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters()]
        assert sum(held) < sum(p.numel() for p in model.parameters()) - sum(whole) / 5
    return model


def scores(sharded: bool) -> dict[str, torch.Tensor]:
    return score_importance(shared_out(make_tiny_model(), sharded), make_tiny_examples(), batch_size=2)


def trained(stage: str, sharded: bool) -> dict[str, torch.Tensor]:
    model, _, _ = train(stage, model=shared_out(make_tiny_policy(), sharded))
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def completions(samples: int, sharded: bool = False) -> list:
    model = shared_out(make_tiny_policy().eval(), sharded)
    prompts = ["1 + 2", "2 + 2", "3 + 1", "1", "2 + 3", "1 + 1 + 1", "3"]
    chosen = settings().changed(evaluation={"batch_size": 4 if samples else 2, "max_new_tokens": 9})
    return evaluation.generate(model, make_tiny_tokenizer(), prompts, chosen, samples=samples)


def main(folder: str) -> None:
    state = PartialState(cpu=True)
    for base in ("whole", "sharded"):
        mine, sharded = Path(folder) / base / str(state.process_index), base == "sharded"
        mine.mkdir(parents=True)
        save_file(scores(sharded), mine / "scores")
        for stage in ("sft", "grpo"):
            save_file(trained(stage, sharded), mine / stage)
        (mine / "completions").write_text(json.dumps([completions(samples, sharded) for samples in (0, 3)]))
    state.wait_for_everyone()
    distributed.end(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
