"""The lines that a build prints, from Snakemake's own events."""

import logging
from types import SimpleNamespace

import pytest
from snakemake_interface_logger_plugins.common import LogEvent

from lorapar_utils.planning import jobs
from lorapar_utils.settings import load_profile


@pytest.fixture
def handler(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(jobs.time, "time", lambda: clock.now)
    monkeypatch.setattr(jobs.LogHandler, "profile", load_profile("smoke"), raising=False)
    made = jobs.LogHandler(SimpleNamespace(), None)

    def send(event, at=0.0, level=logging.INFO, **fields):
        clock.now = at
        record = logging.LogRecord("snakemake", level, "", 0, fields.pop("message", ""), None, None)
        record.__dict__ |= {"event": event, **fields}
        made.emit(record)

    made.send = send
    return made


def info(handler, number, rule, **wildcards):
    handler.send(LogEvent.JOB_INFO, jobid=number, rule_name=rule, wildcards=wildcards, reason="", log=[f"{number}.log"])


def test_a_line_for_each_job_with_its_time_its_place_and_about_how_long_the_rest_takes(handler, capsys):
    handler.send(LogEvent.RUN_INFO, stats={"prepare": 1, "experiment": 2, "all": 1, "total": 4})
    info(handler, 1, "prepare")
    handler.send(LogEvent.JOB_STARTED, jobs=[1])
    handler.send(LogEvent.JOB_FINISHED, at=100.0, job_id=1)
    for number, run in ((2, "base-seed0"), (3, "lorapar-seed0")):
        info(handler, number, "experiment", run=run)
        handler.send(LogEvent.JOB_STARTED, at=100.0, jobs=[number])
        handler.send(LogEvent.JOB_FINISHED, at=150.0 * (number - 1), job_id=number)
    info(handler, 0, "all")
    handler.send(LogEvent.JOB_STARTED, at=301.0, jobs=[0])
    handler.send(LogEvent.JOB_FINISHED, at=301.0, job_id=0)
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.startswith("1 of 3  prepare") and " 2 min   about " in first and first.endswith("left")
    assert second.startswith("2 of 3  experiment base-seed0") and "50 s" in second
    assert third.startswith("3 of 3  experiment lorapar-seed0") and third.endswith("3 min")


def test_a_failed_job_is_named_with_its_own_message_and_other_output_is_not_shown(handler, capsys, tmp_path):
    (tmp_path / "1.log").write_text(
        "Traceback …\nKeyError: 'x'\nlorapar_utils.errors.InputError: pool.path: nothing there\n"
    )
    (tmp_path / "2.log").write_text("ValueError: of a later job\n")
    handler.send(
        LogEvent.JOB_INFO, jobid=1, rule_name="page", wildcards={"page": "00_tour"}, reason="", log=[tmp_path / "1.log"]
    )
    handler.send(None, message="Select jobs to execute...")
    handler.send(LogEvent.SHELLCMD, shellcmd="papermill …")
    handler.send(LogEvent.JOB_ERROR, jobid=1, rule_name="page", level=logging.ERROR)
    handler.close()
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == f"failed: page 00_tour\npool.path: nothing there\n(full log: {tmp_path / '1.log'})\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Killed by the system\n\nlast words\n", "last words"),
        ("OSError: [Errno 28] No space left on device\n", "OSError: [Errno 28] No space left on device"),
        ("", "Its log is empty."),
    ],
)
def test_the_message_of_a_log(tmp_path, text, message):
    (tmp_path / "a.log").write_text(text)
    assert jobs.message_of(tmp_path / "a.log") == message
    assert jobs.message_of(tmp_path / "no.log") == "It left no log."


def test_a_build_with_nothing_to_do_says_so(handler, capsys):
    handler.close()
    handler.close()
    assert capsys.readouterr().out.count("Nothing to be done") == 1


def test_the_rest_is_estimated_from_each_experiments_own_work():
    settings = load_profile("laptop")
    base, both, one = (
        jobs.effort(settings, jobs.Job("experiment", f"{name}-seed0", "", ""))
        for name in ("base", "lorapar", "lora_stage1")
    )
    assert base < one < both
