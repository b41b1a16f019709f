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
# - **Question.** Does importance choose better elements than chance, than another system's importance, than a lower rank?
# - **Paper.** Table 3.
# - **Inputs.** The study's arms after stage 1, all at theta 0.9 so far; this run's experiments on theta.
# - **Outputs.** The tables and figures below.
# - **Cost.** None: nothing is trained here.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
import pandas as pd
import torch

from lorapar_utils.records import own_records, study
from lorapar_utils.report import claims, figures, notebook, tables

settings = notebook.start(profile=profile)
published = study()
from lorapar_utils.partition import build_partition

# %% [markdown]
# ## The idea
#
# A larger theta trains more elements. If importance finds the right ones, a few of them should do most of the work, and a random choice of
# as many should do worse.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: choosing elements, and stage 1."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-03_theta_ablation"}} tags=["remove-input"]
figure = figures.pipeline("theta", "stage1")

# %% [markdown]
# ## The rule
#
# Sort the elements by falling importance, add up, and stop as soon as the sum reaches the share $\theta$ of the total. So the elements of System $k$ are the
# smallest set $S_k$ with
#
# $$\sum_{j \in S_k} I_k(\phi_j) \ge \theta \sum_{j} I_k(\phi_j)$$ (eq-theta)
#
# where $I_k$ is the importance {eq}`eq-importance` on System $k$'s examples. A thousand scores show it, of which theta 0.9 takes about the share that it takes of real ones.

# %%
generator = torch.Generator().manual_seed(0)
system1, system2 = torch.rand(2, 1000, generator=generator).double() ** 3.5


def elements(scores, theta):
    """The fewest elements that hold the share theta of all importance."""
    order = scores.argsort(descending=True, stable=True)
    held = scores[order].cumsum(0)
    count = int((held < theta * held[-1]).sum()) + 1
    selected = torch.zeros(len(scores), dtype=torch.bool)
    selected[order[:count]] = True
    return selected


# %% [markdown]
# Elements that both systems select are shared. Stage 1 trains those of System 1 alone and the share $\alpha$ of the shared ones, stage 2 those of System 2
# alone and the share $\beta$: those that matter most to the system that is trained.
#
# $$\begin{aligned} M_1 &= (S_1 \backslash S_2) \cup {\operatorname{top}}_{\alpha}(S_1 \cap S_2) \\ M_2 &= (S_2 \backslash S_1) \cup {\operatorname{top}}_{\beta}(S_1 \cap S_2) \end{aligned}$$ (eq-stages)
#
# How much the systems overlap is the Jaccard index: the size of $S_1 \cap S_2$ over that of $S_1 \cup S_2$. The package's partition is the same one.

# %%
first, second = elements(system1, 0.9), elements(system2, 0.9)
regions = build_partition({"A": system1}, {"A": system2}, theta=0.9).regions()
assert torch.equal(regions["system1_only"], first & ~second)
assert torch.equal(regions["system2_only"], second & ~first)
assert torch.equal(regions["shared"], first & second)
counts = {t: int(elements(system1, t).sum()) for t in (0.5, 0.7, 0.9, 0.99)}
notebook.shown(pd.DataFrame({"theta": counts.keys(), "elements of 1000": counts.values()}))

# %% [markdown]
# ## What it was worth
#
# In [the study](../book/protocol.md) each arm has its own learning rate, chosen on validation, and trains for the same steps on the same System 1 examples. LoRA-PAR stands beside what could
# explain it: the other system's elements, as many by chance within each matrix or over the whole adapter, and LoRA with fewer or with all elements. Arms that were tuned
# later have blocks of their own, 6 to 10, with LoRA-PAR trained again beside them: compare arms that share blocks.

# %% mystnb={"image": {"alt": "Training loss against the step of stage 1 on a log scale, a line with a band for each arm of the study, all falling side by side."}, "figure": {"caption": "Training loss of every arm of the study: the mean over its blocks, smoothed over eight steps. A band reaches from the lowest to the highest block.", "name": "fig-arm-curves"}} tags=["remove-input"]
figure = figures.arm_curves(published.values())

# %% [markdown]
# On the test split, beside the paper's LLaMA-2-7B on GSM8K: compare the order, not the height.

# %% tags=["remove-input"]
notebook.linked(tables.arms_table(published.values()), published.values(), settings)

# %% [markdown]
# ## Each arm at its own rate
#
# An arm with fewer elements wants a higher rate, so one rate for all would have compared the rates.

# %% mystnb={"code_prompt_show": "Show the rates of stage 1 that were tried", "code_prompt_hide": "Hide it", "image": {"alt": "Validation loss of System 1 against the learning rate of stage 1, a line for each arm, the least value of each circled."}, "figure": {"caption": "The rates that were tried, at a seed that no block has; circles: the least loss of each arm.", "name": "fig-tuning"}} tags=["remove-input", "hide-output"]
figure = figures.tuning(figures.tuned_records(published, "sft"))

# %% [markdown]
# ## Which of the paper's statements hold here?
#
# Those that have been run; the [chapter on claims](06_claims.ipynb) has all, and how a verdict comes about.

# %% tags=["remove-input"]
on_theta = [claim for claim in claims.load_claims() if claim["paper"] in ("Table 3", "central claim")]
notebook.scoreboard(settings, on_theta)

# %% [markdown]
# ## Accuracy by theta
#
# Table 3 varies theta. The study has not done so yet; this run's experiments on theta, beside the paper's numbers:

# %% tags=["remove-input"]
own = figures.stage1_records(own_records(settings))
notebook.linked(tables.theta_table(own), own, settings, "This run has none.")

# %% [markdown]
# ## What would change our mind
#
# Importance buys nothing at this scale if random elements of equal size do as well over several seeds. No difference to them is shown so far. Within each matrix the interval
# lies within a hundredth of a nat; over the whole adapter it does not, so the two are not called equal.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/experiment.ipynb out.ipynb -p profile smoke -p name random_0.9
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
stage1 = [r for r in published.values() if tuple(r.run["parameters"].get("stages", ())) == ("sft",)]
notebook.sources([*stage1, *own], settings)
