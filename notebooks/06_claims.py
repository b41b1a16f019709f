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

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
from lorapar_utils.records import study
from lorapar_utils.report import figures, notebook

settings = notebook.start(profile=profile)

# %% [markdown]
# ## The idea
#
# A claim becomes a comparison with a margin, written down in `book/claims.yaml` before anything is run, as [the protocol](../book/protocol.md) says. Records decide
# it, block by block; nobody reads a table and judges.

# %% mystnb={"image": {"alt": "One row per claim that was run: the effect with its interval over blocks, thick, and over test questions, thin, beside zero."}, "figure": {"caption": "What has been run so far. Thick: 95 % over blocks, which the verdict rests on; thin: over test questions; dotted: a margin that is not zero; grey band: the protocol's \u00b10.01 nats. Green: reproduced; orange: not reproduced; grey: undecided.", "name": "fig-forest"}} tags=["remove-input"]
figure = figures.forest(study())

# %% [markdown]
# ## How a verdict comes about
#
# A block is a seed: all of its arms come from one commit, one dtype and one kind of machine, and are compared with each other alone. The effect is the
# mean over blocks of the paired difference; its interval is Student's over blocks, and fewer than five blocks decide nothing.
#
# *Reproduced*: the effect lies beyond the margin, significantly after Holm's correction over the comparisons of one table, where one that has not been run
# counts with p = 1. So an effect whose interval leaves out zero can be inconclusive. *Not reproduced*: it lies on the other side. *Inconclusive*: neither,
# or too few blocks. *Could not fail*: a model without two systems passes too. *No headroom*: the base model is at chance or at the floor. *Not run*: no
# record yet, or not planned, with the reason beside it. A verdict rests on the study's published records alone; where this run has the claim's experiments, its own effect stands beside it.
# Claims keep the words in which they were committed: LoRA of rank 3, "with as many" elements, has a tenth fewer than LoRA-PAR at theta 0.9.

# %% [markdown]
# ## Claim by claim

# %% tags=["remove-input"]
notebook.scoreboard(settings)

# %% mystnb={"code_prompt_show": "Show those that have not been run", "code_prompt_hide": "Hide it"} tags=["remove-input", "hide-output"]
notebook.scoreboard(settings, run=False)

# %% [markdown]
# ## What would change our mind
#
# More blocks where a verdict is inconclusive, and a larger model where it is *not reproduced*: a claim about 7B models is not refuted by a small
# one. The evidence column links to the records; a record names the command that makes it again.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/06_claims.ipynb out.ipynb -p profile smoke
# ```
