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
# # 7. Your run beside the published one
#
# - **Question.** Does this machine come to the same votes, importance, answers and accuracies as the machine that made the published records?
# - **Paper.** None: this is about this book.
# - **Inputs.** This run's records, the published records of the same profile, the published adapters.
# - **Outputs.** The comparisons below.
# - **Cost.** None here: `make book` asks the published adapters again.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
from IPython.display import Markdown

from lorapar_utils.records import own_records, published_records
from lorapar_utils.report import agreement, notebook, tables

settings = notebook.start(profile=profile)

# %% [markdown]
# ## The idea
#
# Votes and scores are arithmetic without chance: on the same kind of machine they are equal, on another they differ by rounding. Answers
# follow a greedy path, so rounding can turn a word; in bf16 it also depends on the questions that share a batch, and here fewer are asked
# than when the adapters were published. Training adds up such differences; it can only be compared with the spread of several seeds.

# %% [markdown]
# ## The verdicts
#
# A difference is put down to the machines where dtype, instruction sets, GPU or versions differ. Where they are known and equal, it is
# flagged.

# %% tags=["remove-input"]
own = own_records(settings)
published = published_records(settings.profile)
why = f"no record of profile `{settings.profile}` is published" if own else "`make book` trains, and fills this page"
verdicts = agreement.verdicts(settings)
notebook.shown(verdicts) if len(verdicts) else Markdown(f"There is nothing to compare: {why}.")

# %% tags=["remove-input"]
alone = {} if published else own
notebook.linked(tables.stage_table(alone.values()), alone.values(), settings, "")

# %% [markdown]
# ## Votes, teacher by teacher

# %% tags=["remove-input"]
notebook.shown(agreement.votes(own.get("voting"), published.get("voting")), "Nothing to compare.")

# %% [markdown]
# ## Importance, system by system
#
# The rank correlation is over the mean scores of all matrices. The Jaccard index is of the selected elements, one by one, where the
# profile has published its partition.

# %% tags=["remove-input"]
by_system = agreement.importance(own.get("importance"), published.get("importance"), own.get("again"))
notebook.shown(by_system.round(4), "Nothing to compare.")

# %% [markdown]
# ## The published adapters, asked again
#
# *Same*: questions that are right or wrong as they were when published. *Identical*: the completions are equal, letter by letter.

# %% tags=["remove-input"]
notebook.shown(agreement.adapters(own.get("again")), "Nothing to compare.")

# %% [markdown]
# ## Training, inside the spread of the published seeds?
#
# *One more seed* is the range in which another seed of the published machine would lie, 19 times in 20.

# %% tags=["remove-input"]
notebook.shown(agreement.training(own.values(), published.values()), "Nothing to compare.")

# %% [markdown]
# ## What would change our mind
#
# A verdict that reads *differs, and should not*: then something that the records do not know changes the numbers.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/07_your_run.ipynb out.ipynb -p profile smoke
# ```

# %% [markdown]
# ## The records behind this page
#
# What this run is held against, and its own. Hovering tells commit and date.

# %% tags=["remove-input"]
notebook.sources([*own.values(), *published.values()], settings)
