"""One process against two, on the real model: scores, both stages, completions; and what a stage takes.

    python benchmarks/processes.py

The phases of the book run twice over SmolLM2-135M in fp32, once as one process with two threads, once as two processes
with one thread under `accelerate launch` (gloo). Goals: scores and adapters equal within rounding, every inactive
element equal to the bit, greedy completions equal. Of sampled ones most are: over 49,152 tokens a rounding decides a
draw in some hundreds, and what GRPO learns from other completions is another adapter, as far as its first steps move.
"""

import shutil

import pandas as pd
import torch
from safetensors.torch import load_file

from lorapar_utils import importance, models
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.pipeline.scores import partition, scores
from lorapar_utils.settings import Settings, load_profile

STAGES = ("stage1", "stage2")


def settings(count: int) -> Settings:
    return load_profile(
        "smoke",
        profile=f"processes-{count}",
        threads=2,
        processes=count,
        model={"dtype": "float32"},
        pool={"system1": {"train": 96, "test": 40}, "system2": {"train": 64, "test": 40}},
        voting={"split_by": "construction"},
        importance={"examples": 32, "batch_size": 16, "stability": []},
        sft={"epochs": 1, "batch_size": 16},
        grpo={"steps": 3, "prompts_per_step": 4, "completions": 8, "micro_batch": 32, "max_completion_length": 32},
        evaluation={"batch_size": 40, "max_new_tokens": 32, "pass_k": 8, "pass_k_prompts": 4},
    )


def ran(count: int) -> dict:
    """What a run by `count` processes ends with."""
    chosen = settings(count)
    shutil.rmtree(chosen.runs, ignore_errors=True)
    record = experiment(chosen, "lorapar", 0)
    both = scores(chosen, Examples(chosen).systems)
    folder = chosen.runs / "experiments" / "lorapar-seed0"
    adapters = {stage: load_file(folder / stage / "adapter" / "adapter_model.safetensors") for stage in STAGES}
    return {
        "scores": both,
        "partition": partition(chosen, both),
        "adapters": adapters,
        "rewards": [
            round(entry["reward"], 4) for entry in record.result["tables"]["history_stage2"] if "reward" in entry
        ],
        "seconds": {stage: record.metric(f"{stage}/train_seconds").value for stage in STAGES},
        "completions": {
            stage: [item["completion"] for item in record.items if item["stage"] == stage] for stage in STAGES
        },
    }


def moved(run: dict, stage: str, start: dict) -> dict:
    """How far each element of the adapter is from where the stage began."""
    return {name: run["adapters"][stage][name] - start[name] for name in start}


def length(distances: dict) -> float:
    return torch.cat([values.flatten() for values in distances.values()]).norm().item()


def inactive_moved(run: dict, stage: str, start: dict) -> int:
    masks = run["partition"].stage_mask(1 + STAGES.index(stage))
    distance = moved(run, stage, start)
    return sum(int((distance[saved_name(name)] != 0)[~mask].sum()) for name, mask in masks.items())


def saved_name(parameter: str) -> str:
    return parameter.replace(".default", "")


def main() -> None:
    one, two = runs = ran(1), ran(2)
    rows = []
    for system in (1, 2):
        pairs = [(one["scores"][system - 1][name], two["scores"][system - 1][name]) for name in one["scores"][0]]
        apart = max(float((a - b).abs().max() / a.max()) for a, b in pairs)
        rows.append({"what": f"scores, System {system}", "apart": f"{apart:.1e}"})
    chosen = settings(1)
    fresh = importance.lora_parameters(models.attach_adapter(models.load_base(chosen)[0], chosen))
    starts = [{saved_name(name): p.detach() for name, p in fresh.items()}] * 2
    for number, stage in enumerate(STAGES, start=1):
        masks = [run["partition"].stage_mask(number) for run in runs]
        same = [a == b for a, b in zip(one["completions"][stage], two["completions"][stage], strict=True)]
        apart = length(moved(two, stage, one["adapters"][stage])) / length(moved(one, stage, starts[0]))
        rows.append(
            {
                "what": f"adapter after {stage}",
                "apart": f"{apart:.1e}",
                "masks differ in": sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0]),
                "inactive changed": sum(
                    inactive_moved(run, stage, start) for run, start in zip(runs, starts, strict=True)
                ),
                "greedy completions equal": f"{sum(same)} of {len(same)}",
                "seconds, two / one": two["seconds"][stage] / one["seconds"][stage],
            }
        )
        starts = [run["adapters"][stage] for run in runs]
    print(
        "apart: scores, at most, as a share of their matrix's largest; adapters, of the distance that the stage moved"
    )
    print(pd.DataFrame(rows).round(2).to_string(index=False, na_rep=""))
    for count, run in enumerate(runs, start=1):
        print(f"rewards of each GRPO step, {count} process(es):", run["rewards"])


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
