"""A block of the study: every experiment of a profile at one seed, one after the other, without pages.

`python -m lorapar_utils.pipeline.block PROFILE SEED [NAME …]`. Several of these may work at one block: each takes the
next experiment that no other has. What is kept is read back, so a block that was interrupted goes on.
"""

import argparse
import time

import filelock

from lorapar_utils.errors import InputError, told_on_the_command_line
from lorapar_utils.machine import lock
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.settings import Settings, load_profile


def run_block(settings: Settings, seed: int, names: list[str]) -> None:
    """Train and score these experiments at `seed`, in this order, but those that another process is at.

    Raises
    ------
    InputError
        The profile has no experiment of such a name at that seed.
    """
    here = [name for name, of_seed in settings.experiment_runs() if of_seed == seed]
    if unknown := [name for name in names if name not in here]:
        raise InputError(f"block: {settings.profile} has no {unknown[0]!r} at seed {seed}; it has {', '.join(here)}")
    marks = settings.runs / "blocks"
    marks.mkdir(parents=True, exist_ok=True)
    waiting = [name for name in here if name in names or not names]
    for place, name in enumerate(waiting, start=1):
        try:
            mark = lock(marks / f"{name}-seed{seed}.lock", timeout=0)
        except filelock.Timeout:
            continue
        with mark:
            began = time.time()
            record = experiment(settings, name, seed)
            scores = [f"{key} {m.value:.3f}" for key, m in record.metrics.items() if key.split("/")[-1] in SHOWN]
            print(
                f"{time.strftime('%H:%M:%S')} {place}/{len(waiting)} {name}-seed{seed} {time.time() - began:.0f} s: "
                f"{', '.join(scores)}",
                flush=True,
            )


SHOWN = ("system1", "system2", "loss1", "loss2", "pass@8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lorapar_utils.pipeline.block", description=__doc__.split("\n")[0])
    parser.add_argument("profile")
    parser.add_argument("seed", type=int)
    parser.add_argument("names", nargs="*", help="experiments; none for all")
    options = parser.parse_args(arguments)
    with told_on_the_command_line():
        run_block(load_profile(options.profile), options.seed, options.names)


if __name__ == "__main__":
    main()
