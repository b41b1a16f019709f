# The book's DAG: which notebook makes what, from what. `make book` runs it; `snakemake -n` shows the plan.
# Every torch job claims `threads` cores and torch uses just those, so jobs never fight over the same core.
# A phase keeps its artefacts under runs/<profile>/ with a manifest of what they were made from, and makes them again
# only if that changed. Stamps order the phases, and are `ancient`: each rule names every source that can change
# its result, so a notebook that runs again to redraw a figure does not set off the training that follows it.
# Paths are quoted where a shell reads them: the clone, or a profile outside it, may lie in a folder with spaces.
import shlex
import sys
from glob import glob
from urllib.parse import unquote

from lorapar_utils.manifests import with_imports
from lorapar_utils.settings import load_profile, profile_files, project_root

SETTINGS = load_profile(unquote(str(config.get("profile", "cpu"))))
PROFILE = SETTINGS.profile
RUNS = f"runs/{PROFILE}"
PAPERMILL = f"{shlex.quote(sys.executable)} -m papermill --no-progress-bar -k python3"
EXPERIMENTS = [f"{name}-seed{seed}" for name, seed in SETTINGS.experiment_runs()]
PHASES = ["00_tour", "01_voting", "02_importance", "03_theta_ablation", "04_two_stage", "05_benchmarks", "06_claims"]
# The longer and varied runs that pages show beside this one's.
LONGER = sorted({*glob("results/cpu-*/*.json"), *glob(f"results/{PROFILE}-*/*.json")})
# From the root, or in full where a profile lies outside the clone.
PROFILE_FILES = [
    str(path.relative_to(project_root()) if path.is_relative_to(project_root()) else path)
    for path in profile_files(SETTINGS.profile_argument)
]


# How the phases are put together, and what every one of them reads.
FRAME = {"settings", "data", "data_files", "data_splits", "manifests", "splits", "records", "machine", "processes"}


def code(*modules):
    """The files of these modules and of all that they import."""
    used = with_imports(*modules) | FRAME
    return [f"lorapar_utils/{name}.py" for name in sorted(used)] + ["lorapar_utils/lorapar.mplstyle"] * ("plots" in used)


PHASES_CODE = ["lorapar_utils/phases.py"]
SHOW = code("notebook", "plots", "tables", "partition", "optim", "rewards")
VOTE = code("voting", "teachers", "label_scores", "models", "summaries", "notebook")
SCORE = PHASES_CODE + code("importance", "partition", "models", "summaries", "notebook", "explorer")
TRAIN = PHASES_CODE + code("importance", "partition", "models", "training", "evaluation")


# What every job is told; in `params`, so that a change of one reruns what it concerns. Notebooks get profile and name
# by -r, as text: papermill's -p would make a number of a profile that is called 2026.
COMMON = {
    "papermill": PAPERMILL,
    "python": sys.executable,
    "profile": SETTINGS.profile_argument,
    "runs": RUNS,
}


wildcard_constraints:
    run=r"[\w.-]+-seed\d+",


rule all:
    input:
        f"book/_build/{PROFILE}.stamp",


rule voting:
    input:
        notebook="notebooks/01_voting.ipynb",
        code=VOTE,
        profile=PROFILE_FILES,
        longer=LONGER,
    output:
        notebook=f"{RUNS}/notebooks/01_voting.ipynb",
        record=f"{RUNS}/records/voting.json",
        stamp=f"{RUNS}/stamps/votes.json",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/01_voting.log",
    params:
        common=COMMON,
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q} -r profile {params.common[profile]:q} > {log:q} 2>&1"
        " && cp {params.common[runs]:q}/votes/manifest.json {output.stamp:q}"


rule importance:
    input:
        notebook="notebooks/02_importance.ipynb",
        votes=ancient(f"{RUNS}/stamps/votes.json"),
        longer=[path for path in LONGER if path.endswith("stability.json")],
        code=SCORE,
        profile=PROFILE_FILES,
    output:
        notebook=f"{RUNS}/notebooks/02_importance.ipynb",
        record=f"{RUNS}/records/importance.json",
        stamp=f"{RUNS}/stamps/scores.json",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/02_importance.log",
    params:
        common=COMMON,
        scores=SETTINGS.scores_folder.relative_to(project_root()),
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q} -r profile {params.common[profile]:q} > {log:q} 2>&1"
        " && cp {params.scores:q}/manifest.json {output.stamp:q}"


rule experiment:
    input:
        notebook="notebooks/experiment.ipynb",
        scores=ancient(f"{RUNS}/stamps/scores.json"),
        code=TRAIN,
        profile=PROFILE_FILES,
    output:
        notebook=f"{RUNS}/notebooks/experiments/{{run}}.ipynb",
        record=f"{RUNS}/records/{{run}}.json",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/{{run}}.log",
    params:
        common=COMMON,
        name=lambda wildcards: wildcards.run.rsplit("-seed", 1)[0],
        seed=lambda wildcards: wildcards.run.rsplit("-seed", 1)[1],
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q}"
        " -r profile {params.common[profile]:q} -r name {params.name:q} -p seed {params.seed} > {log:q} 2>&1"


rule tour:
    input:
        notebook="notebooks/00_tour.ipynb",
        records=expand(f"{RUNS}/records/{{run}}.json", run=EXPERIMENTS),
        longer=LONGER,
        code=[*SCORE, *code("evaluation", "tables")],
        profile=PROFILE_FILES,
    output:
        notebook=f"{RUNS}/notebooks/00_tour.ipynb",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/00_tour.log",
    params:
        common=COMMON,
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q} -r profile {params.common[profile]:q} > {log:q} 2>&1"


rule show:
    input:
        notebook="notebooks/{phase}.ipynb",
        records=expand(f"{RUNS}/records/{{run}}.json", run=EXPERIMENTS),
        others=[f"{RUNS}/records/voting.json", f"{RUNS}/records/importance.json"],
        longer=LONGER,
        claims=["book/claims.yaml", "lorapar_utils/claims.py", "book/paper_tables.yaml"],
        code=SHOW,
    output:
        notebook=f"{RUNS}/notebooks/{{phase}}.ipynb",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/{{phase}}.log",
    wildcard_constraints:
        phase="03_theta_ablation|04_two_stage|05_benchmarks|06_claims",
    params:
        common=COMMON,
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q} -r profile {params.common[profile]:q} > {log:q} 2>&1"


rule book:
    input:
        notebooks=expand(f"{RUNS}/notebooks/{{phase}}.ipynb", phase=PHASES),
        experiment=f"{RUNS}/notebooks/experiments/{EXPERIMENTS[min(1, len(EXPERIMENTS) - 1)]}.ipynb",
        pages=glob_wildcards("book/{page}.md").page and expand("book/{page}.md", page=glob_wildcards("book/{page,[^/]+}.md").page),
        longer=LONGER,
        setup=["book/_config.yml", "book/_toc.yml", "book/references.bib", *glob("book/_static/*")],
        # All of it: the API reference is made from the docstrings.
        code=[*glob("lorapar_utils/*.py"), *glob("lorapar_utils/sandboxed/*.py"), "lorapar_utils/lorapar.mplstyle"],
    output:
        f"book/_build/{PROFILE}.stamp",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/book.log",
    params:
        common=COMMON,
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {params.common[python]:q} -m lorapar_utils.book {params.common[profile]:q}"
        " --experiment {input.experiment:q} > {log:q} 2>&1"
