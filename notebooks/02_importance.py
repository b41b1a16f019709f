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

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path
compute = True  # False: read the published records in the place of computing; no model is loaded
seed = None  # None: the profile's
theta = None
alpha = None
beta = None
modules = None  # QKV, GUD or QKVGUD

# %% tags=["remove-input", "remove-stdout"]
import pandas as pd
import torch

from lorapar_utils.records import study
from lorapar_utils.report import explorer, figures, notebook

changed = {"seed": seed, "theta": theta, "alpha": alpha, "beta": beta, "modules": modules}
settings = notebook.start(profile=profile, **changed)
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar_utils import importance, models
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.pipeline.prepare import record_scores

# %% [markdown]
# ## The idea
#
# An element of the adapter matters to a system if the loss on its examples would change were the element zero. An estimate from the
# gradients of single examples scores every element in one pass. The fewest that hold the share theta of a system's total are its own; those
# that both systems choose are shared.

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO. Filled: scoring and choosing elements."}, "figure": {"caption": "The whole method; this page is about the filled boxes.", "name": "fig-pipeline-02_importance"}} tags=["remove-input"]
figure = figures.pipeline("importance", "theta")

# %% [markdown]
# ## Score
#
# Of an element $\phi_j$ of the adapter, take the gradients of the losses $L_1, \ldots, L_N$ of a system's examples. Their mean is $g_j$, their mean
# square $F_{jj}$:
#
# $$g_j = \frac{1}{N} \sum_{i=1}^{N} \frac{\partial L_i}{\partial \phi_j}, \qquad F_{jj} = \frac{1}{N} \sum_{i=1}^{N} {\left( \frac{\partial L_i}{\partial \phi_j} \right)}^2$$ (eq-gradients)
#
# The importance of the element is how much the loss would change were it zero, to second order:
#
# $$I(\phi_j) = \left| g_j \phi_j - \tfrac{1}{2} F_{jj} \phi_j^2 \right|$$ (eq-importance)
#
# Squares of *per-example* gradients: the square of a batch's gradient is a different number.
#
# ### The formula on two examples
#
# A LLaMA of two layers with random weights, and two examples of random tokens: small enough to see all of it. Plain PyTorch: one backward
# pass for each example, then the mean of the gradients and of their squares.

# %%
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
)
base = LlamaForCausalLM(config).requires_grad_(False)
all_modules = settings.changed(adapter={"modules": "QKVGUD"})
model = models.attach_adapter(base, all_modules).eval()  # without dropout
questions, answers = torch.randint(100, (2, 12)).tolist(), torch.randint(100, (2, 6)).tolist()
two = [
    {"input_ids": question + answer, "labels": [-100] * len(question) + answer}
    for question, answer in zip(questions, answers, strict=True)
]

# %%
phi = importance.lora_parameters(model)
g = {name: torch.zeros_like(p) for name, p in phi.items()}
F = {name: torch.zeros_like(p) for name, p in phi.items()}
for example in two:
    ids = torch.tensor([example["input_ids"]])
    labels = torch.tensor([example["labels"]])
    loss = model(input_ids=ids, labels=labels).loss
    gradients = torch.autograd.grad(loss, list(phi.values()))
    for name, gradient in zip(phi, gradients, strict=True):
        g[name] += gradient / len(two)
        F[name] += gradient**2 / len(two)
score = {}
for name, p in phi.items():
    score[name] = (g[name] * p - F[name] * p**2 / 2).abs().detach()

# %% [markdown]
# The package scores whole batches in one pass, without keeping any example's gradient. It has to come to the same numbers.

# %%
batched = importance.score_importance(model, two, batch_size=2)
fast = torch.cat([batched[name].flatten() for name in phi])
plain = torch.cat([score[name].flatten() for name in phi])
difference = float((fast - plain).norm() / plain.norm())
assert difference < 1e-5
print(f"relative difference over {len(plain):,} elements: {difference:.1g}")

# %% [markdown]
# ### The partition, matrix by matrix
#
# Shares of a matrix's elements in each region, and of those that each stage trains: means over the layers.

# %% tags=["remove-input"]
published = study()["importance"]
explored = {name: value for name, value in changed.items() if value is not None}
if compute:
    record, *_ = record_scores(settings, Examples(settings), explored)
else:
    record = published
records = [published, record] if compute else [published]

# %% tags=["remove-input"]
shares = pd.DataFrame(record.result["tables"]["map"])
regions = ["system1_only", "system2_only", "shared", "inactive", "stage1", "stage2"]
means = shares.groupby(["module", "matrix"], sort=False)[regions].mean().round(3)
words = figures.REGION_LABELS | {"stage1": "active in stage 1", "stage2": "active in stage 2"}
notebook.shown(means.rename(columns=words))

# %% [markdown]
# ## Layer by layer
#
# Scores are divided by their mean over all elements, so a value of one is average.

# %% mystnb={"image": {"alt": "Three heat maps of layer against module: System 1 importance, System 2 importance, and their difference."}, "figure": {"caption": "Mean importance by layer and module, and the difference of the two systems.", "name": "fig-importance-map"}} tags=["remove-input"]
figure = figures.importance_map(*records)

# %% [markdown]
# ## Two systems, four regions

# %% mystnb={"image": {"alt": "One panel for each module with a bar for each layer: blue, elements of System 1 alone; green, of both; orange, of System 2 alone; grey, of neither."}, "figure": {"caption": "The partition. Each bar is a layer's elements of one module: blue and green are what System 1 selects, green and orange what System 2 does.", "name": "fig-partition"}} tags=["remove-input"]
figure = figures.partition_map(*records)

# %% [markdown]
# ## What would these figures be without two systems?
#
# Let the two systems share the initial values $\phi$, draw their gradients independently, and keep only how the mean score differs from matrix to
# matrix. Nothing then tells the systems apart element by element. The score $|g \phi|$ alone makes theta 0.9 select nearly half of the elements, and makes
# the two sets overlap by nearly half: an element with a large $|\phi|$ is important to both. The paper's shares and overlaps
# lie near what this model gives, some below it and one above, so they are no evidence of two systems. What it does not give is our overlap, at small theta
# above all: the most important elements are common to both systems. The line is the study's record.

# %% mystnb={"image": {"alt": "Two panels against theta: the share of elements that a system selects, and the overlap of both sets; a grey band for a model without two systems, a line for this record, crosses for the paper."}, "figure": {"caption": "The share of elements and the overlap of the two sets, beside a model in which nothing tells the systems apart. The band spans three distributions of gradients.", "name": "fig-without-systems"}} tags=["remove-input"]
figure = figures.without_systems(published)

# %% [markdown]
# ## Move theta, alpha and beta
#
# The same partition at other settings, from counts in the record; beside it, a model without two systems and what the study found at that theta. alpha is the share of the shared region that stage 1 trains, beta that of
# stage 2. The map shows one of three shares of each layer's module.

# %% tags=["remove-input"]
explorer.Page(
    explorer.theta_explorer(record, study().values()),
    figures.importance_map(record),
    "Heat maps of layer against module: importance to System 1, to System 2, and their difference.",
)

# %% [markdown]
# ## How many examples are enough?
#
# For single elements, more than the hundred that the public script scores: two samples of a hundred examples of one system still select different sets, and
# agree the better the larger they are. Means of matrices agree from ten examples on.
#
# Two samples of one system are also a yardstick for the two systems, whose sets differ only as far as their Jaccard index lies below that of one system with itself.
# In the study it does, at as many examples. So scores do tell the systems apart; whether training on the difference pays is another question.

# %% mystnb={"code_prompt_show": "Show how steady the scores are", "code_prompt_hide": "Hide it", "image": {"alt": "Three panels against the number of scored examples, by system: rank correlation of elements, of matrix means, and Jaccard index, for two samples of examples and for two adapters."}, "figure": {"caption": "Two disjoint samples of n examples, scored under one adapter, three times over: a curve levels off where more examples stop changing the selection. Crosses: the same examples under adapters of two seeds, where element j of the one has nothing to do with element j of the other, so only the matrices can agree.", "name": "fig-stability"}} tags=["remove-input", "hide-output"]
stable = study()["stability"]
steady = pd.DataFrame(stable.result["tables"]["stability"])
figure = figures.stability(steady)

# %% [markdown]
# ## What would change our mind
#
# A Jaccard index far below that of the model without two systems would mean that each system has elements of its own. The study's lies above that model's and below
# that of one system with itself: the systems do differ, and by less than independent gradients would make them. Whether it
# matters whose elements are trained is a question to training: [what the blocks found](../book/findings.md).
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/02_importance.ipynb out.ipynb -p profile smoke -p theta 0.8
# ```

# %% [markdown]
# ## The records behind this page
#
# Every number and figure above is drawn from these files. Hovering tells commit and date.

# %% tags=["remove-input"]
notebook.sources([*records, stable], settings)
