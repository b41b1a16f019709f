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
# # 4. Two stages: SFT, then GRPO
#
# - **Question.** Does stage 2 add System 2 skill, and does stage 1's System 1 skill survive it?
# - **Paper.** Section 3.4; Tables 2 and 7 ask for more runs than this profile makes.
# - **Inputs.** The two-stage experiments.
# - **Outputs.** Tables and curves below.
# - **Cost.** None if the experiments are there; else one SFT and one GRPO run for each.

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path

# %%
import pandas as pd

from lorapar_utils import notebook, plots, tables

settings = notebook.start(profile=profile)
from lorapar_utils import phases

# %%
chosen = [(name, seed) for name, seed in settings.experiment_runs() if settings.experiments[name].sweep == "two_stage"]
records = [phases.experiment(settings, name, seed) for name, seed in chosen]
base = [
    phases.experiment(settings, name, seed)
    for name, seed in settings.experiment_runs()
    if not settings.experiments[name].stages
]
tables.stage_table([*base, *records])

# %% [markdown]
# ## What stage 2 changed, item by item
#
# The difference of stage 2 and stage 1 over the same test items: paired, with a bootstrap interval and McNemar's exact p.

# %%
pd.DataFrame(
    [
        {
            "experiment": record.run["parameters"]["title"],
            "system": system,
            "gain": tables.percent(gain),
            "p": round(gain["p_value"], 3),
        }
        for record in records
        for system in (1, 2)
        if (gain := record.result["metrics"].get(f"gain/system{system}"))
    ]
)

# %% [markdown]
# ## Learning curves

# %% mystnb={"image": {"alt": "Four panels for LoRA-PAR: SFT loss, GRPO reward, completion length, share of groups without advantage."}, "figure": {"caption": "A group whose completions all earn the same reward has no advantage and teaches nothing.", "name": "fig-learning"}}
figure = plots.learning_curves(records[0])
# %% [markdown]
# ## Room to learn
#
# Sampled pass@1 against pass@k on validation prompts: GRPO needs answers that the model finds sometimes.

# %%
pd.DataFrame(
    [
        {"experiment": record.run["parameters"]["title"], "stage and metric": key, "value": tables.percent(metric)}
        for record in records
        for key, metric in record.result["metrics"].items()
        if "/pass@" in key
    ]
)

# %% [markdown]
# ## The same prompts, stage by stage

# %%
items = pd.DataFrame(
    [{**item, "experiment": r.run["parameters"]["title"]} for r in [*base, *records[:1]] for item in r.items]
)
shown = items[
    items["id"].isin(
        items["id"].drop_duplicates().tolist()[:3] + items[items["system"] == 2]["id"].drop_duplicates().tolist()[:3]
    )
]
shown.pivot_table(index="id", columns="stage", values="completion", aggfunc="first").fillna("–")

# %% [markdown]
# **Try it yourself**
#
# ```bash
# papermill notebooks/experiment.ipynb out.ipynb -p profile smoke -p name lorapar
# ```
