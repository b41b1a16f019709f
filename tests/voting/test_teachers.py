"""API teachers against a real server on loopback, faults included; recorded votes; what counts as an answer."""

import json
import random
import signal
import subprocess
import sys
import time
import traceback

import diskcache
import pytest
import yaml
from api_server import Server, transformers_serve
from conftest import ROOT

from lorapar_utils import data
from lorapar_utils.errors import InputError
from lorapar_utils.models import files
from lorapar_utils.settings import load_profile
from lorapar_utils.voting import plan, split, vote
from lorapar_utils.voting.teachers import build_teachers, identity, teacher_prompt
from lorapar_utils.voting.verdicts import parse_vote

KEY = "secret"
EXAMPLES = [{"id": f"e{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]


@pytest.fixture
def cache(tmp_path):
    with diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk) as opened:
        yield opened


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", KEY)


def settings_for(*teachers, **voting):
    return load_profile("smoke", voting={"teachers": list(teachers), **voting})


def api(address, **options):
    base = {"name": "remote", "kind": "api", "role_play": True, "model": "teacher", "api_key_env": "TEACHER_KEY"}
    return base | {"base_url": address, "timeout": 0.5, "concurrency": 8} | options


def ask(settings, cache, examples=EXAMPLES):
    import datasets

    return vote(datasets.Dataset.from_list(examples), build_teachers(settings, examples), cache)


def number_in(question):
    return int(question.split("What is ")[1].split()[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("System 1", (1, "")),
        ("  **System 2**.\n", (2, "")),
        ("It chains three sums.\n\nAnswer: System 2", (2, "")),
        ("<think>System 1? No, two steps.</think>\nSystem 2", (2, "")),
        ("The final verdict follows.\nverdict is system 1", (1, "")),
        ("<think>still weighing it\nSystem 1", (0, "stopped while thinking")),
        ("", (0, "empty answer")),
        ("<think>System 1</think>", (0, "empty answer")),
        ("2", (0, "no verdict in the last line")),
        ("System 1 or System 2", (0, "no verdict in the last line")),
        ("System 2\nbut System 1 is possible too", (0, "no verdict in the last line")),
        ("I cannot help with that.", (0, "no verdict in the last line")),
        ("System 12", (0, "no verdict in the last line")),
    ],
)
def test_only_a_verdict_in_the_last_line_counts(text, expected):
    assert parse_vote(text) == expected


@pytest.mark.parametrize(
    "line",
    [
        *("**Answer:** System 2", "Answer: **System 2**", "__Final answer__: `System 2`", "**Judgement**: System 2."),
        *(
            "### Classification: **System 2**",
            "- System 2",
            "* **System 2**",
            "> > System 2",
            "• System 2",
            "***System 2***",
        ),
        *(
            "The final answer is: $\\boxed{\\text{System 2}}$",
            "\\[\\boxed{System~2}\\]",
            "\\(\\textbf{System 2}\\)",
            "$$\\boxed{System\\ 2}.$$",
        ),
        *("System 2<|im_end|>", "System 2</s>", "System 2<|eot_id|>\n", "System 2\n<end_of_turn>", "System 2 [/INST]"),
        *(
            "<answer>System 2</answer>",
            "<final_answer>\nSystem 2\n</final_answer>",
            "<b>System&nbsp;2</b>",
            "```\nSystem 2\n```",
        ),
        *("“System 2”", "«System 2»", "「System 2」", "(System 2)", "Answer: [[System 2]]", "System 2\n---"),
        *(
            "System\u00a02",
            "System\u200b 2",
            "Ｓｙｓｔｅｍ　２",
            "SYSTEM-2",
            "System_2",
            "System II",
            "Verdict = system two",
            "Answer → System 2",
        ),
        *('{"answer": "System 2"}', '```json\n{\n  "verdict": "System 2",\n  "confidence": 0.9\n}\n```'),
        *(
            "<|channel|>analysis<|message|>System 1?<|end|><|start|>assistant<|channel|>final<|message|>System 2<|return|>",
        ),
        *("<reasoning>System 1?</reasoning> System 2", "[THINK]System 1[/THINK]System 2"),
        *("<|begin_of_thought|>no<|end_of_thought|>\nSystem 2", "<｜end▁of▁thinking｜>System 2<｜end▁of▁sentence｜>"),
    ],
)
def test_marks_around_a_verdict_do_not_change_it(line):
    assert parse_vote(f"It needs a sum.\n{line}") == (2, "")


@pytest.mark.parametrize(
    "line",
    [
        *(
            "not System 2",
            "**Answer:** System 1 / System 2",
            "System 1, System 2",
            "System 1 → System 2",
            "System 2?",
            "Answer: 2",
        ),
        *("~~System 2~~", "<del>System 2</del>", "$\\cancel{System 2}$", "!System 2", "≠ System 2", "- [ ] System 2"),
        *(
            "1. System 1\n2. System 2",
            "- System 1\n- System 2",
            "\\boxed{2}",
            "(System 1) or (System 2)",
            "System 1<|im_end|>System 2",
        ),
        *(
            "System 2.5",
            "System 22",
            "System²²",
            "System",
            "Systems 2",
            "System 3",
            "System III",
            "The answer is not: System 2",
        ),
        *(
            '{"answer": "System 2", "not": "System 1"}',
            '{"wrong": "System 2"}',
            '{"answer": 2}',
            '{"answer": "System 2"} or so',
        ),
        *(
            "System 2 <think>or",
            "<|channel|>analysis<|message|>System 2",
            "<reasoning>\nSystem 2",
            "<thinking>a</thinking><thinking>b\nSystem 2",
        ),
    ],
)
def test_what_is_no_verdict_is_not_guessed_at(line):
    assert parse_vote(f"It needs a sum.\n{line}")[0] == 0


def test_role_play_names_the_target_model():
    settings = settings_for(api("http://x"), api("http://x", name="plain", role_play=False), tie="undecided")
    played, plain = (teacher_prompt(t, EXAMPLES[3], settings) for t in settings.voting.teachers)
    assert "SmolLM2-135M" in played and "SmolLM2-135M" not in plain
    assert "What is 3 + 3?" in plain and "Answer: 6" in plain and plain.endswith("System 1 or System 2.")


def test_a_template_with_an_unknown_variable_is_named():
    settings = settings_for(api("http://x"), role_play_template="{{ pormpt }}")
    with pytest.raises(InputError, match=r"voting.role_play_template: 'pormpt' is undefined; it may use target"):
        teacher_prompt(settings.voting.teachers[0], EXAMPLES[0], settings)


@pytest.mark.parametrize(("role_play", "name"), [(True, "role_play_template"), (False, "plain_template")])
def test_a_template_that_asks_the_same_about_every_example_is_refused(cache, role_play, name):
    with Server().running() as server:
        settings = settings_for(api(server.address, role_play=role_play), **{name: "{{ question }} {# {{ prompt }} #}"})
        with pytest.raises(InputError, match=rf"voting.{name} asks the same question .*write {{{{ prompt }}}} where"):
            ask(settings, cache)
    assert not server.asked


def test_every_example_ends_with_one_vote_or_a_reasoned_abstention_under_faults(cache):
    """30 % of the calls fail, in every way; what is finally answered was answered once."""
    kinds = ["rate_limit", "crash", "hang", "cut_json", "cut_body", "nonsense"]
    generator = random.Random(0)
    faults = [generator.choice(kinds) if generator.random() < 0.3 else None for _ in range(1000)]
    faults[0] = None
    server = Server(lambda q: f"System {1 + number_in(q) % 2}", fault=lambda number: faults[number])
    with server.running():
        voted = ask(settings_for(api(server.address)), cache)
        assert len(server.asked) > len(EXAMPLES)
        asked = len(server.asked)
        assert ask(settings_for(api(server.address)), cache)["votes"] == voted["votes"]
        assert len(server.asked) == asked, "a cached answer was asked for again"
    abstained = 0
    for i, ([system], [reason]) in enumerate(zip(voted["votes"], voted["reasons"], strict=True)):
        assert (system, reason) in {(1 + i % 2, ""), (0, "no verdict in the last line")}
        abstained += system == 0
    assert 0 < abstained < 20
    assert set(server.answered.values()) == {1} and len(server.answered) == len(EXAMPLES)


def test_retry_after_is_respected(cache):
    server = Server(fault=lambda number: "rate_limit" if number == 2 else None, retry_after="1")
    with server.running():
        ask(settings_for(api(server.address)), cache, EXAMPLES[:6])
    assert len(server.waited) == 1 and server.waited[0] >= 1.0


def test_a_call_that_keeps_failing_is_an_abstention_that_the_next_run_asks_again(cache):
    server = Server(fault=lambda number: "crash" if number in (3, 4) else None)
    with server.running():
        profile = settings_for(api(server.address, retries=1, concurrency=1))
        voted = ask(profile, cache, EXAMPLES[:6])
        assert [v for [v] in voted["votes"]].count(0) == 1
        assert [r for [r] in voted["reasons"] if r] == ["refused: Error code: 500 - boom"]
        before = len(server.asked)
        assert [v for [v] in ask(profile, cache, EXAMPLES[:6])["votes"]] == [1] * 6
        assert len(server.asked) == before + 1


def test_the_voting_phase_repeats_failed_calls_only_when_asked_to(project):

    # Of one try each, the seventh call fails, once.
    with Server(lambda q: "System 2", fault=lambda number: "crash" if number == 6 else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        assert sum(split.votes(settings)["failed"]) == 1
        before = len(server.asked)
        assert sum(split.votes(settings)["failed"]) == 1 and len(server.asked) == before
        again = split.votes(settings, retry=True)
        assert not any(again["failed"]) and set(again["system"]) == {2} and len(server.asked) == before + 1


def test_another_name_or_limit_makes_the_votes_again_from_the_answers_that_are_kept(project):

    def fault(number):
        return (200, server.completion("It takes", "length")) if server.limits[number] < 100 and number == 6 else None

    with Server(fault=fault).running() as server:
        first = split.votes(settings_for(api(server.address, max_tokens=50, concurrency=1)))
        asked = len(server.asked)
        assert len(first) == asked and sum(system == 0 for [system] in first["votes"]) == 1
        kept = [
            r for [r] in split.votes(settings_for(api(server.address, name="renamed", max_tokens=50)))["reasons"] if r
        ]
        assert kept == ["reached max_tokens before a verdict"] and len(server.asked) == asked
        raised = split.votes(settings_for(api(server.address, name="renamed", max_tokens=500)))
        assert {system for [system] in raised["votes"]} == {1} and len(server.asked) == asked + 1


def test_an_answer_cut_at_max_tokens_is_an_abstention(cache):
    with (
        Server(finish_reason="length").running() as server,
        pytest.raises(InputError, match="abstained on all of its 6 examples .*reached max_tokens"),
    ):
        ask(settings_for(api(server.address)), cache, EXAMPLES[:6])


def test_changing_the_prompt_of_one_teacher_asks_only_that_one(cache):
    with Server().running() as server:
        first, second = api(server.address), api(server.address, name="second")
        ask(settings_for(first, second, tie="undecided"), cache, EXAMPLES[:6])
        ask(settings_for(first, second | {"persona": "You are strict."}, tie="undecided"), cache, EXAMPLES[:6])
        # One teacher under two names is asked once, and again under the name whose persona changed.
        assert len(server.asked) == 12 and sum("You are strict." in q for q in server.asked) == 6


def test_what_does_not_shape_an_answer_is_not_part_of_the_cache_key(cache, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", KEY)
    with Server().running() as server:
        ask(settings_for(api(server.address)), cache, EXAMPLES[:6])
        other = {
            "name": "renamed",
            "api_key_env": "OTHER_KEY",
            "max_tokens": 9000,
            "max_tokens_field": "max_completion_tokens",
        }
        other |= {
            "concurrency": 2,
            "timeout": 9,
            "retries": 1,
            "price_in": 3,
            "base_url": f" {server.address.upper()[:4].lower()}{server.address[4:]}/",
        }
        ask(settings_for(api(server.address) | other), cache, EXAMPLES[:6])
        assert len(server.asked) == 6


def test_only_answers_that_were_cut_off_are_asked_again_under_a_higher_limit(cache):
    def fault(number):
        return (
            (200, server.completion("It takes", "length")) if server.limits[number] < 100 and number % 3 == 0 else None
        )

    with Server(fault=fault).running() as server:
        first = ask(settings_for(api(server.address, max_tokens=50, concurrency=1)), cache, EXAMPLES[:6])
        assert [reason for [reason] in first["reasons"]].count("reached max_tokens before a verdict") == 2
        for limit, asked in ((50, 6), (40, 6), (500, 8), (50, 8)):
            voted = ask(settings_for(api(server.address, max_tokens=limit, concurrency=1)), cache, EXAMPLES[:6])
            assert len(server.asked) == asked, limit
        assert [system for [system] in voted["votes"]] == [1] * 6


def test_the_dry_run_counts_a_question_of_two_names_once(cache):
    import datasets

    with Server().running() as server:
        twice = settings_for(api(server.address), api(server.address, name="second"), tie="undecided")
        pool = datasets.Dataset.from_list(EXAMPLES[:6])
        assert plan(pool, build_teachers(twice, EXAMPLES[:6]), cache)["to ask"].tolist() == [6, 0]
        assert not server.asked


NO_CREDIT = "the account has no credit left .*add credit and run again"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((402, {"error": {"message": "Insufficient Balance"}}), NO_CREDIT),
        ((403, {"error": {"message": "Forbidden", "code": "billing_hard_limit_reached"}}), NO_CREDIT),
        ((429, {"error": {"message": "Check your plan and billing details", "code": "insufficient_quota"}}), NO_CREDIT),
        ((400, {"error": {"message": "Your credit balance is too low"}}), NO_CREDIT),
        ((200, {"error": {"message": "Insufficient credits", "code": 402}}), NO_CREDIT),
        ((404, {"detail": "Not Found"}), "there is nothing at .*/v1/chat/completions .*correct base_url"),
        ((200, {"error": "Unexpected endpoint or method. (POST /chat/completions)"}), "there is nothing at "),
        ((200, "<!DOCTYPE html><p>Hello"), "base_url = .* answers with a web page.*probably /v1 is missing"),
        ((404, "<html>Nothing here", {"Content-Type": "text/html"}), "base_url = .* answers with a web page"),
        ((400, {"error": {"message": "Model Not Exist"}}), "does not know model 'teacher'.*it has teacher"),
        ((400, [{"error": {"message": "API key not valid."}}]), "refuses the key in TEACHER_KEY"),
        (
            (400, {"error": {"message": "Only the default is supported", "param": "temperature"}}),
            "refuses temperature = 0.0; set it to null",
        ),
        (
            (422, {"detail": [{"loc": ["body", "max_tokens"], "msg": "Extra inputs are not permitted"}]}),
            "set max_tokens_field to max_completion_tokens",
        ),
        ((400, {"error": {"message": "max_tokens is too large: 2048"}}), "refuses max_tokens = 2048; set it lower"),
    ],
)
def test_what_a_person_can_mend_stops_the_run_and_loses_no_answer(cache, fault, message):
    mended = False
    with Server(fault=lambda number: fault if number >= 3 and not mended else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        with pytest.raises(InputError, match=message):
            ask(settings, cache, EXAMPLES[:6])
        mended = True
        assert [system for [system] in ask(settings, cache, EXAMPLES[:6])["votes"]] == [1] * 6
        assert set(server.answered.values()) == {1}


def completion_with(finish_reason="stop", **message):
    return {"choices": [{"message": {"role": "assistant", **message}, "finish_reason": finish_reason}], "usage": None}


PASSING = {
    "408": (408, {"error": {"message": "upstream request timeout"}}),
    "409": (409, {}),
    "425": (425, "too early"),
    "429": (429, {"error": {"message": "Rate limit reached; more at /account/billing", "code": "rate_limit_exceeded"}}),
    "498": (498, {"error": {"message": "flex tier capacity exceeded"}}),
    "502": (502, "<html>Bad Gateway</html>", {"Content-Type": "text/html"}),
    "an overload that calls itself a bad request": (400, {"error": {"message": "Model is overloaded, try again"}}),
    "an error that calls itself fine": (200, {"error": {"message": "upstream failed", "code": 502}}),
    "a connection that breaks": "cut_body",
    "half an answer": "cut_json",
    "nothing": (200, ""),
    "no object": (200, "null"),
    "no choices": (200, {"choices": []}),
    "no message": (200, {"choices": [{"message": None}]}),
    "no content": (200, completion_with(content=None)),
    "blank content": (200, completion_with(content=" \n")),
    "content taken for reasoning": (200, completion_with(content="", reasoning_content="System 2")),
    "content taken for a tool call": (200, completion_with("tool_calls", content=None, tool_calls=[{"id": "1"}])),
    "broken off": (200, completion_with("insufficient_system_resource", content="It")),
    "perhaps not finished": (200, completion_with(None, content="It takes")),
}


def test_what_may_pass_is_never_kept_as_an_answer(tmp_path):
    """Some questions fail, then all of them do; the next run has a vote on every example."""
    failing = range(0)
    with Server(fault=lambda number: fault if number in failing else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        for name, fault in PASSING.items():  # noqa: B007
            with diskcache.Cache(tmp_path / name, disk=diskcache.JSONDisk) as cache:
                failing = range(len(server.asked), len(server.asked) + 3)
                with pytest.raises(
                    InputError, match="'remote': no vote yet, because its server failed on 3 of 3 .*run again"
                ):
                    ask(settings, cache, EXAMPLES[:3])
                failing = range(len(server.asked) + 1, len(server.asked) + 3)
                voted = ask(settings, cache, EXAMPLES[:3])
                assert sum(voted["failed"]) == 2 and all(reason for [reason] in voted["reasons"][1:]), name
                failing = range(0)
                assert [system for [system] in ask(settings, cache, EXAMPLES[:3])["votes"]] == [1] * 3, name


def test_a_definite_refusal_is_an_abstention_that_is_kept(tmp_path):
    refusals = [
        (400, {"error": {"message": "Invalid prompt", "code": "invalid_prompt"}}),
        (
            400,
            {"error": {"message": "The response was filtered; modify your prompt and retry", "code": "content_filter"}},
        ),
        (400, {"error": {"message": "the messages resulted in 9000 tokens", "param": "messages"}}),
        (403, {"error": {"message": "Your input was flagged by moderation"}}),
        (422, {"detail": "What is 0 + 0? cannot be processed"}),
        (200, completion_with("content_filter", content=None)),
        (200, completion_with(content=None, refusal="I cannot help with that.")),
    ]
    refused = range(0)
    with Server(fault=lambda number: fault if number in refused else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        for number, fault in enumerate(refusals):
            with diskcache.Cache(tmp_path / str(number), disk=diskcache.JSONDisk) as cache:
                refused = range(len(server.asked), len(server.asked) + 1)
                voted = ask(settings, cache, EXAMPLES[:3])
                asked = len(server.asked)
                assert [system for [system] in voted["votes"]] == [0, 1, 1] and sum(voted["failed"]) == 0, fault
                assert voted["reasons"][0][0].startswith("refused: ")
                assert ask(settings, cache, EXAMPLES[:3])["votes"] == voted["votes"] and len(server.asked) == asked


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"error": {"message": "The response was filtered", "code": "content_filter"}}),
        (400, {"error": {"message": "This model's maximum context length is 4096 tokens", "param": "messages"}}),
        (200, completion_with("content_filter", content=None) | {"usage": None}),
    ],
)
def test_a_certain_refusal_is_kept_when_no_answer_comes_after_it(cache, refusal):
    with Server(fault=lambda number: refusal if number == 2 else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        assert ask(settings, cache, EXAMPLES[:3])["votes"] == [[1], [1], [0]]
        assert ask(settings, cache, EXAMPLES[:3])["votes"] == [[1], [1], [0]] and len(server.asked) == 3


def test_a_server_that_refuses_every_question_is_asked_again_once_it_is_mended(cache):
    mended = False
    no_template = (400, {"error": {"message": "you must provide a chat template"}})
    with Server(fault=lambda number: None if mended else no_template).running() as server:
        settings = settings_for(api(server.address, concurrency=1))
        with pytest.raises(InputError, match="abstained on all of its 6 examples .*you must provide a chat template"):
            ask(settings, cache, EXAMPLES[:6])
        mended = True
        assert [system for [system] in ask(settings, cache, EXAMPLES[:6])["votes"]] == [1] * 6


def test_answers_in_other_forms_than_openais_count(cache):
    usages = [
        None,
        {},
        [],
        {"prompt_tokens": "12", "completion_tokens": "many"},
        {"prompt_tokens": -1, "completion_tokens": 3.0},
    ]
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "System 1"}]},
        {"type": "text", "text": "Hm.\n"},
    ]
    contents = ["System 2", [*parts, {"type": "text", "text": "System 2"}], "System 2<|im_end|>"]
    bodies = [completion_with(content="System 2") | {"usage": usage} for usage in usages]
    bodies += [completion_with(content=content) for content in contents]
    bodies += [completion_with(reason, content="System 2") for reason in (None, "eos", "tool_calls")]
    bodies += [completion_with(content="System 2") | {"error": None}]
    with Server(fault=lambda number: (200, bodies[number])).running() as server:
        voted = ask(settings_for(api(server.address, retries=0, concurrency=1)), cache, EXAMPLES[: len(bodies)])
    assert [system for [system] in voted["votes"]] == [2] * len(bodies)


def test_a_base_url_without_its_path_is_named_before_any_question(cache):
    page = (200, "<html>Welcome", {"Content-Type": "text/html"})
    for elsewhere, message in (
        (page, "answers with a web page"),
        ((404, {"detail": "Not Found"}), "there is nothing at"),
    ):
        with Server(elsewhere=elsewhere).running() as server:
            root = server.address.removesuffix("/v1")
            with pytest.raises(InputError, match=f"{root}.*{message}|{message}.*{root}"):
                ask(settings_for(api(root, retries=0)), cache)
            assert not server.asked
    for nowhere in ("localhost:8000/v1", "http://", "http://localhost:port", "ftp://localhost"):
        with pytest.raises(InputError, match="'remote': base_url is no server's address; write it like http://"):
            build_teachers(settings_for(api(nowhere)), EXAMPLES)


def test_no_key_is_an_error_before_any_call(cache, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    with Server().running() as server:
        with pytest.raises(InputError, match="'remote': the environment variable TEACHER_KEY is not set"):
            ask(settings_for(api(server.address)), cache)
        assert not server.asked


@pytest.mark.parametrize("written", ["sk-abcdefgh-1\r\n", "\ufeffsk-abcdefgh-1\n", "  sk-abcdefgh-1\t"])
def test_a_key_is_sent_without_white_space_around_it(cache, monkeypatch, written):
    monkeypatch.setenv("TEACHER_KEY", written)
    with Server(keys=("sk-abcdefgh-1",)).running() as server:
        assert set(ask(settings_for(api(server.address)), cache, EXAMPLES[:3])["system"]) == {1}


def everything_told(error):
    """Of an exception and all that led to it, whether shown or not."""
    told = ""
    while error is not None:
        told += "".join(traceback.format_exception(error, chain=False)) + repr(vars(error))
        error = error.__cause__ or error.__context__
    return told


def test_no_message_and_no_vote_shows_a_key(cache, monkeypatch):
    for key in ("sk-abcdefgh-Schlüssel", "sk-abc\ndefgh", "sk-abc\x7fdefgh"):
        monkeypatch.setenv("TEACHER_KEY", key)
        with pytest.raises(
            InputError, match="the key in the environment variable TEACHER_KEY has characters"
        ) as caught:
            build_teachers(settings_for(api("http://localhost")), EXAMPLES)
        assert "sk-abc" not in everything_told(caught.value)
    for pasted in ("sk-abcdefgh-1", "gsk_abcdefghijklmnopqrstuvwxyz"):
        with pytest.raises(InputError, match="api_key_env is the name of an environment variable") as caught:
            build_teachers(settings_for(api("http://localhost", api_key_env=pasted)), EXAMPLES)
        assert pasted not in everything_told(caught.value)
    monkeypatch.setenv("TEACHER_KEY", "sk-abcdefgh-12345")
    assert "sk-abc" not in repr(build_teachers(settings_for(api("http://localhost")), EXAMPLES))
    replies = [
        (401, {"error": {"message": "Incorrect API key provided: sk-abcdefgh-12345. Find yours online."}}),
        (401, {"error": {"message": "Incorrect API key provided: sk-abcde*****2345."}}),
        (403, "Bearer sk-abcdefgh-12345 has no rights"),
        (500, {"error": {"message": "header 'sk-abcdefgh…' is bad"}}),
    ]
    with Server(keys=("sk-abcdefgh-12345",), fault=lambda number: reply).running() as server:
        for reply in replies:  # noqa: B007
            with pytest.raises(InputError) as caught:
                ask(settings_for(api(server.address, retries=0, concurrency=1)), cache, EXAMPLES[:2])
            assert "sk-abc" not in everything_told(caught.value) and "[the key]" in str(caught.value)
        reply = (200, completion_with(content="My key is sk-abcdefgh-12345\nSystem 2"))
        ask(settings_for(api(server.address)), cache, EXAMPLES[:2])
        assert not any("sk-abc" in cache[key]["text"] for key in cache)


def test_user_and_password_in_a_base_url_are_sent_but_not_shown(cache):
    import base64

    class WithPassword(Server):
        def _authorised(self, handler):
            self.waited.append(handler.headers["Authorization"])
            return True

    with WithPassword(fault=lambda number: (500, {})).running() as server:
        settings = settings_for(api(server.address.replace("//", "//me:p%40ss@"), retries=0))
        with pytest.raises(InputError) as caught:
            ask(settings, cache, EXAMPLES[:2])
        assert set(server.waited) == {"Basic " + base64.b64encode(b"me:p@ss").decode()}
    with pytest.raises(InputError, match="no answer from http://127.0.0.1") as gone:
        ask(settings, cache, EXAMPLES[:2])
    for error in (caught.value, gone.value):
        assert "p%40ss" not in everything_told(error) and "p@ss" not in everything_told(error)
    assert identity(settings.voting.teachers[0], settings)["base_url"] == server.address


def test_every_teacher_is_checked_before_the_first_is_asked(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("OTHER_KEY", "guess")
    examples = [*EXAMPLES[:3], EXAMPLES[3] | {"prompt": ""}]
    template = "{{ 1 / (prompt | length) }}"
    with Server().running() as server:
        good = api(server.address)
        for second, voting, message in [
            (
                api(server.address, name="second", api_key_env="OTHER_KEY"),
                {},
                "'second': the server refuses the key in OTHER_KEY",
            ),
            (
                api(server.address, name="second", api_key_env="NO_KEY"),
                {},
                "'second': the environment variable NO_KEY is not set",
            ),
            (api("http://127.0.0.1:9/v1", name="second", retries=0), {}, "'second': no answer from"),
            ({"name": "second", "kind": "recorded", "path": str(tmp_path)}, {}, "'second': path = .*directory"),
            (
                api(server.address, name="second", role_play=False),
                {"plain_template": template},
                "voting.plain_template: division",
            ),
        ]:
            with pytest.raises(InputError, match=message):
                ask(settings_for(good, second, tie="undecided", **voting), cache, examples)
        assert not server.asked


def test_wrong_key_wrong_model_and_unreachable_server_cost_no_answer(cache, monkeypatch):
    with Server().running() as server:
        with pytest.raises(InputError, match="does not know model 'nobody'.*it has teacher"):
            ask(settings_for(api(server.address, model="nobody")), cache)
        monkeypatch.setenv("TEACHER_KEY", "guess")
        with pytest.raises(InputError, match="refuses the key in TEACHER_KEY"):
            ask(settings_for(api(server.address)), cache)
        assert not server.answered
    with pytest.raises(InputError, match=rf"no answer from {server.address}.*start the server or correct base_url"):
        ask(settings_for(api(server.address, retries=0)), cache)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "No such file.*name a CSV or Parquet file"),
        ("id\ne0\n", "lacks column system; it has id"),
        ("id,system\ne0,1\ne0,2\ne1,1\n", "id 'e0' is there twice"),
        ("id,system\ne0,1\n", "2 of 3 examples have no vote, first 'e1'"),
        ("id,system\ne0,1\ne1,1\ne2,2\nx9,1\n", "1 ids are not of this pool's training split, first 'x9'"),
        ("id,system\ne0,1\ne1,1\ne2,3\n", "id 'e2' has system = 3; use 1, 2, or 0"),
        ("id,system\ne0,1\ne1,1\ne2,System 2\n", "id 'e2' has system = System 2; use 1, 2, or 0 .*line 4"),
        ("id,system\ne0,System 1\ne1,System 2\ne2,?\n", "id 'e2' has system = \\?; use 1, 2, or 0 .*line 4"),
        ("id,system\ne0,True\ne1,False\ne2,True\n", "id 'e0' has system = True; use 1, 2, or 0"),
        ("id,system\ne0,1\ne1,\ne2,2\n", "id 'e1' has no system; use 1, 2, or 0 for an abstention"),
        ("id,system\ne0,1\ne1\ne2,2\n", "id 'e1' has no system"),
        ("id,system\ne0,1\n,2\n", "line 3 has no id"),
        ("id,system,system\ne0,1,1\n", "has column system more than once"),
        ("id,prompt,system\ne0,one, two,1\n", "line 2 .*has more cells than the first line has columns"),
        ("id,system\n0,1\n1,1\n2,2\n", "3 of 3 examples have no vote, first 'e0'; 3 ids .*first '0' .*spreadsheet"),
        ("who;what\ne0;1\n", "lacks column id, system; it has who, what"),
        ("", "is empty; name a CSV or Parquet file with columns id and system"),
        (b"PK\x03\x04 xl/workbook.xml", "is a spreadsheet or an archive; save it as CSV"),
        ("id,system\né0,1\n".encode("latin-1"), "is no UTF-8 text; save it as CSV in UTF-8"),
        ("id,system\ne0,1\n".encode("utf-16-le"), "is no UTF-8 text; save it as CSV in UTF-8"),
        (b"PAR1 and nothing else", "is not readable as Parquet"),
    ],
)
def test_malformed_recorded_votes_are_named(tmp_path, rows, message):
    path = tmp_path / "votes.csv"
    if rows is not None:
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    settings = settings_for({"name": "file", "kind": "recorded", "path": str(path)})
    with pytest.raises(InputError, match=message):
        build_teachers(settings, EXAMPLES[:3])


PLAIN = "id,system\ne0,1\ne1,2\ne2,0\n"


@pytest.mark.parametrize(
    "rows",
    [
        PLAIN.encode(),
        b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        PLAIN.encode("utf-16"),
        PLAIN.replace(",", ";").encode(),
        b"sep=;\r\n" + PLAIN.replace(",", ";").encode(),
        PLAIN.replace(",", "\t").encode(),
        PLAIN.replace(",", ", ").encode(),
        b'"id", "system"\n"e0", "1"\n"e1", "2"\n"e2", "0"\n',
        b"\nID,System\ne0,1\ne1,2\ne2,0\n,\n\n",
        b",id,system\n0,e0,1\n1,e1,2\n2,e2,0\n",
        b'id,prompt,system\ne0,"one, two",1.0\ne1,"a ""word"",\nand more",2.00\ne2,,0.0\n',
        b'id;system\ne0;1,0\ne1;"2,0"\ne2;0\n',
        b"id,system\ne0,System 1\ne1,system2\ne2,0\n",
        b"id,system\ne0,S1\ne1,S2\ne2,0\n",
    ],
)
def test_votes_are_read_as_spreadsheets_write_them(tmp_path, monkeypatch, rows):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "votes.csv").write_bytes(rows)
    [teacher] = build_teachers(settings_for({"name": "file", "kind": "recorded", "path": "~/votes.csv"}), EXAMPLES[:3])
    ballots = {}
    teacher.ask(EXAMPLES[:3], ballots.__setitem__)
    assert [ballots[i].system for i in range(3)] == [1, 2, 0]


def test_recorded_votes_are_counted_beside_others(tmp_path, cache):
    import pandas as pd

    frame = pd.DataFrame({"id": [e["id"] for e in EXAMPLES], "system": [i % 3 for i in range(60)]})
    frame.to_parquet(tmp_path / "votes.parquet")
    recorded = {"name": "file", "kind": "recorded", "path": str(tmp_path / "votes.parquet")}
    voted = ask(settings_for(recorded), cache)
    assert [v for [v] in voted["votes"]] == [i % 3 for i in range(60)]
    assert voted["system"] == [i % 3 for i in range(60)]


def voting_command(project, server, **options):
    """The command that asks a profile's one teacher, which is behind the server, about 48 examples."""
    smoke = (ROOT / "profiles" / "smoke.yaml").read_text()
    head, tail = smoke.split("voting:\n")[0], smoke.split("importance:", 1)[1]
    teacher = json.dumps(api(server.address, timeout=5, retries=1) | options)
    profile = project / "profiles" / "remote.yaml"
    profile.write_text(f"{head}voting:\n  teachers: [{teacher}]\nimportance:{tail}")
    return [sys.executable, "-m", "lorapar_utils.voting.split", "remote"]


def kept_votes(project):
    with diskcache.Cache(project / "runs" / "vote_cache", disk=diskcache.JSONDisk) as cache:
        return len(cache)


def test_two_processes_that_vote_at_once_ask_each_question_once(project):
    with Server(lambda q: "System 2", latency=0.1).running() as server:
        command = voting_command(project, server)
        both = [subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        told = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all("System 2: 48" in said for said in told)
    assert len(server.asked) == len(set(server.asked)) == 48


def test_control_c_ends_a_wait_that_the_server_asked_for(project):
    limited = True
    server = Server(retry_after="60", fault=lambda number: "rate_limit" if limited and number >= 10 else None)
    with server.running():
        command = voting_command(project, server, concurrency=4)
        process = subprocess.Popen(command, cwd=project, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(server.refused_at) < 4 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(timeout=60) != 0 and time.monotonic() - began < 5
        assert kept_votes(project) == len(server.answered) == 10
        limited = False
        assert subprocess.run(command, cwd=project, capture_output=True).returncode == 0
    assert set(server.answered.values()) == {1} and len(server.answered) == 48


def test_what_ends_the_run_is_said_while_other_calls_are_under_way(cache):
    faults = {1: (402, {"error": {"message": "Insufficient Balance"}})} | dict.fromkeys((2, 3, 4), "slow")
    with Server(fault=faults.get).running() as server:
        settings = settings_for(api(server.address, concurrency=4, timeout=9, retries=0))
        began = time.monotonic()
        with pytest.raises(InputError, match="no credit left"):
            ask(settings, cache, EXAMPLES[:20])
        assert time.monotonic() - began < 1
        while len(cache) < 4 and time.monotonic() - began < 9:
            time.sleep(0.05)
        assert set(ask(settings, cache, EXAMPLES[:20])["system"]) == {1}
        assert set(server.answered.values()) == {1} and len(server.answered) == 20


def test_a_process_ends_when_the_calls_under_way_are_kept(project):
    faults = {1: (402, {"error": {"message": "Insufficient Balance"}})} | dict.fromkeys((2, 3, 4), "slow")
    with Server(fault=faults.get).running() as server:
        command = voting_command(project, server, concurrency=4)
        process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
        assert any("no credit left" in line for line in process.stderr)
        assert process.wait() == 2
        assert kept_votes(project) == len(server.answered) == 4
        process.stderr.close()


@pytest.mark.parametrize("damage", ["garbage", "cut"])
def test_a_damaged_cache_of_votes_is_named(project, damage):

    with Server().running() as server:
        settings = settings_for(api(server.address))
        split.votes(settings)
        database = project / "runs" / "vote_cache" / "cache.db"
        if damage == "garbage":
            database.write_bytes(b"no database" * 1000)
        else:
            database.write_bytes(database.read_bytes()[: database.stat().st_size // 2])
        with pytest.raises(InputError, match="vote_cache is damaged .*answers in it are lost: move that folder away"):
            split.voting_plan(settings)
        database.parent.rename(project / "damaged")
        assert split.voting_plan(settings)["to ask"].tolist() == [48]


def test_what_this_machine_computes_is_asked_anew_in_another_dtype_or_by_other_libraries(project, monkeypatch):
    settings = [load_profile("smoke", model={"dtype": dtype}) for dtype in ("float32", "bfloat16")]
    keys = {build_teachers(one, EXAMPLES)[0].key for one in settings}
    monkeypatch.setattr("lorapar_utils.voting.teachers.libraries", lambda: {"torch": "another"})
    keys.add(build_teachers(settings[0], EXAMPLES)[0].key)
    assert len(keys) == 3


def test_a_dry_run_counts_what_is_asked_of_local_teachers_and_shows_a_prompt(project, capsys):
    assert split.main(["smoke", "--dry-run"]) == 0
    table, prompt = capsys.readouterr().out.split("\n\n", maxsplit=1)
    questions = {line.split()[0]: line.split()[3] for line in table.splitlines()[1:]}
    assert questions == {"psychologist": "48", "tutor": "48", "examiner": "48"}
    assert prompt.startswith("psychologist: ") and "Question: " in prompt


def test_a_dry_run_needs_no_key_and_shows_the_prompt_of_who_is_still_to_be_asked(project, capsys, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    votes = "".join(f"{row['id']},1\n" for row in data.load_pool(load_profile("smoke")) if row["split"] == "train")
    (project / "profiles/votes.csv").write_text(f"id,system\n{votes}")
    teachers = [{"kind": "recorded", "name": "file", "path": "votes.csv"}, api("http://127.0.0.1:9/v1")]
    profile = {"extends": "smoke", "voting": {"teachers": teachers, "tie": "undecided"}}
    (project / "profiles/mine.yaml").write_text(yaml.safe_dump(profile))
    assert split.main(["mine", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "\n\nremote: " in told and "not set yet: TEACHER_KEY; " in told


@pytest.mark.parametrize("pasted", ["sk-abcdefgh-1", "gsk_abcdefghijklmnopqrstuvwxyz", "A=B", ""])
def test_a_dry_run_shows_no_key_that_stands_in_the_place_of_its_variable(project, capsys, pasted):
    profile = {"extends": "smoke", "voting": {"teachers": [api("http://127.0.0.1:9/v1", api_key_env=pasted)]}}
    (project / "profiles/mine.yaml").write_text(yaml.safe_dump(profile))
    assert split.main(["mine", "--dry-run"]) == 2
    told = "".join(capsys.readouterr())
    assert "api_key_env is the name of an environment variable" in told and not (pasted and pasted in told)


def test_after_kill_9_only_what_is_missing_is_asked(project, monkeypatch):
    """Killed at five random points, and run once more: counted at the server."""
    generator = random.Random(1)
    concurrency, total = 4, 48
    with Server(lambda q: "System 2", latency=0.1).running() as server:
        command = voting_command(project, server, concurrency=concurrency)
        kept = 0
        for kills in range(1, 6):
            asked_before, goal = len(server.asked), sum(server.answered.values()) + generator.randint(1, 8)
            process = subprocess.Popen(command, cwd=project, stderr=subprocess.DEVNULL, start_new_session=True)
            while sum(server.answered.values()) < goal and process.poll() is None:
                time.sleep(0.005)
            process.send_signal(signal.SIGKILL)
            process.wait()
            asked_now = server.asked[asked_before:]
            assert len(set(asked_now)) == len(asked_now) <= total - kept
            kept = kept_votes(project)
            # At most the calls in flight at the kill are not kept.
            assert sum(server.answered.values()) - kept <= kills * concurrency
        asked_before = len(server.asked)
        done = subprocess.run(command, cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "System 2: 48" in done.stdout
        assert len(server.asked) - asked_before == total - kept


@pytest.fixture(scope="module")
def target():
    """The packaged model, in fp32."""
    from lorapar_utils import models

    settings = load_profile("smoke", model={"dtype": "float32"})
    return models.load_base(settings)


@pytest.mark.slow
def test_label_margins_equal_the_decision_pipeline_of_transformers(target):
    """An independent reading of the same logits: `pipeline("decision")`, one prompt a pass."""
    import math

    from transformers.pipelines import pipeline

    from lorapar_utils.fast.label_scores import label_margins

    model, tokenizer = target
    decide = pipeline("decision", model=model, tokenizer=tokenizer)
    states = [f"{e['prompt']} It is {e['answer']}." for e in EXAMPLES[:7]] + ["What is the capital of France? Paris."]
    expected = []
    for state in states:
        question = {"type": "noul", "instructions": "Does the answer need several steps?"}
        answer = decide({"state": state, "questions": {"steps": question}})["steps"]
        expected.append(math.log(answer["noul"] / (1 - answer["noul"])))  # the probability of yes
    prompts = [f"{state}\n\nDoes the answer need several steps?\nAnswer Yes or No only." for state in states]
    found = label_margins(model, tokenizer, prompts, ("No", "Yes"))
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_labels_of_several_tokens_are_summed(target):
    import torch

    from lorapar_utils.fast.label_scores import label_margins

    model, tokenizer = target
    labels = ("System 1", "System 2")
    expected = []
    for question in ("What is 1 + 1?", "Name the capital of France, and say why it became the capital."):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(prompt, add_special_tokens=False).input_ids
        totals = []
        for label in labels:
            ids = torch.tensor([start + tokenizer(label, add_special_tokens=False).input_ids])
            with torch.no_grad():
                log_probs = model(ids).logits.log_softmax(-1)[0, :-1]
            totals.append(sum(log_probs[i, ids[0, i + 1]] for i in range(len(start) - 1, ids.shape[1] - 1)))
        expected.append(float(totals[1] - totals[0]))
    found = label_margins(
        model, tokenizer, ["What is 1 + 1?", "Name the capital of France, and say why it became the capital."], labels
    )
    assert found == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_a_real_openai_compatible_server(tmp_path):
    """`transformers serve` with the packaged model: real requests, real answers; each ends as a vote or abstention."""

    folder = files.packaged_model()
    with transformers_serve(folder, tmp_path / "serve.log") as address:
        teacher = api(address, model=str(folder), timeout=60, concurrency=2, max_tokens=24)
        ballots = {}
        [built] = build_teachers(settings_for(teacher), EXAMPLES)
        built.ask(EXAMPLES[:4], ballots.__setitem__)
    # A model of this size seldom ends with a verdict: what counts is that nothing else is taken for one.
    assert sorted(ballots) == [0, 1, 2, 3]
    for ballot in ballots.values():
        assert (ballot.system in (1, 2)) == (ballot.reason == "")
        assert ballot.final and ballot.text and ballot.tokens_in > 20 and 0 < ballot.tokens_out <= 24


@pytest.mark.parametrize("mark", ["-", "#", " ", "!", "$", "<b>"])
def test_a_teacher_that_repeats_one_mark_without_end_is_read_at_once(mark):
    # A pattern that tried every beginning would take minutes.
    assert parse_vote("x\n" + mark * 100_000 + "x")[0] == 0


@pytest.mark.parametrize("message", ["Organization has been restricted", "Bad Request", "内部エラー"])
@pytest.mark.parametrize("answered", [range(0, 7), (0, 4, 9)], ids=["then broken", "mostly broken"])
def test_a_lasting_fault_of_the_server_is_asked_again_whatever_its_words(cache, message, answered):
    """It calls its own fault a bad request: from the eighth question on, or for most of them."""
    fault = (400, {"error": {"message": message}})
    mended = False
    with Server(fault=lambda number: None if mended or number in answered else fault).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        assert sum(ask(settings, cache, EXAMPLES[:10])["failed"]) == 10 - len(answered)
        mended = True
        assert [system for [system] in ask(settings, cache, EXAMPLES[:10])["votes"]] == [1] * 10
        assert set(server.answered.values()) == {1}


@pytest.mark.parametrize("message", ["Model unloaded.", "The model has crashed", "CUDA out of memory"])
def test_a_fault_that_says_it_may_pass_is_asked_again(cache, message):
    fault = (400, {"error": {"message": message}})
    with Server(fault=lambda number: fault if number == 2 else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        assert ask(settings, cache, EXAMPLES[:6])["failed"] == [0, 0, 1, 0, 0, 0]
        assert [system for [system] in ask(settings, cache, EXAMPLES[:6])["votes"]] == [1] * 6
