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
# - **Cost.** A minute; `make book` has cast the votes before, else the teachers are asked first. The first use of the model converts it once.

# %% tags=["parameters", "remove-input"]
profile = "laptop"  # a file of profiles/, or a path
compute = True  # False: read the published records in the place of computing; no model is loaded
questions = None  # a list of your own, such as ["What is the capital of France?", "What is 12 + 7 - 5 + 3?"]
examples = 4  # of each system, to score
theta = 0.9

# %% tags=["remove-input", "remove-stdout"]
import pandas as pd

from lorapar_utils.records import own_records, study
from lorapar_utils.report import explorer, figures, notebook, tables

settings = notebook.start(profile=profile)
from peft import PeftModel, load_peft_weights

from lorapar_utils import evaluation, models
from lorapar_utils.data import load_pool
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.importance import lora_parameters, score_importance
from lorapar_utils.models.published import TRAINED_BY, fits_published, published_adapters, published_items
from lorapar_utils.partition import Partition, build_partition
from lorapar_utils.pipeline.examples import Examples
from lorapar_utils.records.from_scores import importance_record
from lorapar_utils.settings import load_profile, project_root

# %% [markdown]
# ## The idea

# %% mystnb={"image": {"alt": "The pipeline from left to right: training examples; teachers vote; System 1 and System 2 examples; scores of LoRA elements; the fewest that hold theta; stage 1, SFT; stage 2, GRPO."}, "figure": {"caption": "Each numbered notebook shows one part of it.", "name": "fig-pipeline-tour"}} tags=["remove-input"]
figure = figures.pipeline()

# %% [markdown]
# ## What has been found so far
#
# Every table and figure is made from records: small files with metrics, intervals, and the command that made them. `results/` holds the
# published ones, `runs/` this clone's own. The study's arms, after stage 1, and below them what this run has trained, if anything:

# %% tags=["remove-input"]
notebook.linked(tables.arms_table(study().values()), study().values(), settings)

# %% tags=["remove-input"]
own = figures.main_records(own_records(settings))
notebook.linked(tables.stage_table(own), own, settings, "")

# %% [markdown]
# ## Ask the models, side by side
#
# The same questions to each: the model without an adapter, LoRA-PAR after stage 1 and after stage 2 as this run has trained it, and the adapters of
# `results/study/adapters/`, LoRA-PAR after both stages and LoRA with all elements (a page that computes nothing has the last two alone). An answer counts
# where it follows `####`. Set `questions` in the parameters cell to ask your own; an answer ends after `evaluation.max_new_tokens`.

# %% tags=["remove-input"]
adapters = published_adapters() if not compute or fits_published(settings) else {}
kept = sorted((settings.runs / "experiments" / "lorapar-seed0").glob("stage*"))
halfway = {f"{name}, stage1": f / "stage1" for name, f in adapters.items() if (f / "stage1").is_dir()}
own_stages = {f"this run's LoRA-PAR, {stage.name}": stage / "adapter" for stage in kept}
if compute:
    model, tokenizer = models.load_base(settings)
    rows = [row for row in Examples(settings).pool if row["split"] == "test"]
    asked = questions or [next((r["prompt"] for r in rows if r["construction"] in (k, 0)), None) for k in (1, 2)]
    answers = {"question": asked}
    answers["no adapter"] = [text for [(text, _)] in evaluation.generate(model, tokenizer, asked, settings)]
    for name, folder in {**own_stages, **halfway, **adapters}.items():
        model = PeftModel.from_pretrained(model, folder)
        answers[name] = [text for [(text, _)] in evaluation.generate(model, tokenizer, asked, settings)]
        model = model.unload()
else:
    items = {name: published_items(folder) for name, folder in adapters.items()}
    two_of_each = pd.DataFrame(items["lorapar"].values()).groupby("system")["id"].head(2)
    rows = {row["id"]: row for row in load_pool(load_profile(project_root() / TRAINED_BY))}
    answers = {"question": [rows[item]["prompt"] for item in two_of_each]}
    answers["right answer"] = [rows[item]["answer"] for item in two_of_each]
    answers |= {name: [said[item]["completion"] for item in two_of_each] for name, said in items.items()}
names = {"lorapar": "LoRA-PAR, both stages", "lora_rl": "LoRA, both stages"}
notebook.shown(pd.DataFrame(answers).head(4).rename(columns=names))

# %% [markdown]
# ## What did each stage move?
#
# The adapter that this run's stage 1 started from was drawn from seed 0, so it can be drawn again. An element counts as moved if a single bit of it
# changed.

# %%
if compute:
    model = models.attach_adapter(model, settings.changed(seed=0))
moved = []
if compute and len(kept) == 2:
    stage1, stage2 = (load_peft_weights(str(folder)) for folder in own_stages.values())
    for name, drawn in lora_parameters(model).items():
        saved = name.replace(".default", "")  # PEFT's files leave it out
        first, last = stage1[saved], stage2[saved]
        shares = {"stage 1": first != drawn, "stage 2": last != first, "neither": last == drawn}
        means = {by: which.float().mean().item() for by, which in shares.items()}
        moved.append({"module": name.split(".")[-4], **means})
by_module = pd.DataFrame(moved)
if moved:
    by_module = by_module.groupby("module", sort=False).mean().round(3).reset_index()
notebook.shown(by_module, "This needs both stages of this run, which make book trains.")

# %% [markdown]
# ## Which elements matter to a few examples?
#
# A fresh adapter is scored on a few examples of each system; nothing is trained. Change `examples`, and see the selection settle; the importance notebook shows how
# far. A page that computes nothing has the partition of the published adapter in its place.

# %%
if compute:
    scores = [
        score_importance(
            model,
            encode_examples(rows[:examples], tokenizer, settings),
            batch_size=settings.importance.batch_size,
        )
        for rows in Examples(settings).systems.values()
    ]
    partition = build_partition(*scores, theta=theta, alpha=1.0, beta=1.0)
else:
    partition = Partition.load(adapters["lorapar"] / "partition")
print(
    f"Jaccard index {partition.jaccard:.2f}; active: "
    + ", ".join(f"{k} {v:.1%}" for k, v in partition.active_share.items())
)
regions = ["system1_only", "system2_only", "shared", "inactive"]
by_region = partition.summary().groupby("module", sort=False)[regions].mean().round(3)
notebook.shown(by_region.rename(columns=figures.REGION_LABELS))

# %% [markdown]
# ## Change theta
#
# Change `theta` in the parameters cell and run the page again, or drag the sliders. They move over the same scores; on a page that computes nothing, over
# those of the study, which are of another adapter and other examples.

# %% tags=["remove-input"]
record = importance_record(scores, partition, settings) if compute else study()["importance"]
explorer.Page(
    explorer.theta_explorer(record, study().values()),
    figures.importance_map(record),
    "Heat maps of layer against module: importance to System 1, to System 2, and their difference.",
)

# %% [markdown]
# ## Where to go from here
#
# - [Voting](01_voting.ipynb), [importance](02_importance.ipynb), [theta](03_theta_ablation.ipynb), [two stages](04_two_stage.ipynb),
#   [benchmarks](05_benchmarks.ipynb), [claims](06_claims.ipynb), [your run beside the published one](07_your_run.ipynb): run from top to bottom. A finished phase is read back; one that you
#   interrupt goes on where it stopped.
# - [One training](experiment.ipynb): set `show_rollouts = 4` to read completions and rewards as it learns.
# - Start with `profile = "smoke"`: everything in minutes, numbers that mean nothing.
# - A notebook and its `.py` are one: saving either in JupyterLab writes both.
# - New experiment, model, data, teacher: a file in `profiles/` that names only what it changes.
#
# ## Try it yourself
#
# ```bash
# .venv/bin/papermill notebooks/00_tour.ipynb out.ipynb -p profile smoke -p examples 2 -p theta 0.8
# ```
