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
# - **Question.** Can teachers tell System 1 examples (recall, simple inference) from System 2 examples (several chained steps), and do
#   role play and voting help them?
# - **Paper.** Section 3.1 and Table 1.
# - **Inputs.** The training split of the profile's pool; its teachers: local models, OpenAI-compatible servers, or recorded votes.
# - **Outputs.** `runs/<profile>/votes/`, record `voting`; every answer is kept in `runs/vote_cache`.
# - **Cost.** Each example costs a forward pass of each local teacher, or a call to a teacher's server; a dry run counts them before any is made.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path
compute = True  # False: read the published records in the place of computing; no model is loaded
retry = True  # ask again where a call failed the last time

# %% tags=["remove-input", "remove-stdout"]
import numpy as np
import pandas as pd

from lorapar_utils.records import own_records
from lorapar_utils.report import figures, notebook, tables

settings = notebook.start(profile=profile)
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.prepare import record_votes
from lorapar_utils.voting import decide, split

# %% [markdown]
# ## The idea
#
# Some questions are answered at once, others need a chain of steps. Several language models, each in a role, say which an example needs;
# what most of them call fast trains stage 1, what they call slow trains stage 2.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: voting and the two sets of examples."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-01_voting"}} tags=["remove-input"]
figure = figures.pipeline("voting", "system1", "system2")

# %% [markdown]
# ## What will be asked
#
# An answer is kept under teacher, prompt and example, as soon as it comes in, so nothing is asked twice.

# %% tags=["remove-input"]
to_ask = split.voting_plan(settings) if compute else pd.DataFrame()
notebook.shown(to_ask, "Nothing is asked: this page reads the published votes.")

# %% [markdown]
# ## Ask
#
# Every teacher reads question and answer; with role play it is told which model it stands in for. A server's teacher answers in words, and
# only a last line that says *System 1* or *System 2* counts; anything else is an abstention. A local teacher is read by the log-likelihood
# of its two labels, less its mean $\mu_t$ over the pool: with $\ell_k$ the label of System $k$ and $x$ the filled-in question, teacher $t$ has the margin
#
# $$m_t(x) = \log\, p_t(\ell_2 \mid x) - \log\, p_t(\ell_1 \mid x)$$ (eq-margin)
#
# and votes 2 if $m_t(x) > \mu_t$, else 1.
#
# Of $n_1$ votes for System 1 and $n_2$ for System 2 among $T$ teachers, the larger side wins if it reaches the quorum $q$, which is more than half unless
# a profile sets it; the rest is undecided (0) and left out:
#
# $$s(x) = \begin{cases} 1 & n_1 > n_2,\ n_1 \ge q \\ 2 & n_2 > n_1,\ n_2 \ge q \\ 0 & \text{otherwise} \end{cases}$$ (eq-vote)
#
# Four examples and three teachers; a 0 among the votes is an abstention. `agreement` is the larger side's share of the votes that were cast, whether or
# not it reaches the quorum.

# %%
ballots = np.array([[1, 1, 2], [2, 2, 2], [1, 2, 0], [0, 0, 1]])
system, agreement = decide(ballots)
n1, n2 = (ballots == 1).sum(axis=1), (ballots == 2).sum(axis=1)
larger = [(n1 > n2) & (n1 >= 2), (n2 > n1) & (n2 >= 2)]
assert system.tolist() == np.select(larger, [1, 2], 0).tolist()
decided = {"system": system, "agreement": agreement.round(2)}
notebook.shown(pd.DataFrame({"votes": ballots.tolist()} | decided))

# %% [markdown]
# ### Eight of the examples
#
# Under each teacher's name its vote: 1, 2, or 0 for an abstention. `system` is what the majority makes of them.

# %% tags=["remove-input"]
record = record_votes(settings, Examples(settings), retry=retry) if compute else notebook.published(settings, "voting")
few = pd.DataFrame(record.items[:8])
notebook.shown(
    few[["prompt", "answer", "steps"]].join(pd.DataFrame(few["votes"].tolist())).assign(system=few["system"])
)

# %% [markdown]
# ## Are they right?
#
# The pool is made by generators, so the number of reasoning steps of each example is known. An area under the curve (AUC) of one half
# means that a teacher's leaning carries no information about the steps; the panel's leaning is the sum of its margins.

# %% mystnb={"image": {"alt": "Line and bar chart of the share of examples voted System 2 for each number of reasoning steps, by teacher and for the majority."}, "figure": {"caption": "A teacher that sees the steps rises from left to right. Bars: the majority of the panel.", "name": "fig-votes-by-steps"}} tags=["remove-input"]
figure = figures.votes_by_steps(record)

# %% tags=["remove-input"]
notebook.shown(tables.teacher_table(record))

# %% [markdown]
# ## Does voting help?
#
# Not beyond its best teacher, where the others are weaker: the majority of the published votes is right less often than the best of its three teachers.
# Kappa and alpha are 0 for votes cast at random and 1 for unanimity. Intervals are bootstrapped over examples.

# %% tags=["remove-input"]
notebook.shown(tables.agreement_table(record))

# %% mystnb={"code_prompt_show": "Show how often each teacher and each panel is right", "code_prompt_hide": "Hide it", "image": {"alt": "Dot plot of agreement with the construction labels, one row a teacher and a panel, with intervals."}, "figure": {"caption": "Single teachers (circles) and panels (squares) against the construction labels. Voting helps where the teachers are right more often than not, and err on different examples.", "name": "fig-split-accuracy"}} tags=["remove-input", "hide-output"]
figure = figures.split_accuracy(record)

# %% [markdown]
# ## Does a better split train a better model?
#
# The paper's Table 1 says so: from a random split to a vote of five teachers in their roles, accuracy on GSM8K grows by less than two points. The study asks it as a dose: labels by construction,
# and the same with a share of them flipped, with the votes on that axis ([protocol](../book/protocol.md)). It has not been run.
#
# ### Splits of this run

# %% tags=["remove-input"]
own = [r for r in own_records(settings).values() if r.run["parameters"].get("sweep") == "voting"]
notebook.linked(tables.voting_table(own), own, settings)

# %% [markdown]
# ## What would change our mind
#
# A stronger teacher. The paper votes with reasoning models that are hundreds to thousands of times larger. Where a small teacher's AUC stays near one
# half, its split is close to a random one, and everything downstream inherits that.
#
# ## Try it yourself
#
# What a profile's teachers would cost, and voting alone.
#
# ```bash
# .venv/bin/python -m lorapar_utils.voting.split laptop --dry-run
# .venv/bin/papermill notebooks/01_voting.ipynb out.ipynb -p profile smoke
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
notebook.sources([record, *own], settings)
