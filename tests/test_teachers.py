"""API teachers against a real server on loopback, faults included; recorded votes; what counts as an answer."""

import random
import signal
import subprocess
import sys
import time

import diskcache
import pytest
from api_server import Server, transformers_serve
from conftest import ROOT

from lorapar_utils.errors import InputError
from lorapar_utils.settings import load_profile
from lorapar_utils.teachers import build_teachers, parse_vote, teacher_prompt
from lorapar_utils.voting import vote

EXAMPLES = [{"id": f"e{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(60)]


@pytest.fixture
def cache(tmp_path):
    with diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk) as opened:
        yield opened


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")


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


def test_role_play_names_the_target_model():
    settings = settings_for(api("http://x"), api("http://x", name="plain", role_play=False), tie="undecided")
    played, plain = (teacher_prompt(t, EXAMPLES[3], settings) for t in settings.voting.teachers)
    assert "SmolLM2-135M" in played and "SmolLM2-135M" not in plain
    assert "What is 3 + 3?" in plain and "Answer: 6" in plain and plain.endswith("System 1 or System 2.")


def test_a_template_with_an_unknown_variable_is_named():
    settings = settings_for(api("http://x"), role_play_template="{{ pormpt }}")
    with pytest.raises(InputError, match=r"voting.role_play_template: 'pormpt' is undefined; it may use target"):
        teacher_prompt(settings.voting.teachers[0], EXAMPLES[0], settings)


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
    from lorapar_utils import splits

    # Of one try each, the seventh call fails, once.
    with Server(lambda q: "System 2", fault=lambda number: "crash" if number == 6 else None).running() as server:
        settings = settings_for(api(server.address, retries=0, concurrency=1))
        assert sum(splits.votes(settings)["failed"]) == 1
        before = len(server.asked)
        assert sum(splits.votes(settings)["failed"]) == 1 and len(server.asked) == before
        again = splits.votes(settings, retry=True)
        assert not any(again["failed"]) and set(again["system"]) == {2} and len(server.asked) == before + 1


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
        assert len(server.asked) == 18 and sum("You are strict." in q for q in server.asked) == 6


def test_logistics_are_not_part_of_the_cache_key(cache):
    with Server().running() as server:
        ask(settings_for(api(server.address)), cache, EXAMPLES[:6])
        ask(settings_for(api(server.address, concurrency=2, timeout=9, retries=1, price_in=3)), cache, EXAMPLES[:6])
        assert len(server.asked) == 6


def test_no_key_is_an_error_before_any_call(cache, monkeypatch):
    monkeypatch.delenv("TEACHER_KEY")
    with Server().running() as server:
        with pytest.raises(InputError, match="'remote': the environment variable TEACHER_KEY is not set"):
            ask(settings_for(api(server.address)), cache)
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
    ],
)
def test_malformed_recorded_votes_are_named(tmp_path, rows, message):
    path = tmp_path / "votes.csv"
    if rows is not None:
        path.write_text(rows)
    settings = settings_for({"name": "file", "kind": "recorded", "path": str(path)})
    with pytest.raises(InputError, match=message):
        build_teachers(settings, EXAMPLES[:3])


def test_recorded_votes_are_counted_beside_others(tmp_path, cache):
    import pandas as pd

    frame = pd.DataFrame({"id": [e["id"] for e in EXAMPLES], "system": [i % 3 for i in range(60)]})
    frame.to_parquet(tmp_path / "votes.parquet")
    recorded = {"name": "file", "kind": "recorded", "path": str(tmp_path / "votes.parquet")}
    voted = ask(settings_for(recorded), cache)
    assert [v for [v] in voted["votes"]] == [i % 3 for i in range(60)]
    assert voted["system"] == [i % 3 for i in range(60)]


def test_after_kill_9_only_what_is_missing_is_asked(project, monkeypatch):
    """Killed at five random points, and run once more: counted at the server."""
    generator = random.Random(1)
    profile = project / "profiles" / "remote.yaml"
    concurrency, total = 4, 48
    with Server(lambda q: "System 2", latency=0.1).running() as server:
        smoke = (ROOT / "profiles" / "smoke.yaml").read_text()
        teachers = f"""
voting:
  teachers:
    - {{name: remote, kind: api, role_play: true, model: teacher, base_url: "{server.address}", api_key_env: TEACHER_KEY,
       concurrency: {concurrency}, timeout: 5}}
"""
        head, tail = smoke.split("voting:\n")[0], smoke.split("importance:", 1)[1]
        profile.write_text(head + teachers + "importance:" + tail)
        command = [sys.executable, "-m", "lorapar_utils.splits", "remote"]
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
            with diskcache.Cache(project / "runs" / "vote_cache", disk=diskcache.JSONDisk) as cache:
                kept = len(cache)
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

    from lorapar_utils.label_scores import label_margins

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

    from lorapar_utils.label_scores import label_margins

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
    from lorapar_utils import models

    folder = models.packaged_model()
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
