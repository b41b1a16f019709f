# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Use it: LoRA-PAR in your own training script
#
# - **Question.** How do I train with LoRA-PAR in a script of my own?
# - **Paper.** Section 3, in 24 lines over TRL. The page *Use it* of the book says what each part is for, what it costs, and when not to use it.
# - **Inputs.** A model, and two JSONL files with rows of prompt, completion and answer.
# - **Outputs.** `runs/use/adapter`, in PEFT's format.
# - **Cost.** Two minutes on a CPU as it stands.

# %% tags=["parameters"]
base = None  # a model's folder or hub id; None: the packaged SmolLM2-135M
data = None  # {"fast": "fast.jsonl", "slow": "slow.jsonl"}: rows of prompt, completion, answer; None: a few of the book's own
out = "runs/use"  # checkpoints and adapter
sft = {"max_steps": 4, "per_device_train_batch_size": 8, "use_cpu": True, "report_to": "none"}  # for TRL's SFTConfig
grpo = sft | {"num_generations": 8, "max_completion_length": 32}  # for its GRPOConfig

# %%
from pathlib import Path

from lorapar_utils.data import load_pool
from lorapar_utils.models.files import packaged_model
from lorapar_utils.settings import load_profile

folder = Path(out).resolve()
folder.mkdir(parents=True, exist_ok=True)
base = base or str(packaged_model())
if data is None:
    pool = load_pool(load_profile("laptop")).rename_column("solution", "completion")
    data = {"fast": str(folder / "fast.jsonl"), "slow": str(folder / "slow.jsonl")}
    for system, file in enumerate(data.values(), start=1):
        rows = pool.filter(lambda row, k: (row["split"], row["construction"]) == ("train", k), fn_kwargs={"k": system})
        rows.select(range(24)).select_columns(["prompt", "completion", "answer"]).to_json(file)

# %% [markdown]
# The reward of stage 2 is yours too: one number for each completion. Columns of the data come as keywords.


# %%
def right(completions, answer, **_):
    return [float(a in completion) for completion, a in zip(completions, answer, strict=True)]


# %% [markdown]
# ## The script
#
# The adapter first. PEFT starts with B = 0, and then every score would be 0; so both matrices are drawn anew.

# %% tags=["script"]
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from lorapar_utils.importance import lora_parameters, score_importance
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.partition import build_partition

rows = load_dataset("json", data_files=data)
tokenizer = AutoTokenizer.from_pretrained(base)
lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
for matrix in lora_parameters(model).values():
    matrix.data.normal_(std=0.01)

# %% [markdown]
# Which elements matter to the fast examples, which to the slow ones?


# %% tags=["script"]
def tokens(row):
    texts = row["prompt"], row["prompt"] + row["completion"] + tokenizer.eos_token
    prompt, whole = tokenizer(list(texts)).input_ids
    return {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


scores = [score_importance(model, [*map(tokens, rows[name])], batch_size=8) for name in ("fast", "slow")]
partition = build_partition(*scores, theta=0.9)

# %%
start = {name: matrix.detach().clone() for name, matrix in lora_parameters(model).items()}
partition.summary()[["system1_only", "system2_only", "shared", "inactive"]].mean().round(3)

# %% [markdown]
# Two stages. Each has its own `ActiveAdamW`, which never writes an element outside its mask.


# %% tags=["script"]
def optimizer(stage):
    return ActiveAdamW(lora_parameters(model).items(), partition.stage_mask(stage), lr=1e-3), None


SFTTrainer(model, SFTConfig(f"{out}/1", **sft), train_dataset=rows["fast"], optimizers=optimizer(1)).train()
GRPOTrainer(model, right, GRPOConfig(f"{out}/2", **grpo), train_dataset=rows["slow"], optimizers=optimizer(2)).train()
model.save_pretrained(f"{out}/adapter")

# %% [markdown]
# ## What has moved
#
# An element that neither stage trains has kept every bit.

# %%
trained = {name: mask | partition.stage_mask(2)[name] for name, mask in partition.stage_mask(1).items()}
moved = {name: (matrix != start[name]).cpu() for name, matrix in lora_parameters(model).items()}
outside = sum(int((moved[name] & ~mask).sum()) for name, mask in trained.items())
assert outside == 0
print(f"{sum(int(m.sum()) for m in moved.values()):,} elements have moved, {outside} of them outside the masks")
