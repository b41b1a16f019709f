"""Where profiles, files and the clone lie, and on what kind of machine: what is read, and made, is the same."""

import errno
import fcntl
import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import diskcache
import filelock
import pytest
import torch
from conftest import ROOT, copy_project

from lorapar_utils import build, cache, machine, models
from lorapar_utils.errors import InputError
from lorapar_utils.models import files
from lorapar_utils.pipeline import launch
from lorapar_utils.planning import jobs
from lorapar_utils.records import claim_runs, new_record, write_record
from lorapar_utils.report import publish
from lorapar_utils.settings import load_profile, project_root
from lorapar_utils.voting import split

RECORDED = "{panel: null, panels: {}, teachers: [{name: colleague, kind: recorded, path: votes.csv}]}"
MINE = (
    f"extends: smoke\nmodel: {{source: models/mine}}\npool: {{source: gsm8k, path: data/gsm8k}}\nvoting: {RECORDED}\n"
)


@pytest.fixture
def home(project, monkeypatch):
    """The project in a user's home directory, with notebooks/ and a folder of experiments beside it."""
    home = project / "home"
    clone = home / "clone"
    clone.mkdir(parents=True)
    shutil.move(project / "profiles", clone / "profiles")
    for folder in (clone / "notebooks", home / "experiments", home / "models" / "large"):
        folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(clone)
    return home


def fill(folder: Path) -> None:
    """What `MINE` names, in `folder`."""
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "data" / "gsm8k").mkdir(parents=True)
    (folder / "votes.csv").write_text("id,system\n")


def paths_of(settings) -> tuple[str, str, str]:
    return settings.model.source, settings.pool.path, settings.voting.teachers[0].path


def absolute(folder: Path) -> tuple[str, str, str]:
    return str(folder / "models/mine"), str(folder / "data/gsm8k"), str(folder / "votes.csv")


def test_paths_of_a_profile_are_the_same_from_every_folder(home, monkeypatch):
    clone = home / "clone"
    fill(clone)
    (clone / "profiles" / "mine.yaml").write_text(MINE)
    for folder in (clone, clone / "notebooks"):
        monkeypatch.chdir(folder)
        assert paths_of(load_profile("mine")) == absolute(clone)


def test_paths_are_taken_from_the_profiles_own_folder_first_each_files_from_its_own(home):
    clone, experiments = home / "clone", home / "experiments"
    fill(clone)
    (experiments / "base.yaml").write_text(MINE)
    (clone / "profiles" / "mine.yaml").write_text("extends: ~/experiments/base.yaml\nseed: 3\n")
    assert paths_of(load_profile("mine")) == absolute(clone)
    fill(experiments)
    assert paths_of(load_profile("mine")) == absolute(experiments)
    (clone / "profiles" / "votes.csv").write_text("id,system\n")
    assert paths_of(load_profile("mine")) == absolute(experiments)
    assert paths_of(load_profile("mine").for_experiment("lorapar", 1)) == absolute(experiments)


def test_what_lies_nowhere_stays_as_it_was_written(home):
    (home / "clone" / "profiles" / "mine.yaml").write_text(MINE)
    assert paths_of(load_profile("mine")) == ("models/mine", "data/gsm8k", "votes.csv")
    assert load_profile("llama2-7b").model.source == "meta-llama/Llama-2-7b-hf"
    (home / "clone" / "gpt2").write_text("a file")
    assert load_profile("smoke", model={"source": "gpt2"}).model.source == "gpt2"


def test_words_that_are_no_paths_stay_words_beside_a_folder_of_that_name(home):
    for name in ("packaged", "gemma3-270m", "builtin", "meta-llama/Llama-2-7b-hf"):
        (home / "clone" / name).mkdir(parents=True)
    assert load_profile("smoke").model.source == "packaged" and load_profile("smoke").pool.source == "builtin"
    assert load_profile("llama2-7b").model.source == str(home / "clone" / "meta-llama/Llama-2-7b-hf")


def test_overrides_are_taken_from_the_working_directory_or_the_root(home, monkeypatch):
    fill(home / "clone")
    monkeypatch.chdir(home / "clone" / "notebooks")
    changes = {"pool": {"source": "gsm8k", "path": "data/gsm8k"}, "model": {"source": "~/models/large"}}
    for settings in (load_profile("smoke", **changes), load_profile("smoke").changed(**changes)):
        assert settings.pool.path == str(home / "clone" / "data" / "gsm8k")
        assert settings.model.source == str(home / "models" / "large")
    (home / "clone" / "notebooks" / "data" / "gsm8k").mkdir(parents=True)
    assert load_profile("smoke", **changes).pool.path == str(home / "clone" / "notebooks" / "data" / "gsm8k")


def test_the_model_of_a_relative_folder_is_loaded_from_the_notebooks_folder(home, saved_model, monkeypatch):
    shutil.copytree(saved_model, home / "clone" / "models" / "mine")
    (home / "clone" / "profiles" / "mine.yaml").write_text("extends: smoke\nmodel: {source: models/mine}\n")
    monkeypatch.chdir(home / "clone" / "notebooks")
    assert models.load_base(load_profile("mine"))[0].config.hidden_size == 16


def test_a_profile_is_found_by_name_and_by_path(home, monkeypatch):
    experiments = home / "experiments"
    (experiments / "mine.yaml").write_text("extends: smoke\nseed: 3\n")
    (home / "clone" / "profiles" / "own.yml").write_text("extends: smoke\nseed: 4\n")
    for name in (
        experiments / "mine.yaml",
        "~/experiments/mine.yaml",
        "../experiments/mine.yaml",
        "../experiments/mine",
    ):
        settings = load_profile(name)
        assert (settings.profile, settings.seed, settings.runs) == ("mine", 3, home / "clone" / "runs" / "mine")
        assert settings.profile_argument == "~/experiments/mine.yaml"
    for name in ("profiles/smoke.yaml", "smoke.yaml", home / "clone" / "profiles" / "smoke.yaml", "smoke"):
        assert load_profile(name).profile_argument == "smoke"
    assert load_profile("own.yml").profile_argument == "profiles/own.yml"
    monkeypatch.chdir(home / "clone" / "notebooks")
    assert load_profile("profiles/own.yml").seed == 4


def test_outside_of_every_clone_the_package_is_the_root(home, monkeypatch):
    (home / "experiments" / "mine.yaml").write_text("extends: smoke\n")
    monkeypatch.chdir(home / "experiments")
    assert project_root() == ROOT and load_profile("mine.yaml").runs == ROOT / "runs" / "mine"


@pytest.mark.parametrize(
    "name",
    [
        "my run.yaml",
        "größe.yaml",
        "-x.yaml",
        ".yaml",
        "a{b}.yaml",
        "Vote_Cache.yaml",
        "read.yaml",
        "rehearsal-laptop.yaml",
    ],
)
def test_a_profile_whose_name_cannot_be_a_folders_is_refused(home, name):
    path = home / "experiments" / name
    path.write_text("extends: smoke\n")
    with pytest.raises(InputError, match="would be run in runs/.*rename the file; use up to 100 of a-z"):
        load_profile(path)


def test_two_profiles_of_one_name_never_share_a_folder(home):
    clone, experiments = home / "clone", home / "experiments"
    for name in ("smoke", "Smoke"):
        path = experiments / f"{name}.yaml"
        path.write_text("seed: 1\n")
        with pytest.raises(InputError, match=rf"{name}.yaml and .*profiles/smoke.yaml have one name, .*; rename one"):
            load_profile(path)
    first, second = experiments / "mine.yaml", clone / "elsewhere" / "mine.yaml"
    second.parent.mkdir()
    for path in (first, second):
        path.write_text("extends: smoke\n")
    claim_runs(load_profile(first))
    claim_runs(load_profile(first))
    expected = "runs/mine was made from ~/experiments/mine.yaml, and this is elsewhere/mine.yaml: rename one"
    with pytest.raises(InputError, match=expected):
        build.build(str(second), 1)


def test_a_profile_that_was_moved_goes_on_with_its_runs(home, capsys):
    path = home / "experiments" / "mine.yaml"
    path.write_text("extends: smoke\n")
    claim_runs(load_profile(path))
    path.rename(home / "clone" / "profiles" / "mine.yaml")
    claim_runs(load_profile("mine"))
    assert "was made from ~/experiments/mine.yaml, which is gone; profiles/mine.yaml goes on" in capsys.readouterr().out
    assert (home / "clone" / "runs" / "mine" / "profile.txt").read_text() == "profiles/mine.yaml\n"


def test_a_records_command_names_the_profile_and_no_home_directory(home):
    path = home / "experiments" / "a b" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("extends: smoke\n")
    made = new_record("voting", load_profile(path), metrics={}, notebook="01_voting.ipynb out.ipynb")
    assert made.run["command"].endswith("-p profile ~/'experiments/a b/mine.yaml'")
    assert str(home) not in json.dumps(made.run)


def test_a_profile_without_experiments_or_in_a_folder_with_braces_is_refused_by_the_build(home):
    path = home / "{experiments}" / "mine.yaml"
    path.parent.mkdir()
    path.write_text("seed: 1\n")
    with pytest.raises(InputError, match="profile mine: it has no experiments or no seeds"):
        build.build(str(path), 1)
    path.write_text("extends: smoke\n")
    with pytest.raises(InputError, match="Snakemake takes what is in braces for a wildcard; rename the folder"):
        build.build(str(path), 1)


# In the place of papermill and of the book's build: notes what it was given, and leaves nothing of what a phase makes.
NOTES = """
import json, pathlib, sys
with open("given.jsonl", "a") as stream:
    stream.write(json.dumps([sys.executable, *sys.argv[1:]]) + "\\n")
"""
AWKWARD = "My Project's (Ünï) $HOME #1"


def test_clone_and_profile_may_lie_in_folders_with_awkward_names(tmp_path, monkeypatch):
    """Each command of the plan, run by a shell, reaches the interpreter with the profile's path in one piece."""
    clone = tmp_path / AWKWARD / "clone"
    clone.mkdir(parents=True)
    copy_project(clone)
    path = tmp_path / AWKWARD / "mine.yaml"
    path.write_text(
        "extends: smoke\nexperiments: {pissa-rl: {sweep: baseline, method: pissa, stages: [], title: PiSSA + RL}}\n"
    )
    python = clone / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to(sys.executable)
    packages = os.pathsep.join([str(clone), *(path for path in sys.path if path.endswith("site-packages"))])
    monkeypatch.setenv("PYTHONPATH", packages)
    monkeypatch.delenv("MAKEFLAGS", raising=False)
    for module in (
        "papermill",
        "lorapar_utils.pipeline.prepare",
        "lorapar_utils.pipeline.again",
        "lorapar_utils.report.book",
    ):
        rules = (clone / "Snakefile").read_text()
        assert f"-m {module}" in rules
        (clone / "Snakefile").write_text(rules.replace(f"-m {module}", "notes.py"))
    (clone / "notes.py").write_text(NOTES)
    plan = subprocess.run(
        [python, "-m", "snakemake", "-n", "-p", "--nolock", "--cores", "1", "--config", f"profile={asked(path)}"],
        cwd=clone,
        capture_output=True,
        text=True,
    )
    commands = re.findall(r"Shell command: (OMP_NUM_THREADS=.+)", plan.stdout)
    assert plan.returncode == 0 and len(commands) == 12, plan.stdout[-3000:] + plan.stderr
    (clone / "runs" / "mine" / "logs").mkdir(parents=True)
    for command in commands:
        subprocess.run(command, shell=True, cwd=clone, check=True)
    given = [json.loads(line) for line in (clone / "given.jsonl").read_text().splitlines()]
    assert len(given) == len(commands) and all(words[0] == str(python) and str(path) in words for words in given)
    experiment = next(words for words in given if "notebooks/experiment.ipynb" in words)
    assert experiment[-9:] == ["-r", "profile", str(path), "-r", "name", "pissa-rl", "-p", "seed", "0"]


def asked(path: Path) -> str:
    """The profile as a build names it to Snakemake."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent / "clone")
        said = jobs.command(load_profile(str(path)), 1)
    return next(word for word in said if word.startswith("profile=")).removeprefix("profile=")


@pytest.mark.parametrize("target", ["book", "read", "plan", "publish"])
def test_make_hands_the_path_of_a_profile_on_as_it_is(target):
    path = f"/home/{AWKWARD}/mine.yaml"
    command = ["make", "--no-print-directory", "-n", target, f"PROFILE={path}", "MACHINE=RTX 4090", "CLUSTER=my slurm"]
    environment = {key: value for key, value in os.environ.items() if key != "MAKEFLAGS"}
    recipe = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    words = shlex.split(recipe.splitlines()[-1])
    assert path in words and "getaffinity" not in (ROOT / "Makefile").read_text()
    more = {"book": "my slurm", "plan": "RTX 4090"}
    assert target not in more or more[target] in words


def test_a_machine_that_does_not_tell_its_cores_is_used_whole(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert machine.usable_cores() == 7 and build.main(["no-such-profile"]) == 2
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.usable_cores() == 1


@pytest.mark.parametrize(
    ("given", "threads"),
    [(None, 3), ("", 3), ("0", 3), ("-1", 3), ("many", 3), ("4,2", 4), (" 2 ", 2), ("1", 1), ("4096", 8), ("²", 3)],
)
def test_threads_are_what_the_environment_says_if_it_says_a_number(monkeypatch, given, threads):
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert machine.threads_from_environment(3) == threads


def test_a_model_loads_and_processes_start_whatever_a_cluster_set(monkeypatch, saved_model):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1,2")
    models.load_base(load_profile("smoke", model={"source": str(saved_model)}))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
    started = {}
    monkeypatch.setattr(launch.subprocess, "Popen", lambda *_, **options: started.update(options) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        launch.launch("scores", load_profile("smoke", processes=2))
    assert started["env"]["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("answer", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_files_cannot_be_locked_a_marker_is(tmp_path, monkeypatch, capsys, answer):
    def refused(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(fcntl, "flock", refused)
    path = tmp_path / ".lock"
    with machine.lock(path, timeout=0):
        assert capsys.readouterr().out.count("has no file locks: .lock.held stands for one") == 1
        with pytest.raises(filelock.Timeout):
            machine.lock(path, timeout=0)
    with machine.lock(path, timeout=0):
        pass
    assert not path.with_name(".lock.held").exists()


def test_another_error_of_a_lock_is_not_taken_for_a_file_system_without_any(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"):
        machine.lock(tmp_path / ".lock")


def test_one_build_at_a_time_and_one_conversion_of_the_model_with_locks_and_without(home, monkeypatch):
    for _ in range(2):
        with machine.lock(runs_lock(home), timeout=0), pytest.raises(InputError, match="another build is running"):
            build.build("smoke", 1)
        monkeypatch.setenv("LORAPAR_CACHE", str(home / "cache"))
        target = home / "cache" / "SmolLM2-135M-Instruct"
        target.mkdir(parents=True, exist_ok=True)
        monkeypatch.setattr(files, "_is_intact", lambda folder: True)
        assert files.packaged_model() == target
        monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "No locks")))


def runs_lock(home: Path) -> Path:
    (home / "clone" / "runs").mkdir(exist_ok=True)
    return home / "clone" / "runs" / ".lock"


def test_votes_are_kept_without_a_write_ahead_log_and_old_ones_are_read(home):
    folder = home / "clone" / "runs" / "vote_cache"
    with diskcache.Cache(folder, disk=diskcache.JSONDisk) as cache:
        cache["paid"] = {"system": 2}
    with split._vote_cache() as cache:
        assert cache["paid"] == {"system": 2}
        cache["new"] = {"system": 1}
        # A reader beside the writer, as `--dry-run` is.
        with split._vote_cache() as second:
            assert second["new"] == {"system": 1}
    assert sqlite3.connect(folder / "cache.db").execute("PRAGMA journal_mode").fetchone() == ("delete",)


def test_votes_may_be_kept_elsewhere(home, monkeypatch):
    monkeypatch.setenv("LORAPAR_VOTES", "~/votes")
    with split._vote_cache() as cache:
        cache["paid"] = 1
    assert (home / "votes" / "cache.db").is_file() and not (home / "clone" / "runs").exists()


@pytest.mark.parametrize("reason", ["locking protocol", "disk I/O error", "database is locked"])
def test_nothing_is_asked_where_votes_cannot_be_kept(home, monkeypatch, reason):
    def refused(*_, **__):
        raise sqlite3.OperationalError(reason)

    monkeypatch.setattr(split.diskcache, "Cache", refused)
    monkeypatch.setattr(split.voting, "vote", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(
        InputError, match=rf"vote_cache cannot keep them \({reason}\).*set LORAPAR_VOTES to where it is"
    ):
        split.votes(load_profile("smoke"))


def test_a_vote_that_cannot_be_kept_stops_the_asking(home):
    with pytest.raises(InputError, match="database or disk is full"), split._vote_cache():
        raise sqlite3.OperationalError("database or disk is full")


def test_without_git_a_record_names_no_commit_and_is_not_published(home, monkeypatch):
    settings = load_profile("laptop")
    monkeypatch.setenv("PATH", str(home))
    made = new_record("voting", settings, metrics={})
    assert (made.run["commit"], made.run["dirty"]) == (None, None)
    write_record(made, settings.runs / "records" / "voting.json")
    with pytest.raises(InputError, match="record voting: made without git, .*; install git"):
        publish.publish("laptop")


def test_the_repository_around_an_unpacked_archive_is_not_taken_for_the_projects(home):
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "dotfiles"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    assert cache._git_state() == {"commit": None, "dirty": None}
    for command in (["add", "clone/profiles"], ["commit", "-q", "-m", "the project"]):
        subprocess.run([*git, *command], cwd=home, check=True)
    state = cache._git_state()
    assert len(state["commit"]) == 40 and state["dirty"] is False
