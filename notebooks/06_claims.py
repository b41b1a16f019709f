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
# # 6. Claims: what replicates, what does not
#
# - **Question.** Which of the paper's claims hold at this scale?
# - **Paper.** All tables.
# - **Inputs.** The published records, and `book/claims.yaml`: claims, comparisons and margins, written down before the run.
# - **Outputs.** The scoreboard.
# - **Cost.** Seconds.

# %% tags=["parameters"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["hide-input"]
from lorapar_utils.report import notebook

settings = notebook.start(profile=profile)

# %% [markdown]
# ## The idea
#
# A claim becomes a comparison with a margin, written down in `book/claims.yaml` before anything is run. Records decide it, item by item; nobody
# reads a table and judges.

# %%
notebook.scoreboard(settings)

# %% [markdown]
# ## How a verdict comes about
#
# *Reproduced*: the interval of the paired difference lies beyond the declared margin, or the figure inside the declared range.
# *Not reproduced*: it lies on the other side. *Inconclusive*: the interval covers the margin, or there are too few items.
# *Not run*: no published record has such an experiment. A verdict rests on published records alone; the effect in this run stands beside it.
#
# ## What would change our mind
#
# More seeds where a verdict is inconclusive, and a larger model where it is *not reproduced*: a claim about 7B models is not refuted by a small
# one. The evidence column links to the records; a record names the command that makes it again.
#
# ## Try it yourself
#
# ```bash
# papermill notebooks/06_claims.ipynb out.ipynb -p profile smoke
# ```
