"""The jobs of a build, as Snakemake runs them: a line for each as it ends, or a list of those that would run.

`python -m lorapar_utils.planning.jobs ARGUMENTS` is Snakemake's command line with the log handler of this file, which
prints nothing else. Snakemake's own log is in `.snakemake/log`.
"""

import json
import logging
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from logging import LogRecord
from pathlib import Path
from urllib.parse import quote

import snakemake.cli
from snakemake_interface_logger_plugins.base import LogHandlerBase
from snakemake_interface_logger_plugins.common import LogEvent
from snakemake_interface_logger_plugins.registry import LoggerPluginRegistry

from lorapar_utils.errors import InputError
from lorapar_utils.planning import duration
from lorapar_utils.settings import Settings, load_profile, project_root

# What a job costs beside its work, in tokens that a model reads in the same time (a thousand a second on two cores).
START = {"prepare": 9_000, "experiment": 12_000, "again": 9_000, "page": 6_000, "book": 15_000}
# Tokens of a question with its answer; of a vote; of a completion. A training pass costs three reading ones.
EXAMPLE, VOTE, TRAINING = 60, 38, 3
# Environment variable that asks for the list of jobs instead of lines: for `would_run`.
LISTING = "LORAPAR_LIST_JOBS"


@dataclass(frozen=True)
class Job:
    """One job: its rule, what it makes (an experiment, a page; empty for other rules), why it runs, its log file."""

    rule: str
    what: str
    reason: str
    log: str

    @property
    def name(self) -> str:
        return f"{self.rule} {self.what}".strip()


def effort(settings: Settings, job: Job) -> float:
    """About what a job costs, in tokens read. Only ratios of efforts mean anything."""
    pool, grpo, evaluation = settings.pool, settings.grpo, settings.evaluation
    work = 0.0
    if job.rule == "prepare":
        teachers = sum(teacher.kind in ("local", "success") for teacher in settings.voting.teachers)
        work = teachers * (pool.system1.train + pool.system2.train) * VOTE
        work += 2 * settings.importance.examples * EXAMPLE * TRAINING
    elif job.rule == "again":
        work = 4 * evaluation.published_items * (EXAMPLE + evaluation.max_new_tokens)
    elif job.rule == "experiment":
        stages = settings.experiments[job.what.rsplit("-seed", 1)[0]].stages
        tested = (pool.system1.test + pool.system2.test) * (EXAMPLE + evaluation.max_new_tokens)
        work = max(1, len(stages)) * tested
        for stage in stages:
            if stage == "grpo":
                sampled = min(evaluation.pass_k_prompts, pool.system2.validation) * evaluation.pass_k
                work += grpo.steps * grpo.rows * grpo.max_completion_length * (1 + TRAINING)
                work += len(stages) * sampled * evaluation.max_new_tokens
            else:
                rows = pool.system1.train + (stage == "sft_all") * pool.system2.train
                work += settings.sft.epochs * rows * EXAMPLE * TRAINING
    return START.get(job.rule, START["page"]) + work


class LogHandler(LogHandlerBase):
    """Snakemake's log handler: a line for each job as it ends, with its time and about how long the rest takes."""

    writes_to_stream = True
    writes_to_file = has_filter = has_formatter = needs_rulegraph = False
    profile: Settings  # that is built; set by `main`

    def __post_init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.jobs: dict[int, Job] = {}
        self.began: dict[int, float] = {}
        self.ended: list[Job] = []
        self.closed = False
        self.start = time.time()

    def emit(self, record: LogRecord) -> None:
        event = getattr(record, "event", None)
        if event == LogEvent.RUN_INFO:
            self.counts = {rule: n for rule, n in record.stats.items() if rule not in ("all", "total")}
        elif event == LogEvent.JOB_INFO:
            self.jobs[record.jobid] = job = _job(record)
            if os.environ.get(LISTING) and job.rule != "all":
                print(json.dumps(asdict(job)), flush=True)
        elif event == LogEvent.JOB_STARTED:
            self.began |= dict.fromkeys(record.jobs, time.time())
        elif event == LogEvent.JOB_FINISHED and self.jobs[record.job_id].rule != "all":
            self._finished(self.jobs[record.job_id], time.time() - self.began[record.job_id])
        elif event == LogEvent.JOB_ERROR:
            job = self.jobs[record.jobid]
            print(
                f"failed: {job.name}\n{message_of(Path(job.log))}\n(full log: {job.log})", file=sys.stderr, flush=True
            )
        elif event is None and record.levelno >= logging.ERROR and not self.jobs:
            print(record.getMessage(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Called at the end of the run, and once more when Python ends."""
        if not self.jobs and not self.counts and not self.closed:
            print("Nothing to be done: everything is up to date.", flush=True)
        self.closed = True
        super().close()

    def _finished(self, job: Job, seconds: float) -> None:
        self.ended.append(job)
        count = sum(self.counts.values())
        place = f"{len(self.ended):{len(str(count))}d} of {count}"
        print(f"{place}  {job.name:<40}{duration(seconds):>10}{self._left()}", flush=True)

    def _left(self) -> str:
        """How long the rest takes, if it goes on as fast as so far."""
        done, left = sum(effort(self.profile, job) for job in self.ended), 0.0
        for rule, count in self.counts.items():
            ended = [job for job in self.ended if job.rule == rule]
            kinds = [f"{name}-seed{seed}" for name, seed in self.profile.experiment_runs()]
            kinds = (
                [what for what in kinds if what not in {job.what for job in ended}] if rule == "experiment" else [""]
            )
            efforts = [effort(self.profile, Job(rule, what, "", "")) for what in kinds]
            left += (count - len(ended)) * sum(efforts) / max(1, len(efforts))
        return f"   about {duration((time.time() - self.start) * left / done)} left" if left else ""


def message_of(log: Path) -> str:
    """What a log says went wrong: the last error message in it."""
    if not log.is_file():
        return "It left no log."
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8", errors="replace"))
    told = re.findall(r"^(?:[\w.]+\.)?InputError: (.+)", text, re.M)
    messages = told or re.findall(r"^[\w.]+(?:Error|Warning): .+", text, re.M) or text.split("\n\n")[-1].splitlines()
    return messages[-1] if messages else "Its log is empty."


def _job(record: LogRecord) -> Job:
    what = " ".join(map(str, record.wildcards.values())) if record.wildcards else ""
    return Job(record.rule_name, what, " ".join(str(record.reason).split()), " ".join(map(str, record.log)))


def command(settings: Settings, cores: int, *, read: bool = False) -> list[str]:
    """Command that runs Snakemake over a profile; `read`: only the pages, from the published records."""
    # As in an address (%20): Snakemake reads it as YAML, and hands it on to a cluster's jobs through a shell.
    asked = quote(settings.profile_file)
    program = [sys.executable, "-m", "lorapar_utils.planning.jobs", settings.profile_file]
    config = ["--config", f"profile={asked}", *(["read=1"] if read else [])]
    # Our own lock is released by the system when a process dies; Snakemake's would outlive a kill -9.
    return [*program, "--cores", str(cores), *config, "--nolock", "--rerun-incomplete"]


def would_run(settings: Settings, cores: int) -> list[Job]:
    """The jobs that a build would run now, in their order; nothing is run."""
    asked = [*command(settings, cores), "--dry-run"]
    done = subprocess.run(
        asked,
        cwd=project_root(),
        env=os.environ | {LISTING: "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise InputError(f"plan: Snakemake cannot list the jobs: {done.stderr.strip() or done.stdout.strip()}")
    return [Job(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """Run Snakemake, the first argument being the profile."""
    LogHandler.profile = load_profile(sys.argv[1])
    registry = LoggerPluginRegistry()
    registry.plugins["lines"] = registry.load_plugin("lines", sys.modules[__name__])
    snakemake.cli.main([*sys.argv[2:], "--logger", "lines"])


if __name__ == "__main__":
    main()
