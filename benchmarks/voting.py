"""How much faster many questions at once are than one at a time, at a server that takes 200 ms an answer.

Paired: both settings against the same server, in turn, several times; the goal is the ratio. Then the same at a real
server, `transformers serve` with the packaged model, which shares this machine's cores: what becomes of its answers.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import datasets
import diskcache

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from api_server import Server, transformers_serve

from lorapar_utils.errors import InputError
from lorapar_utils.models import files
from lorapar_utils.settings import load_profile
from lorapar_utils.voting import vote
from lorapar_utils.voting.teachers import build_teachers

GOAL, REPEATS, LATENCY, CONCURRENCY = 20.0, 3, 0.2, 32


def main() -> None:
    os.environ["BENCHMARK_KEY"] = "secret"
    with Server(latency=LATENCY).running() as server:
        ratios = []
        for _ in range(REPEATS):
            one, many = (
                rate(server.address, count, concurrency) for count, concurrency in ((20, 1), (640, CONCURRENCY))
            )
            ratios.append(many / one)
            print(
                f"{one:.1f} answers a second one at a time, {many:.1f} with {CONCURRENCY} at once: x {many / one:.1f}"
            )
    median = statistics.median(ratios)
    print(f"throughput ratio, median of {REPEATS}: {median:.1f} (goal: at least {GOAL})")
    with tempfile.TemporaryDirectory() as scratch:
        model = files.packaged_model()
        with transformers_serve(model, Path(scratch) / "serve.log") as address:
            for concurrency in (1, 4):
                counts: Counter[str] = Counter()
                speed = rate(address, 12, concurrency, counts, model=str(model), max_tokens=64)
                print(f"transformers serve, {concurrency} at once: {speed:.2f} answers a second; {dict(counts)}")


def rate(address: str, count: int, concurrency: int, outcomes: Counter[str] | None = None, **more) -> float:
    """Answers a second of one `vote` over `count` new examples, cache writes included; counts votes and abstentions."""
    teacher = {"name": "remote", "kind": "api", "role_play": True, "model": "teacher", "base_url": address}
    teacher |= {"api_key_env": "BENCHMARK_KEY", "concurrency": concurrency, **more}
    settings = load_profile("smoke", voting={"teachers": [teacher]})
    examples = [{"id": f"e{i}", "prompt": f"What is {i} + {i}?", "answer": str(2 * i)} for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, diskcache.Cache(folder, disk=diskcache.JSONDisk) as cache:
        pool, teachers = datasets.Dataset.from_list(examples), build_teachers(settings, examples)
        began = time.perf_counter()
        try:
            voted = vote(pool, teachers, cache)
        except InputError as silent:  # a small model may never end with a verdict
            voted = {"reasons": [[str(silent)]] * count}
        seconds = time.perf_counter() - began
    if outcomes is not None:
        outcomes.update(reason or "a vote" for [reason] in voted["reasons"])
    return count / seconds


if __name__ == "__main__":
    main()
