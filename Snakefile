# The book's DAG: which page is made from what. `make book` runs it; `snakemake -n` shows the plan.
# Every torch job claims `threads` cores and torch uses just those, so jobs never fight over the same core.
# A job that runs again reads back what earlier jobs kept under runs/<profile>/ (see `lorapar_utils.cache`): a new page
# text, metric or plot trains nothing. What a job's code is follows from its imports.
# `make read` (config read=1) makes the same pages from the published records: no job but pages and book.
# Paths are quoted where a shell reads them: the clone, or a profile outside it, may lie in a folder with spaces.
import shlex
import sys
from glob import glob
from pathlib import Path
from urllib.parse import unquote

from lorapar_utils.cache import code_files
from lorapar_utils.models.published import fits_published
from lorapar_utils.settings import load_profile, profile_files, project_root

SETTINGS = load_profile(unquote(str(config.get("profile", "laptop"))))
PROFILE = SETTINGS.profile
RUNS = f"runs/{PROFILE}"
READ = bool(config.get("read"))
# Where pages are executed: apart from those of a run.
PAGES_AT = "runs/read" if READ else RUNS
STAMP = f"book/_build/{'read' if READ else PROFILE}.stamp"
# Figures are also drawn for phones (`report.drawing.narrow_too`).
PAPERMILL = f"LORAPAR_NARROW=1 {shlex.quote(sys.executable)} -m papermill --no-progress-bar -k python3"
EXPERIMENTS = [f"{name}-seed{seed}" for name, seed in SETTINGS.experiment_runs()]
PAGES = sorted(Path(path).stem for path in glob("notebooks/[0-9]*.ipynb"))
# The one experiment whose page is in the book: LoRA-PAR, where the profile has it.
OURS = [f"{name}-seed{seed}" for name, seed in SETTINGS.experiment_runs() if SETTINGS.experiments[name].method == "lorapar"]
SHOWN = (OURS or EXPERIMENTS)[0]
PREPARED = [f"{RUNS}/records/voting.json", f"{RUNS}/records/importance.json"]
AGAIN = [f"{RUNS}/records/again.json"] if SETTINGS.evaluation.published_items and fits_published(SETTINGS) else []
# The records that pages rest on: the published ones, and those of this run.
PUBLISHED = sorted(glob("results/**/*.json", recursive=True))
OWN = [] if READ else [*PREPARED, *AGAIN, *expand(f"{RUNS}/records/{{run}}.json", run=EXPERIMENTS)]
# Pages that show less than all of this run's records need not wait for the rest.
VOTING = [f"{name}-seed{seed}" for name, seed in SETTINGS.experiment_runs() if SETTINGS.experiments[name].sweep == "voting"]
SOME = {"01_voting": [*PREPARED, *expand(f"{RUNS}/records/{{run}}.json", run=VOTING)], "02_importance": PREPARED}
# Pages that compute, unless they are told to read.
COMPUTING = ("00_tour", "01_voting", "02_importance")


def from_root(path):
    """A path as Snakemake shows it: from the root, or in full outside the clone."""
    return str(path.relative_to(project_root()) if path.is_relative_to(project_root()) else path)


PROFILE_FILES = [from_root(path) for path in profile_files(SETTINGS.profile_argument)]
# Local model, pool, votes and benchmarks. Snakemake takes what is in braces for a wildcard.
LOCAL_FILES = [from_root(path) for path in SETTINGS.local_files() if not set("{}") & set(str(path))]


def code(*files):
    """The package's files that these files import, directly or indirectly, and those beside them."""
    used = code_files(*map(Path, files))
    return [from_root(path) for path in used] + glob("lorapar_utils/report/*.mplstyle")


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
    page=r"\d\d_\w+",


rule all:
    input:
        STAMP,


rule prepare:
    input:
        code=code("lorapar_utils/pipeline/prepare.py"),
        profile=PROFILE_FILES,
        local=LOCAL_FILES,
    output:
        PREPARED,
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/prepare.log",
    params:
        common=COMMON,
    # All that there are, because everything else waits for it.
    threads: max(SETTINGS.threads, workflow.cores or 1)
    shell:
        "OMP_NUM_THREADS={threads} {params.common[python]:q} -m lorapar_utils.pipeline.prepare {params.common[profile]:q} > {log:q} 2>&1"


rule experiment:
    input:
        notebook="notebooks/experiment.ipynb",
        prepared=PREPARED,
        code=code("lorapar_utils/pipeline/experiment.py"),
        profile=PROFILE_FILES,
    output:
        notebook=f"{RUNS}/notebooks/experiments/{{run}}.ipynb",
        record=f"{RUNS}/records/{{run}}.json",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/{{run}}.log",
    # Before pages, because other pages wait for them.
    priority: 1
    params:
        common=COMMON,
        name=lambda wildcards: wildcards.run.rsplit("-seed", 1)[0],
        seed=lambda wildcards: wildcards.run.rsplit("-seed", 1)[1],
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q}"
        " -r profile {params.common[profile]:q} -r name {params.name:q} -p seed {params.seed} > {log:q} 2>&1"


rule again:
    input:
        prepared=PREPARED,
        code=code("lorapar_utils/pipeline/again.py"),
        profile=PROFILE_FILES,
        adapters=glob("results/study/adapters/**/*.*", recursive=True) + glob(f"results/{PROFILE}/partition/*"),
    output:
        f"{RUNS}/records/again.json",
    conda:
        "environment.yml"
    log:
        f"{RUNS}/logs/again.log",
    params:
        common=COMMON,
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[python]:q} -m lorapar_utils.pipeline.again {params.common[profile]:q} > {log:q} 2>&1"


rule published_experiment:
    input:
        notebook="notebooks/experiment.ipynb",
        records=PUBLISHED,
        code=code("notebooks/experiment.py"),
    output:
        notebook="runs/read/notebooks/experiments/published.ipynb",
    conda:
        "environment.yml"
    log:
        "runs/read/logs/experiment.log",
    params:
        common=COMMON,
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q}"
        " -r profile {params.common[profile]:q} -p compute False > {log:q} 2>&1"


rule page:
    input:
        notebook="notebooks/{page}.ipynb",
        records=lambda wildcards: [] if READ else SOME.get(wildcards.page, OWN),
        published=PUBLISHED,
        claims=["book/claims.yaml", "book/paper_tables.yaml"],
        code=lambda wildcards: code(f"notebooks/{wildcards.page}.py"),
        profile=PROFILE_FILES,
    output:
        notebook=f"{PAGES_AT}/notebooks/{{page}}.ipynb",
    conda:
        "environment.yml"
    log:
        f"{PAGES_AT}/logs/{{page}}.log",
    params:
        common=COMMON,
        # Everything after the votes rests on them, so a page does not ask again for those that failed.
        more=lambda wildcards: (
            ("-p compute False" if READ and wildcards.page in COMPUTING else "")
            + (" -p retry False" if wildcards.page == "01_voting" else "")
        ),
    threads: SETTINGS.threads
    shell:
        "OMP_NUM_THREADS={threads} {params.common[papermill]} {input.notebook:q} {output.notebook:q}"
        " -r profile {params.common[profile]:q} {params.more} > {log:q} 2>&1"


rule book:
    input:
        notebooks=expand(f"{PAGES_AT}/notebooks/{{page}}.ipynb", page=PAGES),
        experiment=f"{PAGES_AT}/notebooks/experiments/{'published' if READ else SHOWN}.ipynb",
        pages=glob("book/*.md"),
        published=PUBLISHED,
        setup=["book/_config.yml", "book/_toc.yml", "book/references.bib", *glob("book/_static/*")],
        # All of it, because the API reference is made from the docstrings.
        code=glob("lorapar_utils/**/*.py", recursive=True) + glob("lorapar_utils/report/*.mplstyle"),
    output:
        STAMP,
    conda:
        "environment.yml"
    log:
        f"{PAGES_AT}/logs/book.log",
    params:
        common=COMMON,
    threads: 1
    shell:
        "OMP_NUM_THREADS={threads} {params.common[python]:q} -m lorapar_utils.report.book {params.common[profile]:q}"
        " --experiment {input.experiment:q} --stamp {output:q} > {log:q} 2>&1"
