"""How much faster many questions at once are than one at a time, at a server that takes 200 ms an answer.

Paired: both settings against the same server, in turn, several times; the goal is the ratio.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
import diskcache

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from api_server import Server

from lorapar_utils.settings import load_profile
from lorapar_utils.teachers import build_teachers
from lorapar_utils.voting import vote

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


def rate(address: str, count: int, concurrency: int) -> float:
    """Answers a second of one `vote` over `count` new examples, cache writes included."""
    teacher = {"name": "remote", "kind": "api", "role_play": True, "model": "teacher", "base_url": address}
    teacher |= {"api_key_env": "BENCHMARK_KEY", "concurrency": concurrency}
    settings = load_profile("smoke", voting={"teachers": [teacher]})
    examples = [{"id": f"e{i}", "prompt": f"What is {i}?", "answer": str(i)} for i in range(count)]
    with tempfile.TemporaryDirectory() as folder, diskcache.Cache(folder, disk=diskcache.JSONDisk) as cache:
        pool, teachers = datasets.Dataset.from_list(examples), build_teachers(settings, examples)
        began = time.perf_counter()
        vote(pool, teachers, cache)
        return count / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
