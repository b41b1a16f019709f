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
# # 2. Importance: where do fast and slow thinking sit?
#
# - **Question.** Which LoRA elements matter to System 1, to System 2, to both, to neither?
# - **Paper.** Sections 3.2 and 3.3, the importance figure.
# - **Inputs.** Votes.
# - **Outputs.** `runs/<profile>/scores/`, records `importance` and, where asked for, `stability`.
# - **Cost.** About one training pass over the scored examples.

# %% tags=["parameters"]
profile = "cpu"  # a file of profiles/, or a path
seed = None  # None: the profile's
theta = None
alpha = None
beta = None
modules = None  # QKV, GUD or QKVGUD

# %% tags=["hide-input"]
import pandas as pd
import torch

from lorapar_utils.records import published_records
from lorapar_utils.report import explorer, figures, notebook

settings = notebook.start(profile=profile, seed=seed, theta=theta, alpha=alpha, beta=beta, modules=modules)
from lorapar_utils import importance, models
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.partition import build_partition
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.prepare import record_scores
from lorapar_utils.pipeline.scores import scores

# %% [markdown]
# ## The idea
#
# An element of the adapter matters to a system if the loss on its examples would change were the element zero. An estimate from the
# gradients of single examples scores every element in one pass. The fewest that hold the share theta of a system's total are its own; those
# that both systems choose are shared.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: scoring and choosing elements."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-02_importance"}}
figure = figures.pipeline("importance", "theta")

# %% [markdown]
# ## Score
#
# With gⱼ the mean and Fⱼⱼ the mean square of the per-example gradients of element φⱼ:
#
# > **I(φⱼ) = | gⱼ φⱼ − ½ Fⱼⱼ φⱼ² |**
#
# Squares of *per-example* gradients: the square of a batch's gradient is a different number.
#
# ### The formula on two examples
#
# Plain PyTorch: one backward pass for each example, then the mean of the gradients and of their squares.

# %%
base, tokenizer = models.load_base(settings)
model = models.attach_adapter(base, settings).eval()  # without dropout
examples = Examples(settings)
two = encode_examples(examples.systems[2][:8], tokenizer, settings)[:2]

# %%
phi = importance.lora_parameters(model)
g = {name: torch.zeros_like(p) for name, p in phi.items()}
F = {name: torch.zeros_like(p) for name, p in phi.items()}
for example in two:
    ids = torch.tensor([example["input_ids"]], device=model.device)
    labels = torch.tensor([example["labels"]], device=model.device)
    loss = model(input_ids=ids, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(phi.values()))
    for name, gradient in zip(phi, gradients, strict=True):
        g[name] += gradient / len(two)
        F[name] += gradient**2 / len(two)
I = {}  # noqa: E741
for name, p in phi.items():
    I[name] = (g[name] * p - F[name] * p**2 / 2).abs().detach()

# %% [markdown]
# The package scores whole batches in one pass, without keeping any example's gradient. It has to come to the same numbers; in bf16, to the
# same up to that format's rounding.

# %%
batched = importance.score_importance(model, two, batch_size=2)
fast = torch.cat([batched[name].flatten() for name in phi])
plain = torch.cat([I[name].flatten() for name in phi])
difference = float((fast - plain).norm() / plain.norm())
assert difference < (1e-4 if base.dtype == torch.float32 else 0.1)
print(f"relative difference over {len(plain):,} elements: {difference:.1e}")
del base, model, phi, g, F, I, batched, fast, plain

# %% [markdown]
# ### All examples

# %%
system1, system2 = scores(settings, examples.systems)
partition = build_partition(system1, system2, **settings.partition.model_dump())
# Records of other settings than the profile's are kept apart from those that the book is made of.
is_profile = all(value is None for value in (seed, theta, alpha, beta, modules))
record, *stable = record_scores(settings, examples, "records" if is_profile else "explored")

# %%
partition.summary().groupby(["module", "matrix"])[
    ["system1_only", "system2_only", "shared", "inactive", "stage1", "stage2"]
].mean().round(3)

# %% [markdown]
# ## Layer by layer
#
# Scores are divided by their mean over all elements, so a value of one is average.

# %% mystnb={"image": {"alt": "Three heat maps of layer against module: System 1 importance, System 2 importance, and their difference."}, "figure": {"caption": "Where importance concentrates; the third panel shows where the systems part.", "name": "fig-importance-map"}}
figure = figures.importance_map(record)

# %% mystnb={"image": {"alt": "Bars of mean importance by module for matrix A and matrix B, System 1 beside System 2."}, "figure": {"caption": "A above B or B above A: which of a layer's two factors the importance sits in. The dashed line is the average element.", "name": "fig-importance-matrix"}}
figure = figures.importance_by_matrix(record)

# %% mystnb={"image": {"alt": "Lines of mean importance against rank for matrices A and B, one line a system."}, "figure": {"caption": "Under a random initialisation the ranks are exchangeable, so the lines should be flat; olora and pissa order them.", "name": "fig-importance-rank"}}
figure = figures.importance_by_rank(record)

# %% [markdown]
# ## Two systems, four regions

# %% mystnb={"image": {"alt": "Scatter of System 1 against System 2 importance of LoRA elements, coloured by region."}, "figure": {"caption": "Elements near the diagonal serve both systems. Compare the Jaccard index with what chance gives.", "name": "fig-importance-scatter"}}
figure = figures.importance_scatter(record)
# %% mystnb={"image": {"alt": "Curves of the share of importance held by the most important share of elements, one for each system."}, "figure": {"caption": "The steeper the curve, the fewer elements a given theta needs.", "name": "fig-concentration"}}
figure = figures.concentration(record)

# %% [markdown]
# ## Move theta, alpha and beta
#
# The same partition at other settings, from counts in the record. alpha is the share of the shared region that stage 1 trains, beta that of
# stage 2. The map shows one of three shares of each layer's module.

# %%
explorer.Page(
    explorer.theta_explorer(record),
    figures.importance_map(record),
    "Heat maps of layer against module: importance to System 1, to System 2, and their difference.",
)

# %% [markdown]
# ## How many examples are enough?
#
# Two disjoint samples of n examples are scored under one adapter, three times over. If they disagree, the selected elements are a matter of
# which examples were drawn. Crosses: the same examples under adapters of two seeds, where element j of the one has nothing to do with
# element j of the other; only the matrices can agree. Two samples of one system are also the yardstick for the two systems: their Jaccard
# index above says that they differ only as far as it lies below that of one system with itself. Run by the `cpu-full` profile; its
# published record is shown where this run has none of its own.

# %% mystnb={"image": {"alt": "Three panels against the number of scored examples, by system: rank correlation of elements, of matrix means, and Jaccard index, for two samples of examples and for two adapters."}, "figure": {"caption": "The curves level off where more examples stop changing the selection. Where the crosses lie far below the lines, importance hangs on the draw of the adapter.", "name": "fig-stability"}}
stable = stable or [record for record in published_records("cpu-full") if record.name == "stability"]
steady = pd.DataFrame(stable[0].result["tables"]["stability"] if stable else [])
figure = figures.stability(steady) if len(steady) else print("No stability record yet.")

# %%
agreements = ["rank_correlation", "by_matrix", "jaccard"]
steady.groupby(["differ", "n", "system"])[agreements].mean().round(3).unstack() if len(steady) else None

# %% [markdown]
# ## What would change our mind
#
# If the Jaccard index equalled its chance value, the two systems would choose independently; if it were one, there would be no two
# systems to tell apart.
#
# ## Try it yourself
#
# ```bash
# papermill notebooks/02_importance.ipynb out.ipynb -p profile smoke -p theta 0.8
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["hide-input"]
# What was explored here is kept apart from the records, in `explored`.
behind = [r for r in (record, *stable) if is_profile or r.run["profile"] != settings.profile]
notebook.sources(behind, settings)
