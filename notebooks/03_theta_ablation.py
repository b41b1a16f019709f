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
# # 3. Theta: how few elements are enough?
#
# - **Question.** How does accuracy depend on theta, and does importance choose better than chance?
# - **Paper.** Table 3.
# - **Inputs.** Experiments that start with SFT on System 1, and the published ones of the longer profile (`cpu-full` beside `cpu`): more
#   seeds, the full grid.
# - **Outputs.** The table and figure below.
# - **Cost.** None if the experiments are there; else one SFT run for each.

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path

# %% tags=["hide-input"]

from lorapar_utils import claims, notebook, plots, tables
from lorapar_utils.records import evidence

settings = notebook.start(profile=profile)
from lorapar_utils import phases

# %% [markdown]
# ## The idea
#
# A larger theta trains more elements. If importance finds the right ones, a few of them should do most of the work, and a random choice of
# as many should do worse.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: choosing elements, and stage 1."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-03_theta_ablation"}}
figure = plots.pipeline("theta", "stage1")

# %%
chosen = [
    (name, seed)
    for name, seed in settings.experiment_runs()
    if settings.experiments[name].stages[:1] == ("sft",) and settings.experiments[name].sweep in ("theta", "two_stage")
]
own = {record.name: record for record in (phases.experiment(settings, name, seed) for name, seed in chosen)}
records = plots.stage1_records(evidence(settings) | own)
notebook.linked(tables.theta_table(records), records, settings)

# %% mystnb={"image": {"alt": "Test accuracy with error bars against the share of active elements, one line for each way of selecting."}, "figure": {"caption": "At equal size (the same place from left to right), does importance beat the other ways of selecting?", "name": "fig-theta"}}
figure = plots.theta_curve(records) if records else None

# %% [markdown]
# ## How to read it
#
# Compare rows of equal size only. An interval that covers another row's value leaves the two unranked; the claims below compare them item by
# item and seed by seed, which is sharper. Ways of selecting at equal theta are of different size: the curve, not the table, compares those.
#
# ## Which of the paper's statements hold here?

# %%
on_theta = [claim for claim in claims.load_claims() if claim["paper"] == "Table 3"]
notebook.scoreboard(evidence(settings), settings, on_theta)

# %% [markdown]
# ## What would change our mind
#
# Random selection of equal size doing as well over several seeds: then importance buys nothing at this scale.
#
# ## Try it yourself
#
# ```bash
# papermill notebooks/experiment.ipynb out.ipynb -p profile smoke -p name random_0.9
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["hide-input"]
notebook.sources(records, settings) if records else None
