"""The kinds of teacher: a local model, an OpenAI-compatible server, recorded votes (paper, section 3.1).

Deviation: the paper's teachers are large reasoning models that answer in words, as `api` teachers do. A `local`
teacher is read by the log-likelihood of its two labels, so that every vote comes with a margin.
"""

import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import jinja2
import openai
import pandas as pd
import tenacity
from openai.types.chat import ChatCompletion

from lorapar_utils.errors import InputError
from lorapar_utils.records import fingerprint
from lorapar_utils.settings import ApiTeacher, LocalTeacher, RecordedTeacher, Settings
from lorapar_utils.voting import Ballot, Teacher

VERDICT = re.compile(r"(?:(?:final\s+)?(?:answer|verdict|vote|classification)\s*(?:is\s*)?:?)?\s*system\s*([12])", re.I)
THINKING = re.compile(r"</?think(?:ing)?>", re.I)
# What changes how fast or at what price a question is asked, not how it is answered.
LOGISTICS = {"concurrency", "timeout", "retries", "price_in", "price_out"}


def build_teachers(settings: Settings, examples: Sequence[dict]) -> list[Teacher]:
    """The profile's teachers, each checked as far as it can be before anything is asked.

    Raises
    ------
    InputError
        A template that names an unknown variable; of an API teacher: no key, an unreachable server, a refused key; of
        recorded votes: a missing file or column, missing, repeated or unknown ids, a vote that is not 0, 1 or 2.
    """

    @functools.cache
    def load(source: str | None, gguf_file: str | None):
        """Teachers over the same model share it, and it is loaded only if there is something to ask."""
        from lorapar_utils import models

        other = {"source": source, "gguf_file": gguf_file, "revision": None}
        return models.load_base(settings if source is None else settings.changed(model=other))

    ids = [example["id"] for example in examples]
    makers = {
        "local": lambda section: _local(section, settings, load),
        "api": lambda section: _api(section, settings),
        "recorded": lambda section: _recorded(section, ids),
    }
    return [makers[section.kind](section) for section in settings.voting.teachers]


def identity(section: LocalTeacher | ApiTeacher | RecordedTeacher, settings: Settings) -> dict:
    """All that shapes a teacher's answers: what its votes are kept under."""
    told = section.model_dump(exclude=LOGISTICS)
    if section.kind == "recorded":
        return told | {"sha256": hashlib.sha256(_read_bytes(section)).hexdigest()}
    if section.kind == "local" and section.source is None:
        return told | {"model": settings.model.model_dump(exclude={"system_prompt"})}
    return told


# --- what a teacher reads, and what it answers ---------------------------------------------------------------


def teacher_prompt(section: LocalTeacher | ApiTeacher, example: dict, settings: Settings) -> str:
    """The profile's template, filled in: with role play it names the target model."""
    source = settings.voting.role_play_template if section.role_play else settings.voting.plain_template
    try:
        return (
            _template(source)
            .render(
                target=settings.model.target_name,
                persona=section.persona,
                question=section.question,
                prompt=example["prompt"],
                answer=example["answer"],
            )
            .strip()
        )
    except jinja2.TemplateError as error:
        kind = "role_play_template" if section.role_play else "plain_template"
        raise InputError(f"voting.{kind}: {error}; it may use target, persona, prompt, answer and question") from None


@functools.cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)


def parse_vote(text: str) -> tuple[int, str]:
    """The system that an answer ends with, and ""; or 0 and why it is an abstention.

    The last line has to say `System 1` or `System 2` and nothing else (`Answer:` before it and marks around it are
    accepted). Reasoning before it, in `<think>` tags or not, is skipped. Anything else is never guessed at.
    """
    visible = THINKING.split(text)[-1] if re.search(r"</think(?:ing)?>", text, re.I) else text
    if THINKING.search(visible):
        return 0, "stopped while thinking"
    lines = [line.strip() for line in visible.splitlines() if line.strip()]
    if not lines:
        return 0, "empty answer"
    found = VERDICT.fullmatch(lines[-1].strip("*_#`\"'.:!() \t"))
    return (int(found[1]), "") if found else (0, "no verdict in the last line")


# --- local models --------------------------------------------------------------------------------------------


def _local(section: LocalTeacher, settings: Settings, load: Callable) -> Teacher:
    prompt = functools.partial(teacher_prompt, section, settings=settings)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        from lorapar_utils.label_scores import label_margins

        model, tokenizer = load(section.source, section.gguf_file)
        texts = [prompt(example) for example in asked]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # so that a batch is padded little
        size = settings.voting.batch_size
        for chosen in (order[start : start + size] for start in range(0, len(order), size)):
            margins = label_margins(model, tokenizer, [texts[i] for i in chosen], section.labels)
            for i, margin in zip(chosen, margins, strict=True):
                answered(i, Ballot(margin=margin))

    return Teacher(section.name, fingerprint(identity(section, settings)), prompt, ask)


# --- OpenAI-compatible servers -------------------------------------------------------------------------------


class _Garbled(Exception):
    """A 200 whose body is no chat completion."""


def _api(section: ApiTeacher, settings: Settings) -> Teacher:
    key = os.environ.get(section.api_key_env)
    if not key:
        raise InputError(
            f"teacher {section.name!r}: the environment variable {section.api_key_env} is not set; "
            "put the server's key there (any word, for a server without keys)"
        )
    prompt = functools.partial(teacher_prompt, section, settings=settings)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        client = openai.OpenAI(
            base_url=section.base_url, api_key=key, timeout=section.timeout, max_retries=section.retries
        )
        lock = threading.Lock()

        def answer(i: int) -> None:
            ballot = _ask_server(client, section, prompt(asked[i]))
            with lock:  # kept by the thread that got it: what was paid for is never lost
                answered(i, ballot)

        _check_server(client, section)
        # The first question alone: a wrong model name then costs one refused call, not one a thread.
        answer(0)
        pool = ThreadPoolExecutor(section.concurrency)
        try:
            for future in as_completed([pool.submit(answer, i) for i in range(1, len(asked))]):
                future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return Teacher(
        section.name,
        fingerprint(identity(section, settings)),
        prompt,
        ask,
        price_in=section.price_in,
        price_out=section.price_out,
        max_tokens=section.max_tokens,
    )


def _check_server(client: openai.OpenAI, section: ApiTeacher) -> None:
    """Reachable, and the key accepted? Listing models is free; servers that don't list them are asked nonetheless."""
    try:
        client.with_options(max_retries=min(section.retries, 2)).models.list()
    except openai.APIConnectionError as error:
        raise _unreachable(section, client, error) from None
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise _refused(section, error) from None
    except (openai.APIError, json.JSONDecodeError):
        return


def _ask_server(client: openai.OpenAI, section: ApiTeacher, prompt: str) -> Ballot:
    """One question. Retries, backoff and Retry-After are the client's; a garbled body is tried again as often."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Garbled),
        stop=tenacity.stop_after_attempt(section.retries + 1),
        wait=tenacity.wait_random_exponential(max=8),
        reraise=True,
    )
    options = {section.limit_field: section.max_tokens}
    if section.temperature is not None:
        options["temperature"] = section.temperature
    try:
        completion = retrying(_complete, client, section, prompt, options)
    except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
        raise _refused(section, error) from None
    except openai.NotFoundError as error:
        raise InputError(
            f"teacher {section.name!r}: the server at {client.base_url} does not know model {section.model!r} "
            f"({error.message}); {_models_there(client)}"
        ) from None
    except openai.APITimeoutError:
        return Ballot(system=0, reason=f"no answer within {section.timeout:g} s", final=False)
    except openai.APIConnectionError as error:
        raise _unreachable(section, client, error) from None
    except openai.RateLimitError as error:
        if error.code == "insufficient_quota":
            raise InputError(
                f"teacher {section.name!r}: the account has no credit left; answered votes are kept, so add credit "
                "and run again"
            ) from None
        return Ballot(system=0, reason="rate limit, after every retry", final=False)
    except openai.APIStatusError as error:
        # A 4xx is the server's last word on this question (a content filter, say); a 5xx may pass.
        return Ballot(system=0, reason=f"refused: {error.message[:200]}", final=error.status_code < 500)
    except _Garbled as error:
        return Ballot(system=0, reason=f"garbled answer: {error}", final=False)
    return _ballot(completion)


def _complete(client: openai.OpenAI, section: ApiTeacher, prompt: str, options: dict) -> ChatCompletion:
    try:
        completion = client.chat.completions.create(
            model=section.model,
            messages=[{"role": "user", "content": prompt}],
            **options,
        )
    except (json.JSONDecodeError, openai.APIResponseValidationError) as error:
        raise _Garbled(str(error)[:100]) from None
    if not isinstance(completion, ChatCompletion) or not completion.choices or completion.choices[0].message is None:
        raise _Garbled("no choices in the body")
    return completion


def _ballot(completion: ChatCompletion) -> Ballot:
    choice, usage = completion.choices[0], completion.usage
    text = choice.message.content or ""
    if choice.message.refusal:
        system, reason = 0, f"refused: {choice.message.refusal[:200]}"
    elif choice.finish_reason == "length":
        system, reason = 0, "reached max_tokens before a verdict"
    else:
        system, reason = parse_vote(text)
    return Ballot(
        system=system,
        reason=reason,
        text=text,
        tokens_in=usage.prompt_tokens if usage else 0,
        tokens_out=usage.completion_tokens if usage else 0,
    )


def _models_there(client: openai.OpenAI) -> str:
    try:
        names = [model.id for model in client.models.list()]
    except (openai.APIError, json.JSONDecodeError):
        names = []
    return f"it has {', '.join(names[:10])}" if names else "check the model's name"


def _unreachable(section: ApiTeacher, client: openai.OpenAI, error: Exception) -> InputError:
    return InputError(
        f"teacher {section.name!r}: no answer from {client.base_url} ({error.__cause__ or error}); start the server or "
        "correct base_url; answered votes are kept"
    )


def _refused(section: ApiTeacher, error: openai.APIStatusError) -> InputError:
    return InputError(
        f"teacher {section.name!r}: the server refuses the key in {section.api_key_env} ({error.message}); "
        "answered votes are kept"
    )


# --- recorded votes ------------------------------------------------------------------------------------------


def _recorded(section: RecordedTeacher, ids: Sequence[str]) -> Teacher:
    cast = _read_votes(section, ids)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        for i, example in enumerate(asked):
            system = cast[example["id"]]
            answered(i, Ballot(system=system, reason="" if system else "recorded as an abstention"))

    return Teacher(section.name, None, lambda example: "", ask)


def _read_votes(section: RecordedTeacher, ids: Sequence[str]) -> dict[str, int]:
    where = f"teacher {section.name!r}: {section.path}"
    _read_bytes(section)
    try:
        frame = (pd.read_parquet if section.path.endswith(".parquet") else pd.read_csv)(section.path)
    except (ValueError, OSError) as error:
        raise InputError(f"{where} is not readable: {error}") from None
    if missing := {"id", "system"} - set(frame.columns):
        raise InputError(f"{where} lacks column {', '.join(sorted(missing))}; it has {', '.join(frame.columns)}")
    frame["id"] = frame["id"].astype(str)
    if repeated := frame["id"][frame["id"].duplicated()].tolist():
        raise InputError(f"{where}: id {repeated[0]!r} is there twice; keep one vote an example")
    if missing := sorted(set(ids) - set(frame["id"])):
        raise InputError(f"{where}: {len(missing)} of {len(ids)} examples have no vote, first {missing[0]!r}")
    if unknown := sorted(set(frame["id"]) - set(ids)):
        raise InputError(
            f"{where}: {len(unknown)} ids are not of this pool's training split, first {unknown[0]!r}; "
            "was it recorded on another pool or seed?"
        )
    wrong = frame[~frame["system"].isin([0, 1, 2])]
    if len(wrong):
        row = wrong.iloc[0]
        raise InputError(f"{where}: id {row['id']!r} has system = {row['system']}; use 1, 2, or 0 for an abstention")
    return dict(zip(frame["id"], frame["system"].astype(int), strict=True))


def _read_bytes(section: RecordedTeacher) -> bytes:
    try:
        return Path(section.path).read_bytes()
    except OSError as error:
        raise InputError(
            f"teacher {section.name!r}: path = {section.path}: {error.strerror}; name a CSV or Parquet "
            "file with columns id and system"
        ) from None
