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
# - **Paper.** Section 3.4; Tables 2 and 7.
# - **Inputs.** The study's arms after both stages; this run's experiments.
# - **Outputs.** Tables and curves below.
# - **Cost.** None: nothing is trained here.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
import pandas as pd
import torch

from lorapar_utils.data.pool import load_pool
from lorapar_utils.records import own_records, study
from lorapar_utils.report import claims, figures, notebook, tables
from lorapar_utils.settings import load_profile

settings = notebook.start(profile=profile)
published = study()
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.training.rewards import correctness, layout, step_share

# %% [markdown]
# ## The idea
#
# Stage 1 imitates worked System 1 solutions and moves the elements of System 1 only. Stage 2 starts from there, draws its own answers to
# System 2 questions, and is rewarded for right ones; it moves the elements of System 2. All other elements stay as they are, to the bit.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: stage 1 and stage 2."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-04_two_stage"}} tags=["remove-input"]
figure = figures.pipeline("stage1", "stage2")

# %% [markdown]
# ## One step of AdamW that leaves an element alone
#
# Of the active elements $M$ of {eq}`eq-stages`, AdamW keeps running means of the gradient, $m$, and of its square, $v$, both corrected for
# their start at zero. With learning rate $\eta$ and weight decay $\lambda$ it moves
#
# $$\phi_j \leftarrow (1 - \eta \lambda) \phi_j - \eta \frac{m_j}{\sqrt{v_j} + \epsilon} \quad \text{for } j \in M$$ (eq-adamw)
#
# and nothing else. The first step written out. An inactive element has a gradient here too, and it is never written.

# %%
values = torch.linspace(-1, 1, 6)
gradient = torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4, 0.2])
active = torch.tensor([True, True, False, True, False, True])
lr, beta1, beta2, eps, decay = 0.01, 0.9, 0.999, 1e-8, 0.1
m, v = (1 - beta1) * gradient, (1 - beta2) * gradient**2
step = lr * (m / (1 - beta1)) / ((v / (1 - beta2)).sqrt() + eps)
expected = torch.where(active, values * (1 - lr * decay) - step, values)

# %%
options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
elements = torch.nn.Parameter(values.clone())
optimizer = ActiveAdamW([("A", elements)], {"A": active}, **options)
(elements * gradient).sum().backward()
optimizer.step()
after = elements.data
torch.testing.assert_close(after, expected)
untouched = after[~active].numpy().tobytes()
assert untouched == values[~active].numpy().tobytes()  # to the bit
columns = {"active": active, "before": values, "after": after}
notebook.shown(pd.DataFrame(columns).round(3))

# %% [markdown]
# ## The advantage of eight completions
#
# GRPO asks one question eight times. A completion's reward is the sum of three: the right answer, the layout, and the share of right steps. Its
# advantage is the reward less the group's mean, over the group's standard deviation:
#
# $$A_i = \frac{r_i - \operatorname{mean}(r_1, \ldots, r_G)}{\operatorname{std}(r_1, \ldots, r_G) + 10^{-4}}$$ (eq-advantage)
#
# So a group of equal rewards teaches nothing. In training TRL computes it; a test compares TRL's with this one. The policy $\pi$ then makes the tokens $y_t$
# of better completions likelier. With $\rho_t$ the ratio of its probability to that of the policy which wrote them, $c_t$ the same ratio clipped to
# $[1 - \epsilon, 1 + \epsilon]$, and $D_t$ the divergence from the policy that stage 2 starts from, of weight $\kappa$ (`grpo.kl`), the loss of a token is
#
# $$L_t = -\min\left(\rho_t A_i,\ c_t A_i\right) + \kappa D_t$$ (eq-grpo)

# %%
solution = "3 * 4 = 12\n12 + 5 = 17\n#### 17"
completions = [
    solution,
    "#### 17",
    "3 * 4 = 12\n#### 12",
    "17",
    "3 * 4 = 12\n12 + 5 = 18\n#### 18",
    solution,
    "",
    "#### 7",
]

# %%
rewards = torch.tensor(
    [correctness(c, "17") + layout(c) + step_share(c, solution) for c in completions],
)
advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
assert abs(float(advantages.sum())) < 1e-4
assert advantages[0] == advantages[5] == advantages.max()
group = {"completion": completions, "reward": rewards, "advantage": advantages}
notebook.shown(pd.DataFrame(group).round(2))

# %% [markdown]
# ## What stage 2 did
#
# LoRA-PAR of [the study](../book/protocol.md) by step, and what its stage 2 is worth when it trains something else: nothing that both systems share ($\beta = 0$ of {eq}`eq-stages`), or as many
# elements by chance over the whole adapter. LoRA-PAR's stage 2 costs System 1 something in every block, and adds to System 2 on average.
# All three start from the same stage 1, at LoRA-PAR's rates. That stage 1 was trained again for these runs, in part on another machine, so a gain does not start from the
# [chapter on theta](03_theta_ablation.ipynb)'s accuracy. The paper's numbers are of 7B models: compare the direction.

# %% mystnb={"image": {"alt": "Panels for LoRA-PAR by step: SFT loss, GRPO reward, entropy, completion length, share of groups without advantage."}, "figure": {"caption": "LoRA-PAR of the study, seed 0: blue is stage 1, orange stage 2.", "name": "fig-learning"}} tags=["remove-input"]
figure = figures.learning_curves(published["lorapar-seed0"])

# %% tags=["remove-input"]
asked = ("lorapar", "beta_0.0", "random_stage2")
of_stage2 = [record for record in published.values() if record.experiment in asked]
notebook.linked(tables.reinforced_table(of_stage2), of_stage2, settings)

# %% [markdown]
# ## The same questions, stage by stage
#
# A question of each family and system, as the base model answers it and as LoRA-PAR of the study does after each stage, at seed 0. What follows `####` is the
# answer. The base model seldom answers in that layout, and none of its answers counts, even where one is right ([leniently](../book/protocol.md), it does).

# %% tags=["remove-input"]
questions = {row["id"]: f"{row['prompt']}\n(right: {row['answer']})" for row in load_pool(load_profile("study"))}
by_stage = [published[name] for name in ("base-seed0", "lorapar-seed0") if name in published]
notebook.shown(tables.answers_table(by_stage, questions))

# %% [markdown]
# ## Each arm at its own rates
#
# The rate of stage 2, and whether a KL term helps, are chosen for each of four arms on validation, at a seed that no block has. Stage 1 has the rates
# of the chapter on theta. Arms against each other, LoRA among them, are in the [next chapter](05_benchmarks.ipynb).

# %% mystnb={"code_prompt_show": "Show the rates of stage 2 that were tried", "code_prompt_hide": "Hide it", "image": {"alt": "Validation accuracy on both systems against the learning rate of stage 2, a line for each arm, the best value of each circled, hollow diamonds for runs without KL."}, "figure": {"caption": "The rates of stage 2 that were tried, with KL 0.04; circles: the best of each arm; hollow diamonds: the same rate without KL.", "name": "fig-tuning-of-stage2"}} tags=["remove-input", "hide-output"]
figure = figures.tuning_of_stage2(figures.tuned_records(published, "sft", "grpo"))

# %% [markdown]
# ## Which of the paper's statements hold here?
#
# Those that have been run; the [chapter on claims](06_claims.ipynb) has all, and how a verdict comes about.

# %% tags=["remove-input"]
on_stage2 = [claim for claim in claims.load_claims() if claim["paper"] in ("Table 2", "Tables 2 and 4", "Table 7")]
notebook.scoreboard(settings, on_stage2)

# %% [markdown]
# ## This run
#
# Accuracy after each stage; where it has such experiments, Table 2 (alpha and beta) and Table 7 (the order of the stages).

# %% tags=["remove-input"]
own = figures.two_stage_records(own_records(settings))
notebook.linked(tables.stage_table(own), own, settings)

# %% tags=["remove-input"]
notebook.linked(tables.alpha_beta_table(own), own, settings, "")

# %% tags=["remove-input"]
notebook.linked(tables.order_table(own), own, settings, "")

# %% [markdown]
# ## What would change our mind
#
# Stage 2 teaches if System 2 gains, with an interval over blocks above zero, and System 1 loses less. The partition pays if System 2's elements gain more
# than random ones, with an interval above zero.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/experiment.ipynb out.ipynb -p profile smoke -p name lorapar
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
tuned = figures.tuned_records(published, "sft", "grpo")
notebook.sources([*by_stage, *of_stage2, *tuned, *own], settings)
