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
# # Experiment: one training configuration
#
# - **Question.** What does one configuration learn? Sweeps fan out over this notebook.
# - **Paper.** Section 3.4.
# - **Inputs.** Votes and importance scores.
# - **Outputs.** `runs/<profile>/experiments/<name>-seed<k>/` (adapters), record `<name>-seed<k>`.
# - **Cost.** Minutes on two cores for SFT; GRPO takes most of it.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path
compute = True  # False: read the published records in the place of computing; no model is loaded
name = "lorapar"  # one of the experiments of the profile
seed = 0
show_rollouts = 0  # completions to print at each GRPO step, with their rewards
show_curves = True  # loss, reward and validation accuracy while it trains

# %% tags=["remove-input", "remove-stdout"]
import pandas as pd

from lorapar_utils.data import load_pool
from lorapar_utils.report import figures, notebook, tables

settings = notebook.start(profile=profile, show_rollouts=show_rollouts, show_curves=show_curves)
from lorapar_utils.pipeline.experiment import experiment

# %% [markdown]
# ## The idea
#
# One line of the profile's experiments: a method, its stages, a seed. All that came before, votes and scores, is read back.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: stage 1 and stage 2."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-experiment"}} tags=["remove-input"]
figure = figures.pipeline("stage1", "stage2")

# %% tags=["remove-input"]
own_values = settings.experiments[name].model_dump(exclude_none=True)
described = own_values | settings.for_experiment(name, seed).partition.model_dump()
described["stages"] = ", then ".join(described["stages"]) or "none"
notebook.shown(pd.DataFrame({"setting": described.keys(), name: map(str, described.values())}))

# %% [markdown]
# ## Train and score
#
# Stages that an earlier, interrupted run finished are read back; one that it had begun goes on from its last checkpoint. So the stop button is
# safe: run the cell again to go on. The bar says how much time is left.

# %% tags=["remove-stdout"]
record = experiment(settings, name, seed) if compute else notebook.published(settings, f"{name}-seed{seed}")

# %% tags=["remove-input"]
notebook.linked(tables.stage_table([record]), [record], settings)

# %% [markdown]
# ## Learning curves

# %% mystnb={"image": {"alt": "Six panels by step: SFT loss, GRPO reward, entropy, completion length, share of groups without advantage, validation accuracy of each system."}, "figure": {"caption": "What was logged, step by step: blue, stage 1; orange, stage 2. What this experiment does not have has no panel.", "name": "fig-experiment-curves"}} tags=["remove-input"]
figure = figures.learning_curves(record)
# %% [markdown]
# ## The same questions after each stage
#
# One of each task.

# %% tags=["remove-input"]
# A record of another profile has other questions.
pool = load_pool(settings) if record.run["profile"] == settings.profile else []
notebook.shown(tables.answers_table([record], {row["id"]: row["prompt"] for row in pool}))

# %% [markdown]
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/experiment.ipynb out.ipynb -p profile smoke -p name random_0.9 -p seed 1
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
notebook.sources([record], settings)
