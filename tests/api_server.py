"""OpenAI-compatible servers on loopback: one with faults on demand, that counts what it is asked, and a real one."""

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Server:
    """`answer(question)` is what the teacher says; `fault(number)` is what happens to the n-th call.

    A fault is the name of a `do_` method below, or status, content and headers to reply with, or None.
    """

    answer: Callable[[str], str] = lambda question: "System 1"
    fault: Callable[[int], str | tuple | None] = lambda number: None
    latency: float = 0.0
    models: tuple[str, ...] = ("teacher",)
    prefix: str = "/v1"
    elsewhere: tuple = (404, {"detail": "Not Found"})  # what other paths reply
    keys: tuple[str, ...] = ("secret",)
    retry_after: str = "0.05"
    finish_reason: str = "stop"
    asked: list[str] = field(default_factory=list)
    answered: Counter = field(default_factory=Counter)
    refused_at: dict[str, float] = field(default_factory=dict)
    waited: list[float] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)
    address: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator["Server"]:
        numbers, lock = itertools.count(), threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # head and body are two writes, and the second would wait 40 ms

            def log_message(self, *_):
                pass

            def do_GET(handler):
                if handler.path != f"{self.prefix}/models":
                    return handler.reply(*self.elsewhere)
                if self._authorised(handler):
                    handler.reply(200, {"object": "list", "data": [{"id": m, "object": "model"} for m in self.models]})

            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
                if handler.path != f"{self.prefix}/chat/completions":
                    return handler.reply(*self.elsewhere)
                if not self._authorised(handler):
                    return
                if body["model"] not in self.models:
                    return handler.reply(404, {"error": {"message": f"no model {body['model']}"}})
                question = body["messages"][-1]["content"]
                with lock:
                    number = next(numbers)
                    self.asked.append(question)
                    self.limits.append(body.get("max_tokens") or body.get("max_completion_tokens"))
                    if question in self.refused_at:
                        self.waited.append(time.monotonic() - self.refused_at.pop(question))
                time.sleep(self.latency)
                fault = self.fault(number)
                if isinstance(fault, tuple):
                    return handler.reply(*fault)
                getattr(handler, f"do_{fault}", handler.do_answer)(question)

            def do_answer(handler, question):
                text = json.dumps(self.completion(self.answer(question)))
                with lock:
                    self.answered[question] += 1
                handler.reply(200, text)

            def do_rate_limit(handler, question):
                with lock:
                    self.refused_at[question] = time.monotonic()
                handler.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": self.retry_after})

            def do_crash(handler, question):
                handler.reply(500, {"error": {"message": "boom"}})

            def do_hang(handler, question):
                time.sleep(2.0)
                handler.close_connection = True

            def do_slow(handler, question):
                time.sleep(2.0)
                handler.do_answer(question)

            def do_cut_json(handler, question):
                handler.reply(200, json.dumps(self.completion("System 1"))[:60])

            def do_cut_body(handler, question):
                handler.reply(200, '{"id":', length=500)
                handler.close_connection = True

            def do_nonsense(handler, question):
                with lock:
                    self.answered[question] += 1
                handler.reply(200, self.completion("Purple. 2 or so."))

            def reply(handler, status, content, headers=None, length=None):
                body = (content if isinstance(content, str) else json.dumps(content)).encode()
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    handler.send_response(status)
                    handler.send_header("Content-Length", str(length or len(body)))
                    for name, value in ({"Content-Type": "application/json"} | (headers or {})).items():
                        handler.send_header(name, value)
                    handler.end_headers()
                    handler.wfile.write(body)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

            def handle_error(self, *_):
                pass

        with Quiet(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self.address = f"http://127.0.0.1:{server.server_port}/v1"
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()

    def _authorised(self, handler) -> bool:
        if handler.headers.get("Authorization", "").removeprefix("Bearer ") in self.keys:
            return True
        shown = handler.headers.get("Authorization", "").removeprefix("Bearer ")
        handler.reply(401, {"error": {"message": f"Incorrect API key provided: {shown}."}})
        return False

    def completion(self, text: str, finish_reason: str | None = None) -> dict:
        message = {"role": "assistant", "content": text}
        return {
            "id": "c",
            "object": "chat.completion",
            "created": 0,
            "model": "teacher",
            "choices": [{"index": 0, "message": message, "finish_reason": finish_reason or self.finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
        }


@contextlib.contextmanager
def transformers_serve(model: Path, log: Path) -> Iterator[str]:
    """`transformers serve` with the model of a folder, on the CPU; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", script, "serve", str(model)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        raise RuntimeError(f"transformers serve did not start:\n{log.read_text()[-2000:]}") from None
                    time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()
