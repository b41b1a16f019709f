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
# # 5. Benchmarks: LoRA-PAR beside its baselines
#
# - **Question.** Does LoRA-PAR match or beat full LoRA, by how much, and what does training on one thing cost elsewhere?
# - **Paper.** Tables 4, 5 and 6. Our pool is not GSM8K and our model is not a 7B model: columns stand side by side, they are not the same measurement.
# - **Inputs.** The published experiments, those that score GSM8K, MMLU and HumanEval too; this run's beside them.
# - **Outputs.** The tables and figures below.
# - **Cost.** None: nothing is trained here.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
from lorapar_utils.records import evidence, own_records, pooled
from lorapar_utils.report import figures, notebook, tables

settings = notebook.start(profile=profile)

# %% [markdown]
# ## The idea
#
# LoRA trains every element of the adapter, in the table below on all examples, in the study on the same ones. LoRA-PAR trains fewer, each on what it matters to. Both are asked the same
# questions, and compared question by question.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: everything from the examples to stage 2."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-05_benchmarks"}} tags=["remove-input"]
figure = figures.pipeline("system1", "system2", "importance", "theta", "stage1", "stage2")

# %% tags=["remove-input"]
published, here = evidence(), own_records(settings)
records, own = list(pooled(published).values()), list(here.values())

# %% [markdown]
# ## Table 6: every method on the pool
#
# LoRA and its peers have two epochs of SFT on both systems' worked solutions. LoRA-PAR and the rows with RL have them on System 1 alone, and of
# System 2 prompts and a reward, which reads the solution's lines: they are told less, not nothing. So compare LoRA-PAR with LoRA + RL, the same stages with all elements; the gap to LoRA
# says what the worked solutions of System 2 are worth.

# %% tags=["remove-input"]
notebook.linked(tables.benchmark_table(records, own=own), [*records, *own], settings)

# %% mystnb={"image": {"alt": "Dot plot with error bars of System 1 and System 2 accuracy for every method and stage."}, "figure": {"caption": "Test accuracy of each system after each stage; bars: 95 % over test items. Overlapping intervals are not a ranking.", "name": "fig-stage-accuracy"}} tags=["remove-input"]
figure = figures.stage_accuracy(figures.main_records(pooled(published)), figures.main_records(here))

# %% [markdown]
# ## What accuracy costs
#
# A point on the front has no other that is both cheaper and better. Time is in core-seconds, since runs differ in threads; it and memory are
# of runs at other hours and on like machines: read the order of magnitude.

# %% mystnb={"image": {"alt": "Three panels of accuracy with error bars for every trained method, against active elements, training time and peak memory, with the Pareto front drawn."}, "figure": {"caption": "Accuracy against what it costs; bars: 95 % over test items. Grey line: the front, whose methods no other beats on both. A method whose bar reaches the front's is not behind it.", "name": "fig-pareto"}} tags=["remove-input"]
figure = figures.pareto(records)

# %% [markdown]
# ## Table 4: GSM8K, MMLU and HumanEval
#
# Scored by `lm-eval`'s definitions (GSM8K and MMLU five-shot; HumanEval greedy, its tests in a sandbox), of models that were trained on this
# book's pool: what training on one thing does elsewhere. The paper trains on GSM8K, Dolly-15k and CodeAlpaca, each for its own benchmark.
# A method without a row was not run on it.
#
# ### GSM8K

# %% tags=["remove-input"]
elsewhere = [record for name, record in published.items() if name.startswith("cpu-elsewhere/")]
notebook.linked(tables.benchmark_table(elsewhere, "gsm8k", own), [*elsewhere, *own], settings)

# %% [markdown]
# ### MMLU

# %% tags=["remove-input"]
notebook.linked(tables.benchmark_table(elsewhere, "mmlu", own), [*elsewhere, *own], settings)

# %% [markdown]
# ### HumanEval

# %% tags=["remove-input"]
notebook.linked(tables.benchmark_table(elsewhere, "humaneval", own), [*elsewhere, *own], settings)

# %% [markdown]
# ## Table 5: another architecture
#
# Not run: Qwen-2.5-7B needs a GPU. `profiles/qwen2.5-7b.yaml` is its profile.
#
# ## What would change our mind
#
# LoRA-PAR beside LoRA + RL at the same budget, ahead by more than the interval over several seeds, or level with it at a fraction of the
# elements: then choosing elements buys something. One seed at this scale decides neither.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/05_benchmarks.ipynb out.ipynb -p profile smoke
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
shown = [r for r in (*records, *own) if r.run["parameters"].get("sweep") in ("baseline", "two_stage")]
notebook.sources([*shown, *elsewhere], settings)
