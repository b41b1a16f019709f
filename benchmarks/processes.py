"""One process against two, on the real model: scores, both stages, completions; and what a stage takes.

    python benchmarks/processes.py

The phases of the book run twice over SmolLM2-135M in fp32, once as one process with two threads, once as two processes
with one thread under `accelerate launch` (gloo). Goals: scores and adapters equal within rounding, every inactive
element equal to the bit, greedy completions equal. Sampled ones are equal until a rounding decides a draw.
"""

import shutil

import pandas as pd
import torch
from safetensors.torch import load_file

from lorapar_utils import models, phases
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
    record = phases.experiment(chosen, "lorapar", 0)
    folder = chosen.runs / "experiments" / "lorapar-seed0"
    adapters = {stage: load_file(folder / stage / "adapter" / "adapter_model.safetensors") for stage in STAGES}
    return {
        "scores": phases.scores(chosen),
        "partition": phases.partition(chosen),
        "adapters": adapters,
        "seconds": {stage: record.metric(f"{stage}/train_seconds")["value"] for stage in STAGES},
        "completions": {
            stage: [item["completion"] for item in record.items if item["stage"] == stage] for stage in STAGES
        },
    }


def moved(run: dict, stage: str, start: dict) -> dict:
    """How far each element of the adapter is from where the stage began."""
    return {name: (run["adapters"][stage][name] - start[name]).abs() for name in start}


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
        gap = max(float((a - b).abs().max() / a.max()) for a, b in pairs)
        rows.append({"what": f"scores, System {system}", "largest gap": gap})
    chosen = settings(1)
    fresh = models.lora_parameters(models.attach_adapter(models.load_base(chosen)[0], chosen))
    starts = [{saved_name(name): p.detach() for name, p in fresh.items()}] * 2
    for number, stage in enumerate(STAGES, start=1):
        masks = [run["partition"].stage_mask(number) for run in runs]
        same = [a == b for a, b in zip(one["completions"][stage], two["completions"][stage], strict=True)]
        farthest = max(float(distance.max()) for distance in moved(one, stage, starts[0]).values())
        gap = max(float(values.max()) for values in moved(two, stage, one["adapters"][stage]).values())
        rows.append(
            {
                "what": f"adapter after {stage}",
                "largest gap": gap / farthest,
                "masks differ in": sum(int((masks[0][name] != masks[1][name]).sum()) for name in masks[0]),
                "inactive changed": sum(
                    inactive_moved(run, stage, start) for run, start in zip(runs, starts, strict=True)
                ),
                "greedy completions equal": f"{sum(same)} of {len(same)}",
                "seconds, two / one": two["seconds"][stage] / one["seconds"][stage],
            }
        )
        starts = [run["adapters"][stage] for run in runs]
    print("gaps: of scores, as a share of the matrix's largest; of adapters, of the farthest that an element moved")
    print(pd.DataFrame(rows).round(6).to_string(index=False, na_rep=""))


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
