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
# # 1. Voting: which questions need slow thinking?
#
# - **Question.** Can teachers tell System 1 examples (recall, simple inference) from System 2 examples (several chained steps)?
# - **Paper.** Section 3.1 and Table 1.
# - **Inputs.** The example pool of the profile.
# - **Outputs.** `runs/<profile>/votes/`, record `voting`.
# - **Cost.** One forward pass a teacher and training example.

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path

# %%

from lorapar_utils import notebook, plots, summaries, tables
from lorapar_utils.records import write_record

settings = notebook.start(profile=profile)
from lorapar_utils import phases

# %% [markdown]
# ## Ask
#
# Every teacher plays the role of the target model, reads question and answer, and leans to one of two labels. Its leaning is the
# difference of the labels' log-likelihoods, less the teacher's mean over the pool. Answers are cached: a second run asks nothing twice.

# %%
voted = phases.votes(settings)
record = summaries.voting_record(voted, settings)
path = write_record(record, settings.runs / "records" / "voting.json")
voted.select_columns(["prompt", "answer", "steps", "votes", "system"]).to_pandas().head(8)

# %% [markdown]
# ## Do the teachers agree, and are they right?
#
# The pool is made by generators, so the number of reasoning steps of each example is known. An area under the curve (AUC) of one half
# means that a teacher's leaning carries no information about the steps.

# %%
import pandas as pd

pd.DataFrame(
    [
        {
            "teacher": name,
            "agrees with construction": tables.percent(record.result["metrics"].get(f"accuracy/{name}")),
            "AUC": record.result["metrics"].get(f"auc/{name}", {}).get("value"),
        }
        for name in [*(teacher.name for teacher in settings.voting.teachers), "majority"]
    ]
).round(2).fillna("–")

# %% mystnb={"image": {"alt": "Bar chart of the share of examples voted System 2 for each number of reasoning steps."}, "figure": {"caption": "If teachers see the difference, the bars rise with the number of steps.", "name": "fig-votes-by-steps"}}
figure = plots.votes_by_steps(record)
# %% [markdown]
# ## Where they differ
#
# A row counts examples by construction and by vote; System 0 is undecided and left out of both sets.

# %%
pd.DataFrame(record.result["tables"]["confusion"]).pivot(index="construction", columns="votes", values="examples")

# %%
pd.DataFrame(record.result["tables"]["disputed"])

# %% [markdown]
# ## What would change our mind
#
# A stronger teacher. The paper votes with reasoning models that are thousands of times larger. Where a small teacher's AUC stays near one
# half, its split is close to a random one, and everything downstream inherits that.
#
# **Try it yourself**
#
# ```bash
# papermill notebooks/01_voting.ipynb out.ipynb -p profile smoke
# ```
