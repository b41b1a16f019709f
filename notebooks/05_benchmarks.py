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
# - **Question.** Does LoRA-PAR match or beat full LoRA?
# - **Paper.** Tables 4 and 6. Our pool is not GSM8K and our model is not a 7B model: columns stand side by side, they are not the same measurement.
# - **Inputs.** All experiments.
# - **Outputs.** The table and figure below.
# - **Cost.** None if the experiments are there.

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path

# %%
from lorapar_utils import notebook, plots, tables

settings = notebook.start(profile=profile)
from lorapar_utils import phases

# %%
wanted = [
    (name, seed)
    for name, seed in settings.experiment_runs()
    if settings.experiments[name].sweep in ("baseline", "two_stage")
]
records = [phases.experiment(settings, name, seed) for name, seed in wanted]
tables.benchmark_table(records)

# %% mystnb={"image": {"alt": "Dot plot with error bars of System 1 and System 2 accuracy for every method and stage."}, "figure": {"caption": "Overlapping intervals are not a ranking.", "name": "fig-stage-accuracy"}}
figure = plots.stage_accuracy(records)

# %% [markdown]
# ## Not run
#
# GSM8K, MMLU and HumanEval need a GPU profile and their data. PiSSA, OLoRA, DoRA, the prompt methods, IA3 and SHiRA are in the `cpu-full`
# profile. What was not run reads "not measured" rather than a guess.
#
# **Try it yourself**
#
# ```bash
# papermill notebooks/05_benchmarks.ipynb out.ipynb -p profile smoke
# ```
