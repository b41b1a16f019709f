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
# - **Question.** Does LoRA-PAR match or beat full LoRA, by how much, and what does it save?
# - **Paper.** Tables 4, 5 and 6. Our pool is not GSM8K and our model is not a 7B model: columns stand side by side, they are not the same measurement.
# - **Inputs.** The study's arms after both stages; this run's experiments.
# - **Outputs.** The tables and figures below.
# - **Cost.** None: nothing is trained here.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path

# %% tags=["remove-input", "remove-stdout"]
from lorapar_utils.records import own_records, study
from lorapar_utils.report import claims, figures, notebook, tables

settings = notebook.start(profile=profile)
published = study()

# %% [markdown]
# ## The idea
#
# LoRA trains every element of the adapter. LoRA-PAR trains fewer, each on what it matters to. Both have the same two stages and the same examples, each at its own learning rates, and both are asked the same
# questions.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: everything from the examples to stage 2."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-05_benchmarks"}} tags=["remove-input"]
figure = figures.pipeline("system1", "system2", "importance", "theta", "stage1", "stage2")

# %% [markdown]
# ## After both stages
#
# Means over blocks. A gain is from the arm's own stage 1, which was trained again for these runs, in part on another machine; so it does not start from the
# [chapter on theta](03_theta_ablation.ipynb)'s accuracy. Each arm has the rates that were best for it on validation; where rates of stage 2 differ, this compares rates too. The paper's numbers are on GSM8K.

# %% mystnb={"image": {"alt": "Dot plot of System 1 and System 2 accuracy of the base model and of each arm after each stage: ticks for the blocks, a marker for their mean, a line for its interval."}, "figure": {"caption": "Test accuracy of each system after each stage. Ticks: blocks; markers: their means, with 95 % over blocks.", "name": "fig-stage-accuracy"}} tags=["remove-input"]
figure = figures.stage_accuracy(figures.main_records(published))

# %% tags=["remove-input"]
both = figures.main_records(published)
notebook.linked(tables.reinforced_table(both), both, settings)

# %% [markdown]
# ## Which of the paper's statements hold here?
#
# Those that have been run; the [chapter on claims](06_claims.ipynb) has all, and how a verdict comes about.

# %% tags=["remove-input"]
of_arms = [claim for claim in claims.load_claims() if claim["paper"] in ("Tables 4 and 5", "Table 4", "Table 5")]
notebook.scoreboard(settings, of_arms)

# %% [markdown]
# ## What it saves
#
# Little: fewer elements mean a smaller optimizer state, which is small beside the base model, and gradients are computed for every element. Page [Use it](../book/use.md) has the bytes, and
# [Beyond one machine](../book/scale.md) what a step takes at 7B on a GPU.
#
# ## GSM8K, MMLU, HumanEval, and another architecture
#
# On SmolLM2-135M these benchmarks leave no room: it is near the floor on GSM8K and HumanEval and at chance on MMLU, before training and after training on another pool
# ([lab log](../book/lab_log.md)). Table 5 needs Qwen-2.5-7B and a GPU; `profiles/qwen2.5-7b.yaml` is its profile.
#
# ### Every method of this run, on every benchmark that it was scored on

# %% tags=["remove-input"]
own = figures.two_stage_records(own_records(settings))
notebook.linked(tables.benchmark_table(own), own, settings)

# %% [markdown]
# ## What would change our mind
#
# LoRA-PAR ahead of LoRA with the same stages, with an interval over blocks above zero; or no worse where LoRA of rank 3, at the same rate of stage 2, is worse: then choosing elements buys something.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/05_benchmarks.ipynb out.ipynb -p profile smoke
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
notebook.sources([*both, *own], settings)
