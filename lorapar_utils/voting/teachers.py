"""The kinds of teacher: a local model, an OpenAI-compatible server, recorded votes (paper, section 3.1).

Deviation: the paper's teachers are large reasoning models that answer in words, like `api` teachers here. A `local`
teacher votes for the label with the higher log-likelihood, so every vote has a margin.
"""

import atexit
import contextlib
import csv
import functools
import hashlib
import html
import io
import json
import os
import queue
import re
import threading
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import jinja2
import openai
import pandas as pd
import tenacity

from lorapar_utils.cache import fingerprint
from lorapar_utils.errors import InputError
from lorapar_utils.models.files import model_identity
from lorapar_utils.settings import ApiTeacher, LocalTeacher, RecordedTeacher, Settings
from lorapar_utils.voting import Ballot, Teacher

# Fields that shape no answer: names, keys, prices and limits.
LOGISTICS = {"name", "api_key_env", "price_in", "price_out"}
LOGISTICS |= {"max_tokens", "max_tokens_field", "concurrency", "timeout", "retries"}
# Two prompts for which a template has to give different texts.
PROBES = ("What is 2 + 3?", "Name the capital of France.")


def build_teachers(settings: Settings, examples: Sequence[dict]) -> list[Teacher]:
    """The profile's teachers, checked as far as possible without asking a question.

    Raises
    ------
    InputError
        A template with an unknown variable or without the prompt; of an API teacher: a missing or unusable key, an
        invalid address; of recorded votes: a missing file or column, missing, repeated or unknown ids, a cell that is
        no vote.
    """

    @functools.cache
    def load(source: str | None, gguf_file: str | None):
        """Load a model on the first question, once for all teachers that use it."""
        from lorapar_utils import models

        return models.load_base(over(source, gguf_file, settings))

    teachers = []
    for section in settings.voting.teachers:
        if section.kind == "recorded":
            teachers.append(_recorded(section, [example["id"] for example in examples]))
            continue
        _check_template(section, settings)
        teachers.append(_api(section, settings) if section.kind == "api" else _local(section, settings, load))
    return teachers


def identity(section: LocalTeacher | ApiTeacher | RecordedTeacher, settings: Settings) -> dict:
    """Everything that shapes a teacher's answers; part of the key of cached votes."""
    if section.kind == "recorded":
        return {"kind": "recorded", "sha256": hashlib.sha256(_read_bytes(section)).hexdigest()}
    shaping = section.model_dump(exclude=LOGISTICS)
    if section.kind == "api":
        return shaping | {"base_url": _address(section)}
    model = model_identity(over(section.source, section.gguf_file, settings))
    model.pop("system_prompt")  # teachers get no system prompt
    return shaping | {"source": None, "gguf_file": None, "model": model}


def over(source: str | None, gguf_file: str | None, settings: Settings) -> Settings:
    """The settings with a teacher's own model in place of the target; a `source` of None is the target itself."""
    if source is None:
        return settings
    return settings.changed(model={"source": source, "gguf_file": gguf_file, "revision": None})


# --- questions and answers ---------------------------------------------------------------


def teacher_prompt(section: LocalTeacher | ApiTeacher, example: dict, settings: Settings) -> str:
    """The profile's template, filled in. The role-play template names the target model."""
    name = _template_name(section)
    variables = {"target": settings.model.target_name, "persona": section.persona, "question": section.question}
    variables |= {"prompt": example["prompt"], "answer": example["answer"]}
    try:
        return _template(getattr(settings.voting, name)).render(variables).strip()
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"voting.{name}: {error}; it may use target, persona, prompt, answer and question") from None


def _check_template(section: LocalTeacher | ApiTeacher, settings: Settings) -> None:
    if len({teacher_prompt(section, {"prompt": prompt, "answer": "5"}, settings) for prompt in PROBES}) == 1:
        raise InputError(
            f"voting.{_template_name(section)} asks the same question about every example; "
            "write {{ prompt }} where the example's own belongs"
        )


def _template_name(section: LocalTeacher | ApiTeacher) -> str:
    return "role_play_template" if section.role_play else "plain_template"


@functools.cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)


# Start and end of a model's thinking: tags, and the channels of gpt-oss and Gemma.
_THOUGHTS = r"(?:think|thinking|thoughts?|reason|reasoning|analysis|reflection|scratchpad|seed:think)"
OPENED = re.compile(
    rf"<{_THOUGHTS}(?:\s[^<>]*)?>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|channel\|?>\s*(?:analysis|commentary|thought)",
    re.I,
)
CLOSED = re.compile(
    rf"</{_THOUGHTS}\s*>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>\s*final|<channel\|>", re.I
)
# Stop tokens that a server left in, and tags for an answer or for layout.
LEFT_IN = re.compile(
    r"<\|[^<>|\n]*\|?>|<[^<>|\s]+\|>|\[\|[^\[\]|\n]*\|\]|</?s>|\[/?(?:INST|EOS|BOS|DONE)\]"
    r"|<(?:bos|eos|pad|eot|end|(?:start|end)_of_(?:turn|utterance|text))>"
    r"|</?(?:(?:final[_-]?)?(?:answer|verdict|vote|classification|decision|judge?ment|result|output|response)|final"
    r"|b|strong|i|em|u|code|pre|p|br|div|span|center|mark|h[1-6]|li|ul|ol|blockquote)\s*/?>",
    re.I,
)
LATEX = re.compile(
    r"\\+(?:boxed|fbox|framebox|text\w*|math(?:rm|bf|sf|it|tt)|emph|operatorname|mbox|bm)\s*\{([^{}]*)\}"
)
LATEX_MARKS = re.compile(r"\\[\[\](),;:! ]|\$")
LABEL = re.compile(
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?:(?:the|my)\s+)?(?:(?:final|overall)\s+)?"
    r"(?:answer|verdict|vote|classification|judge?ment|decision|conclusion|result|category|label|choice|kind|type"
    r"|response|output)(?:\s+is)?\s*(?:[:=→⇒]|[=–—-]+>?)?",
    re.I,
)
SYSTEM = re.compile(r"system(?:\s*|[~‐–-])(?:(1|i|one)|(2|ii|two))\b", re.I)
NO_VERDICT = "no verdict in the last line"
BULLETS, STOPS = " \t\r\n\f\v#>+.:•·●▪◦‣–—-", " \t\r\n\f\v#.:!,;–—-"


def parse_vote(text: str) -> tuple[int, str]:
    r"""The system that an answer ends with, and ""; or 0 and the reason for the abstention.

    The last line has to say `System 1` or `System 2` and nothing else, except `Answer:` before it and decoration:
    Markdown, LaTeX, quotes, brackets, tags such as `<answer>`, stop tokens. The number can be spelled `II` or in
    full-width digits. One JSON object with one answer is accepted too. Reasoning before the last line, in `<think>`
    tags or not, is skipped. Everything else is an abstention, never a guess.

    >>> parse_vote("It chains three sums. **Answer:** System 2")
    (0, 'no verdict in the last line')
    >>> parse_vote("It chains three sums.\n**Answer:** System 2")
    (2, '')
    """
    plain = unicodedata.normalize("NFKC", html.unescape(text))
    plain = "".join(character for character in plain if unicodedata.category(character) != "Cf")
    visible = CLOSED.split(plain)[-1]
    if OPENED.search(visible):
        return 0, "stopped while thinking"
    lines = [bare for line in _json_answer(visible).splitlines() if (bare := _bare(line))]
    if not lines:
        return 0, "empty answer"
    system, labelled = _verdict(lines[-1])
    if system and not labelled and len(lines) > 1 and _verdict(lines[-2])[0] == 3 - system:
        return 0, NO_VERDICT  # both systems, one per line, are the list of choices
    return (system, "") if system else (0, NO_VERDICT)


def _verdict(bare: str) -> tuple[int, bool]:
    """The system that a bare line names, else 0, and whether the line is labelled as the answer."""
    label = LABEL.match(bare)
    match = SYSTEM.fullmatch(_bare(bare[label.end() :]) if label else bare)
    return (0 if match is None else 1 if match[1] else 2), label is not None


def _bare(line: str) -> str:
    """A line without decoration."""
    line = LATEX_MARKS.sub(" ", LEFT_IN.sub(" ", line))
    while (inner := LATEX.sub(r"\1", line)) != line:
        line = inner
    line = re.sub("[*`\"'“”„‘’‚«»‹›「」]", "", line).replace("_", " ")
    while True:
        line = line.lstrip(BULLETS).rstrip(STOPS)  # a pattern would take minutes over ten thousand dashes
        wrapped = re.fullmatch(r"\((\S.*)\)|\[(\S.*)\]|\{(\S.*)\}|【(\S.*)】", line)
        if wrapped is None:
            return line
        line = wrapped[wrapped.lastindex]


def _json_answer(visible: str) -> str:
    """The value of a final JSON object with one label that names one system; other texts stay unchanged."""
    ending = LEFT_IN.sub(" ", visible[visible.rfind("{") :]).strip("`\n\t ")
    try:
        fields = json.loads(ending)
    except ValueError:
        return visible
    answers = (
        [value for key, value in fields.items() if LABEL.fullmatch(_bare(key))] if isinstance(fields, dict) else []
    )
    systems = {named[1] is None for named in SYSTEM.finditer(ending)}
    return f"answer: {answers[0]}" if len(answers) == len(systems) == 1 else visible


# --- local models --------------------------------------------------------------------------------------------


def _local(section: LocalTeacher, settings: Settings, load: Callable) -> Teacher:
    prompt = functools.partial(teacher_prompt, section, settings=settings)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        from lorapar_utils.fast.label_scores import label_margins

        model, tokenizer = load(section.source, section.gguf_file)
        texts = [prompt(example) for example in asked]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # texts of similar length need little padding
        size = settings.voting.batch_size
        for batch in (order[start : start + size] for start in range(0, len(order), size)):
            plain = settings.model.plain_template
            margins = label_margins(model, tokenizer, [texts[i] for i in batch], section.labels, plain)
            for i, margin in zip(batch, margins, strict=True):
                answered(i, Ballot(margin=margin))

    return Teacher(section.name, fingerprint(identity(section, settings)), prompt, ask)


# --- OpenAI-compatible servers -------------------------------------------------------------------------------

OPENAI = "https://api.openai.com/v1"
# Statuses that reject one question for good. Others may pass, or concern the account or the address.
ABOUT_THE_QUESTION = {400, 413, 414, 422, 451}
# 200 is included because some servers send errors with it.
MONEY_STATUSES = {200, 400, 401, 403, 429}
MONEY = re.compile(
    r"(?<![a-z])(?:billing|credits?|quota|balance|payment|funds|budget|arrears|arrearage"
    r"|(?:usage|spend|spending)[ _]limits?)(?![a-z])",
    re.I,
)
RATE = re.compile(r"rate.?limit|per.(?:second|minute|hour|day)|(?:retry|try again) (?:in|after)", re.I)
FILTER = re.compile(
    r"content.?(?:filter|policy|management|moderation)|moderation|flagged|safety|inappropriate|data_inspection", re.I
)
# Faults that may pass. If one lasts, the server refuses all later questions too, which `voting` detects.
PASSING = re.compile(
    r"overloaded|temporar|try again|timed? ?out|unavailable|capacity|loading|unloaded|crash|out of memory", re.I
)
TOO_LONG = re.compile(r"context.?(?:length|window|size)|too long|too many tokens|resulted in \d+ tokens", re.I)
KEY = re.compile(r"(?<![a-z])api.?key", re.I)
UNKNOWN_MODEL = re.compile(
    r"model_not_found|model[^.]{0,80}(?:not exist|not found)|(?:invalid|unknown|no such) model"
    r"|deployment.{0,40}not",
    re.I,
)
NO_ENDPOINT = re.compile(
    r"(?:unexpected|unknown|invalid|no such) (?:endpoint|route|path|(?:request )?url)|cannot (?:post|get)", re.I
)
LIMIT = re.compile(r"max_(?:completion_|output_|new_)?tokens|in the completion", re.I)
UNKNOWN_FIELD = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not (?:permitted|allowed)", re.I
)
# Values of finish_reason across servers.
CUT = {"length", "max_tokens", "max_length"}
FILTERED = {"content_filter", "safety", "sensitive", "recitation"}
BROKEN_OFF = {"error", "abort", "aborted", "cancelled", "insufficient_system_resource"}
ENDED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"}


class _Unusable(Exception):
    """A 200 whose body is no answer, for a reason that may pass; worth another try."""


@dataclass(frozen=True)
class _Server:
    """A teacher's client, with helpers for messages that do not show the key."""

    section: ApiTeacher
    key: str = field(repr=False)
    address: str
    client: openai.OpenAI

    @property
    def where(self) -> str:
        return f"teacher {self.section.name!r}"

    def shown(self, message: object) -> str:
        """The start of a message of server or client, without the key or parts of it."""
        # OpenAI shows a refused key with stars in the middle.
        text = re.sub(r"\S*\*{3,}\S*", "[the key]", self.without_key(str(message)))
        return " ".join(text.split())[:200]

    def without_key(self, text: str) -> str:
        if len(self.key) < 8:  # "any word", for a server without keys
            return re.sub(rf"(?<!\w){re.escape(self.key)}(?!\w)", "[the key]", text)
        text = text.replace(self.key, "[the key]")
        parts = [self.key[start : start + 8] for start in range(len(self.key) - 7)]
        return re.sub(r"\S+", lambda word: "[the key]" if any(part in word[0] for part in parts) else word[0], text)


def _api(section: ApiTeacher, settings: Settings) -> Teacher:
    server = _server(section)
    prompt = functools.partial(teacher_prompt, section, settings=settings)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        left = iter(range(1, len(asked)))
        keeping, stopped, ended = threading.Lock(), threading.Event(), queue.SimpleQueue()

        def answer(i: int) -> None:
            ballot = _ask_server(server, prompt(asked[i]))
            with keeping:  # the thread that got an answer keeps it, so that no paid answer is lost
                answered(i, ballot)

        def answer_many() -> None:
            try:
                while not stopped.is_set() and (i := next(left, None)) is not None:
                    answer(i)
                ended.put(None)
            except BaseException as error:
                ended.put(error)

        # The first question is asked alone, so that a wrong model name costs one call instead of one per thread.
        answer(0)
        # Daemons, so that Ctrl-C ends the process even while threads wait for a server.
        threads = [threading.Thread(target=answer_many, daemon=True) for _ in asked[1 : section.concurrency + 1]]
        try:
            for thread in threads:
                thread.start()
            for _ in threads:
                if (error := ended.get()) is not None:
                    raise error
        except InputError:
            # The error shows at once. Calls under way are paid for, so they are kept when they end.
            atexit.register(_wait_for, threads, section.timeout)
            raise
        finally:
            stopped.set()

    return Teacher(
        section.name,
        fingerprint(identity(section, settings)),
        prompt,
        ask,
        price_in=section.price_in,
        price_out=section.price_out,
        max_tokens=section.max_tokens,
        check=functools.partial(_check_server, server),
    )


def _server(section: ApiTeacher) -> _Server:
    where, variable = f"teacher {section.name!r}", section.api_key_env
    like_a_name = variable.isidentifier() and (len(variable) <= 20 or variable.isupper())
    if variable not in os.environ and not like_a_name:
        # The value is not shown, because it looks like the key itself.
        raise InputError(f"{where}: api_key_env is the name of an environment variable, such as OPENAI_API_KEY")
    key = os.environ.get(variable, "").strip().strip("\ufeff").strip()
    if not key:
        raise InputError(
            f"{where}: the environment variable {variable} is not set; "
            "put the server's key there (any word, for a server without keys)"
        )
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"{where}: the key in the environment variable {variable} has characters that cannot be sent; "
            "use printable ASCII alone, without line ends inside"
        )
    url, address = _url(section), _address(section)
    # User and password are removed from the address, so that the client's messages do not show them.
    login = {"http_client": openai.DefaultHttpxClient(auth=(url.username, url.password))} if url.userinfo else {}
    limits = {"timeout": section.timeout, "max_retries": section.retries}
    client = openai.OpenAI(base_url=address, api_key=key, default_query=dict(url.params), **limits, **login)
    return _Server(section, key, address, client)


def _url(section: ApiTeacher) -> httpx.URL:
    text = section.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    with contextlib.suppress(httpx.InvalidURL):
        url = httpx.URL(text.strip())
        if url.scheme in ("http", "https") and url.host:
            return url
    raise InputError(
        f"teacher {section.name!r}: base_url is no server's address; write it like http://localhost:8000/v1"
    )


def _address(section: ApiTeacher) -> str:
    """The server's base URL in normal form, without user, password and query."""
    return str(_url(section).copy_with(username=None, password=None, query=None, fragment=None)).rstrip("/")


def _wait_for(threads: Sequence[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))


def _check_server(server: _Server) -> None:
    """Raise if the server is unreachable or refuses the key; a server that cannot list its models passes."""
    problem = None
    try:
        client = server.client.with_options(max_retries=min(server.section.retries, 2))
        response = client.models.with_raw_response.list().http_response
        if _is_page(response):
            problem = _web_page(server)
    except openai.APIConnectionError as error:
        problem = InputError(
            f"{server.where}: no answer from {server.address} ({server.shown(error.__cause__ or error)}); start the "
            "server or correct base_url; answered votes are kept"
        )
    except openai.AuthenticationError as error:
        problem = _refused(server, error.status_code, error.body)
    except openai.APIError:
        pass
    # Raised outside the handlers, because the client's exceptions contain the request with the key.
    if problem is not None:
        raise problem


def _ask_server(server: _Server, prompt: str) -> Ballot:
    """Ask one question. The client does retries, backoff and Retry-After; an unusable body is retried as often."""
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(_Unusable),
        stop=tenacity.stop_after_attempt(server.section.retries + 1),
        wait=tenacity.wait_random_exponential(max=8),
        reraise=True,
    )
    outcome, reason, broken = None, "", False
    try:
        outcome = retrying(_complete, server, prompt)
    except _Unusable as error:
        reason = str(error)
    except openai.APITimeoutError:
        reason = f"no answer within {server.section.timeout:g} s"
    except openai.APIConnectionError as error:
        reason, broken = f"the connection broke: {server.shown(error.__cause__ or error)}", True
    except openai.APIStatusError as error:
        outcome = _judged(server, error.status_code, error.body, prompt, page=_is_page(error.response))
    if broken:
        _check_server(server)  # if the server is gone, all other questions would fail too
    if isinstance(outcome, InputError):
        raise outcome  # outside the handlers, as in `_check_server`
    return outcome or Ballot(system=0, reason=reason, final=False)


def _complete(server: _Server, prompt: str) -> Ballot | InputError:
    section = server.section
    options = {section.limit_field: section.max_tokens}
    if section.temperature is not None:
        options["temperature"] = section.temperature
    # Raw, because the client checks no types and servers do not always send the declared ones.
    response = server.client.chat.completions.with_raw_response.create(
        model=section.model, messages=[{"role": "user", "content": prompt}], **options
    ).http_response
    if _is_page(response):
        return _web_page(server)
    try:
        body = json.loads(response.text)
        body = body[0] if isinstance(body, list) and body else body
        if not isinstance(body, dict):
            raise ValueError("the body is no object")
    except ValueError as error:
        raise _Unusable(f"garbled answer: {server.shown(error)}") from None
    message = None
    with contextlib.suppress(LookupError, TypeError):
        choice = {} | body["choices"][0]
        message = {} | choice["message"]
    if message is not None:
        return _ballot(server, message, choice.get("finish_reason"), body.get("usage"))
    error = body.get("error") or (body if {"message", "detail", "msg"} & body.keys() else None)
    if error is None:
        raise _Unusable("garbled answer: no choices in the body")
    outcome = _judged(server, _status_in(error), error, prompt)
    if isinstance(outcome, Ballot) and not outcome.final:
        raise _Unusable(outcome.reason)
    return outcome


def _ballot(server: _Server, message: dict, finish_reason: object, usage: object) -> Ballot:
    text, ended = _text(message.get("content")), str(finish_reason).lower()
    system, reason, final, limit = 0, "", True, None
    filtered = bool(message.get("refusal")) or ended in FILTERED
    if message.get("refusal"):
        reason = f"refused: {server.shown(message['refusal'])}"
    elif filtered:
        reason = "refused: the provider's filter"
    elif ended in CUT:
        reason, limit = "reached max_tokens before a verdict", server.section.max_tokens
    elif ended in BROKEN_OFF:
        reason, final = f"the server broke off: finish_reason {ended}", False
    elif not text.strip():
        elsewhere = next((name for name in ("reasoning_content", "reasoning", "tool_calls") if message.get(name)), None)
        reason, final = "empty answer", False
        if elsewhere:
            reason += f", with {elsewhere}: check the server's parsers"
    else:
        system, reason = parse_vote(text)
        # Without a finish_reason of an ended answer, an answer without a verdict may be incomplete.
        final = bool(system) or ended in ENDED
    counts = usage if isinstance(usage, dict) else {}
    return Ballot(
        system=system,
        reason=reason,
        text=server.without_key(text),
        tokens_in=_count(counts.get("prompt_tokens")),
        tokens_out=_count(counts.get("completion_tokens")),
        final=final,
        limit=limit,
        certain=filtered,
    )


def _text(content: object) -> str:
    """An answer's text, from a string or a list of parts."""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text") if isinstance(part, dict) else part for part in parts]
    return "".join(text for text in texts if isinstance(text, str))


def _count(tokens: object) -> int:
    try:
        return max(0, int(float(tokens)))
    except (TypeError, ValueError, OverflowError):
        return 0


# --- errors of a server -----------------------------------------------------------------------------


def _judged(server: _Server, status: int, body: object, prompt: str, *, page: bool = False) -> Ballot | InputError:
    """The meaning of an error: an abstention, final or to be asked again; or an InputError that ends the run."""
    section, where = server.section, server.where
    text = _said(server, status, body)
    words = _words(body).replace(prompt, " ")  # servers may quote the question
    money = [] if RATE.search(words) and "insufficient_quota" not in words else MONEY.findall(words)
    if status == 402 or (status in MONEY_STATUSES and any(word.lower() not in prompt.lower() for word in money)):
        return InputError(
            f"{where}: the account has no credit left ({text}); answered votes are kept, so add credit and run again"
        )
    if status == 401:
        return _refused(server, status, body)
    if page and (status in ABOUT_THE_QUESTION or status in (403, 404, 405, 410)):
        return _web_page(server)
    if FILTER.search(words) and (status in ABOUT_THE_QUESTION or status in (200, 403)):
        return Ballot(system=0, reason=f"refused: {text}", certain=True)
    if status == 403 or (status in (200, 400) and KEY.search(words)):
        return _refused(server, status, body)
    if status in (200, 400, 404, 410) and (UNKNOWN_MODEL.search(words) or (status == 404 and "model" in words.lower())):
        return InputError(
            f"{where}: the server at {server.address} does not know model {section.model!r} ({text}); "
            f"{_models_there(server)}"
        )
    if status in (404, 405, 410) or (status == 200 and NO_ENDPOINT.search(words)):
        return InputError(
            f"{where}: there is nothing at {server.address}/chat/completions ({text}); correct base_url, which often "
            "ends with /v1"
        )
    if status in (200, 400, 422) and (remedy := _refused_setting(section, body, words, prompt)):
        return InputError(f"{where}: the server refuses {remedy} ({text}); answered votes are kept")
    final = status in ABOUT_THE_QUESTION and not money and not PASSING.search(words)
    return Ballot(system=0, reason=f"refused: {text}", final=final, certain=final and bool(TOO_LONG.search(words)))


def _refused_setting(section: ApiTeacher, body: object, words: str, prompt: str) -> str | None:
    """The setting that the server refuses, with advice; None if the fault is not in a setting."""
    parameter = str(body.get("param")) if isinstance(body, dict) else ""
    if parameter == "temperature" or ("temperature" in words.lower() and "temperature" not in prompt.lower()):
        return f"temperature = {section.temperature}; set it to null, or to a value that the server takes"
    if not (LIMIT.search(parameter) or LIMIT.search(words)):
        return None
    if UNKNOWN_FIELD.search(words):
        [other] = {"max_tokens", "max_completion_tokens"} - {section.limit_field}
        return f"the field {section.limit_field}; set max_tokens_field to {other}"
    return f"max_tokens = {section.max_tokens}; set it lower"


def _said(server: _Server, status: int, body: object) -> str:
    return server.shown(f"Error code: {status} - {_message(body) or 'no reason given'}")


def _status_in(error: object) -> int:
    """The HTTP status in an error body; 200 without one."""
    code = error.get("code") or error.get("status") if isinstance(error, dict) else None
    status = _count(code)
    return status if 400 <= status < 600 else 200


def _unwrapped(body: object) -> object:
    if isinstance(body, list) and len(body) == 1:
        body = body[0]
    return body.get("error") or body if isinstance(body, dict) else body


def _message(body: object) -> str:
    """The readable text of an error body."""
    error = _unwrapped(body)
    if not isinstance(error, dict):
        return " ".join(re.sub(r"<[^<>]*>", " ", str(error or "")).split())  # a page of HTML without tags
    text = next((error[key] for key in ("message", "detail", "msg") if error.get(key)), error)
    if isinstance(text, list) and all(isinstance(item, dict) for item in text):
        # FastAPI's errors, without `input`, which repeats the whole request.
        places = [(".".join(map(str, item.get("loc") or [])), item.get("msg")) for item in text]
        return "; ".join(f"{place}: {message}" for place, message in places)
    return text if isinstance(text, str) else json.dumps(text)


def _words(body: object) -> str:
    """Codes and message of an error body."""
    error = _unwrapped(body)
    kinds = [error.get(key) for key in ("code", "type", "status", "param")] if isinstance(error, dict) else []
    return " ".join([*(str(kind) for kind in kinds if kind), _message(body)])


def _is_page(response) -> bool:
    start = response.text.lstrip()[:15].lower()
    return "text/html" in response.headers.get("content-type", "") or start.startswith(("<!doctype html", "<html"))


def _web_page(server: _Server) -> InputError:
    return InputError(
        f"{server.where}: base_url = {server.address} answers with a web page, not as an OpenAI-compatible server; "
        "correct it: probably /v1 is missing at its end"
    )


def _models_there(server: _Server) -> str:
    try:
        body = json.loads(server.client.models.with_raw_response.list().http_response.text)
        names = [str(model["id"]) for model in body["data"]]
    except (openai.APIError, ValueError, TypeError, LookupError):
        names = []
    return f"it has {', '.join(names[:10])}" if names else "check the model's name, and base_url"


def _refused(server: _Server, status: int, body: object) -> InputError:
    return InputError(
        f"{server.where}: the server refuses the key in {server.section.api_key_env} "
        f"({_said(server, status, body)}); answered votes are kept"
    )


# --- recorded votes ------------------------------------------------------------------------------------------

# A column of numbers, plain or as spreadsheets write them, or a column of names; 0 is an abstention in both.
CELLS = (re.compile(r"([12]|0)(?:[.,]0+)?"), re.compile(r"(?:system\s*|s)([12])|0", re.I))
WANTED = "a CSV or Parquet file with columns id and system"


def _recorded(section: RecordedTeacher, ids: Sequence[str]) -> Teacher:
    votes = _read_votes(section, ids)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        for i, example in enumerate(asked):
            system = votes[example["id"]]
            answered(i, Ballot(system=system, reason="" if system else "recorded as an abstention"))

    return Teacher(section.name, None, lambda example: "", ask)


def _read_votes(section: RecordedTeacher, ids: Sequence[str]) -> dict[str, int]:
    where = f"teacher {section.name!r}: {section.path}"
    rows = _rows(where, _read_bytes(section))
    lines: dict[str, int] = {}
    for line, identifier, _ in rows:
        if not identifier:
            raise InputError(f"{where}: line {line} has no id; write one, or remove the line")
        if identifier in lines:
            raise InputError(
                f"{where}: id {identifier!r} is there twice, in lines {lines[identifier]} and {line}; "
                "keep one vote an example"
            )
        lines[identifier] = line
    unknown = sorted(lines.keys() - set(ids))
    unknown_ids = f"{len(unknown)} ids are not of this pool's training split, first {unknown[0]!r}" if unknown else ""
    if unknown and re.fullmatch(r"[\d.,:/+\-eE]+", unknown[0]):
        unknown_ids += " (did a spreadsheet turn ids into numbers or dates? format the column as text)"
    if missing := sorted(set(ids) - lines.keys()):
        raise InputError(
            f"{where}: {len(missing)} of {len(ids)} examples have no vote, first {missing[0]!r}"
            f"{'; ' if unknown_ids else ''}{unknown_ids}; add a line for each, with 0 for an abstention"
        )
    if unknown:
        raise InputError(f"{where}: {unknown_ids}; was it recorded on another pool or seed?")
    pattern = max(CELLS, key=lambda cells: sum(bool(cells.fullmatch(cell)) for _, _, cell in rows))
    votes = {}
    for line, identifier, cell in rows:
        vote = pattern.fullmatch(cell)
        if vote is None:
            problem = f"has system = {cell}" if cell else "has no system"
            raise InputError(
                f"{where}: id {identifier!r} {problem}; use 1, 2, or 0 for an abstention, in every line (line {line})"
            )
        votes[identifier] = int(vote[1] or 0)
    return votes


def _rows(where: str, data: bytes) -> list[tuple[int, str, str]]:
    """Line, id and system of every row."""
    header, *rows = _parquet_table(where, data) if data.startswith(b"PAR1") else _csv_table(where, data)
    names = [name.lower() for name in header[1]]
    if missing := {"id", "system"} - set(names):
        raise InputError(
            f"{where} lacks column {', '.join(sorted(missing))}; it has {', '.join(filter(None, header[1]))}"
        )
    if repeated := [name for name in ("id", "system") if names.count(name) > 1]:
        raise InputError(f"{where} has column {repeated[0]} more than once; keep one")
    places = [names.index("id"), names.index("system")]
    for line, cells in rows:
        if any(cells[len(names) :]):
            raise InputError(
                f"{where}: line {line} ({', '.join(cells)}) has more cells than the first line has columns; put cells "
                "with a separator inside in double quotes"
            )
    return [(line, *(cells[place] if place < len(cells) else "" for place in places)) for line, cells in rows]


def _parquet_table(where: str, data: bytes) -> list[tuple[int, list[str]]]:
    try:
        frame = pd.read_parquet(io.BytesIO(data))
    except (ValueError, OSError, NotImplementedError) as error:
        raise InputError(f"{where} is not readable as Parquet ({error}); name {WANTED}") from None
    frame = frame.reset_index() if "id" in frame.index.names else frame
    frame = frame.astype(object).where(frame.notna(), "")
    cells = [[str(cell).strip() for cell in row] for row in [list(frame.columns), *frame.to_numpy().tolist()]]
    return list(enumerate(cells))


def _csv_table(where: str, data: bytes) -> list[tuple[int, list[str]]]:
    """Lines that are not blank, with line numbers; the separator is the one that gives columns id and system."""
    if data.startswith((b"PK", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")):
        raise InputError(f"{where} is a spreadsheet or an archive; save it as CSV with columns id and system")
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise InputError(f"{where} is no UTF-8 text; save it as CSV in UTF-8, with columns id and system")
    text = re.sub(r'^\s*"?sep=."?', "", text)  # a line that only Excel reads

    def fit(separator: str) -> tuple[bool, int]:
        names = next(csv.reader(text.lstrip().splitlines()[:1], delimiter=separator, skipinitialspace=True), [])
        return {"id", "system"} <= {name.strip().lower() for name in names}, len(names)

    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t|", key=fit), skipinitialspace=True)
    try:
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except csv.Error as error:
        raise InputError(f"{where}: line {reader.line_num} is not readable ({error}); is a quote open?") from None
    if not (filled := [(line, cells) for line, cells in rows if any(cells)]):
        raise InputError(f"{where} is empty; name {WANTED}")
    return filled


def _read_bytes(section: RecordedTeacher) -> bytes:
    try:
        return Path(section.path).expanduser().read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: `~` without a home
        raise InputError(
            f"teacher {section.name!r}: path = {section.path}: {getattr(error, 'strerror', error)}; name {WANTED}"
        ) from None
