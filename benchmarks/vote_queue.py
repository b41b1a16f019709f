"""Ten million examples before an API teacher: how long the queue takes, and how large its cache gets.

    python benchmarks/vote_queue.py [EXAMPLES]

Simulated: calls are handed to whichever of `concurrency` workers is free first; latencies are lognormal; a share of the
calls fails and is tried again after a growing wait; a server takes no more than `rate` calls a second. Measured: bytes
that the cache of votes takes for one, and how many it writes a second.
"""

import heapq
import sys
import tempfile
import time
from dataclasses import asdict

import diskcache
import numpy as np
import pandas as pd

from lorapar_utils.voting import Ballot

MEDIAN, SPREAD = 0.8, 0.6  # seconds of a call, and the standard deviation of its logarithm
FAILURES, WAIT = 0.02, 2.0  # share of calls that are refused, and seconds before the first further try
CHUNK = 100_000


def queue_hours(calls: int, concurrency: int, rate: float | None, seed: int = 0) -> float:
    """Hours until the last of `calls` is answered."""
    random = np.random.default_rng(seed)
    free = [0.0] * concurrency
    next_slot = 0.0
    for start in range(0, calls, CHUNK):
        count = min(CHUNK, calls - start)
        latencies = random.lognormal(np.log(MEDIAN), SPREAD, count)
        tries = random.geometric(1 - FAILURES, count)
        busy = latencies * tries + WAIT * (2.0 ** (tries - 1) - 1)
        for seconds in busy.tolist():
            begins = free[0]
            if rate is not None:
                begins = max(begins, next_slot)
                next_slot = begins + 1 / rate
            heapq.heapreplace(free, begins + seconds)
    return max(free) / 3600


def cache_bytes(votes: int = 20_000) -> tuple[float, float]:
    """Bytes a vote, and votes written a second, of the cache that voting uses."""
    ballot = asdict(Ballot(2, text="The answer rests on three steps.\nSystem 2", tokens_in=140, tokens_out=30))
    with tempfile.TemporaryDirectory() as folder, diskcache.Cache(folder) as cache:
        began = time.perf_counter()
        for number in range(votes):
            cache[f"{number:064x}"] = ballot
        return cache.volume() / votes, votes / (time.perf_counter() - began)


def main(examples: int = 10_000_000) -> None:
    rows = [
        {"concurrency": n, "calls a second at most": rate or "unlimited", "days": queue_hours(examples, n, rate) / 24}
        for n, rate in ((8, None), (32, None), (256, None), (256, 100), (1024, None))
    ]
    print(f"{examples:,} examples, one teacher:")
    print(pd.DataFrame(rows).round(2).to_string(index=False))
    size, speed = cache_bytes()
    print(f"cache: {size:.0f} bytes a vote, {size * examples / 1e9:.1f} GB for all; {speed:.0f} votes written a second")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
