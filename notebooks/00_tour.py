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
# # A short tour of the lab
#
# - **Question.** What is here, and how do I change an idea and see what happens?
# - **Paper.** Section 3, in small.
# - **Inputs.** Records of this clone's own runs, or the published ones.
# - **Outputs.** None: nothing here is kept.
# - **Cost.** A minute. The first use of the model converts it once (another minute).

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path
examples = 4  # of each system, to score
theta = 0.9

# %% tags=["hide-input"]
from lorapar_utils.records import evidence, published_records
from lorapar_utils.report import figures, notebook, tables

settings = notebook.start(profile=profile)
from lorapar_utils import data, evaluation, models
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.importance import score_importance
from lorapar_utils.partition import build_partition
from lorapar_utils.pipeline.examples import Examples

# %% [markdown]
# ## The idea

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO."}, "figure": {"caption": "Each numbered notebook shows one part of it.", "name": "fig-pipeline-tour"}}
figure = figures.pipeline()

# %% [markdown]
# ## What has been found so far
#
# Every table and figure is made from records: small files with metrics, intervals, and the command that made them. `runs/` holds this
# clone's own, `results/` the published ones.

# %%
records = {record.name: record for record in published_records(settings.profile)} | evidence(settings)
main = [r for r in figures.two_stage_records(records) if r.run["parameters"]["sweep"] in ("baseline", "two_stage")]
notebook.linked(tables.stage_table(main), main, settings)

# %% [markdown]
# ## Ask the model
#
# One question of each system, before any training. Change the questions.

# %%
model, tokenizer = models.load_base(settings)
drawn = Examples(settings)
pool = [row for row in drawn.pool if row["split"] == "train"]
# By how many steps a question was made with; where its source does not tell, by the teachers' votes.
systems = [
    [row for row in pool if data.construction_system(row["steps"]) == k][:examples] or drawn.systems[k][:examples]
    for k in (1, 2)
]
asked = [rows[-1]["prompt"] for rows in systems]
for question, [(answer, _)] in zip(asked, evaluation.generate(model, tokenizer, asked, settings), strict=True):
    print(f"{question}\n  → {answer!r}")

# %% [markdown]
# ## Which elements matter to these few examples?
#
# The adapter is fresh; nothing is trained. Change `examples`, and see the selection settle; the importance notebook shows how far.

# %%
model = models.attach_adapter(model, settings)
scores = [
    score_importance(model, encode_examples(rows, tokenizer, settings), batch_size=settings.importance.batch_size)
    for rows in systems
]

# %% [markdown]
# ## Change theta
#
# This cell takes a second: change `theta`, `alpha` or `beta` and run it again.

# %%
partition = build_partition(*scores, theta=theta, alpha=1.0, beta=1.0)
print(
    f"Jaccard index {partition.jaccard:.2f}; active: "
    + ", ".join(f"{k} {v:.1%}" for k, v in partition.active_share.items())
)
partition.summary().groupby("module")[["system1_only", "system2_only", "shared", "inactive"]].mean().round(3)

# %% [markdown]
# ## Where to go from here
#
# - [Voting](01_voting.ipynb), [importance](02_importance.ipynb), [theta](03_theta_ablation.ipynb), [two stages](04_two_stage.ipynb),
#   [benchmarks](05_benchmarks.ipynb), [claims](06_claims.ipynb): run from top to bottom. A finished phase is read back; one that you
#   interrupt goes on where it stopped.
# - [One training](experiment.ipynb): set `show_rollouts = 4` to read completions and rewards as it learns.
# - Start with `profile = "smoke"`: everything in minutes, numbers that mean nothing.
# - A notebook and its `.py` are one: saving either in JupyterLab writes both.
# - New experiment, model, data, teacher: a file in `profiles/` that names only what it changes.
#
# ## Try it yourself
#
# ```bash
# papermill notebooks/00_tour.ipynb out.ipynb -p profile smoke -p examples 2 -p theta 0.8
# ```
