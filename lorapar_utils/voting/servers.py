"""A teacher behind an OpenAI-compatible server: questions, answers, and what its refusals mean."""

import atexit
import contextlib
import functools
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import openai
import tenacity

from lorapar_utils.errors import InputError
from lorapar_utils.settings import ApiTeacher
from lorapar_utils.voting import Ballot, Teacher
from lorapar_utils.voting.verdicts import parse_vote

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


def server_teacher(section: ApiTeacher, key: str, prompt: Callable[[dict], str]) -> Teacher:
    """A teacher behind a server; `key` and `prompt` as in `Teacher`."""
    server = _server(section)

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
        key,
        prompt,
        ask,
        price_in=section.price_in,
        price_out=section.price_out,
        max_tokens=section.max_tokens,
        check=functools.partial(_check_server, server),
    )


def _server(section: ApiTeacher) -> _Server:
    where, variable = f"teacher {section.name!r}", section.api_key_env
    if section.key_to_set():
        raise InputError(
            f"{where}: the environment variable {variable} is not set; "
            "put the server's key there (any word, for a server without keys)"
        )
    key = section.key
    if not (key.isascii() and key.isprintable()):
        raise InputError(
            f"{where}: the key in the environment variable {variable} has characters that cannot be sent; "
            "use printable ASCII alone, without line ends inside"
        )
    url, address = _url(section), server_address(section)
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


def server_address(section: ApiTeacher) -> str:
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
