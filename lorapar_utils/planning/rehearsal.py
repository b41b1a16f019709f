"""`make rehearse PROFILE=…`: run every phase of a profile with a toy of the model's architecture.

A rehearsal shows within minutes on a CPU the errors that would stop a run after hours on a GPU: an unreadable row, a
template that refuses a turn, layers with other names, a missing column. It uses the profile's data and tokenizer. The
toy has random weights, width 64 and two layers. Few examples are read, few steps are made, no server is asked, and
nothing is kept. Memory (see `make plan`), 4 bits, vLLM, several processes and the model's answers are not rehearsed.
"""

import argparse
import io
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import datasets
import diskcache
import jupytext
import matplotlib
import pandas as pd
import torch
import yaml
from IPython.core.interactiveshell import InteractiveShell
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from lorapar_utils import data, models, voting
from lorapar_utils.errors import InputError
from lorapar_utils.models.files import source_of
from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.planning import preflight
from lorapar_utils.settings import REHEARSAL, ExperimentSection, Settings, load_profile, project_root, working_root
from lorapar_utils.voting import teachers

WIDTH, LAYERS, HEADS = 64, 2, 4
# Names of sizes in the configurations of all architectures -> toy values. Only names that a configuration has change.
SIZES = {
    "hidden_size": WIDTH,
    "n_embd": WIDTH,
    "word_embed_proj_dim": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "ffn_dim": 2 * WIDTH,
    "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "head_dim": WIDTH // HEADS,
    "rotary_dim": WIDTH // HEADS // 2,
    "query_pre_attn_scalar": WIDTH // HEADS,
    "num_attention_heads": HEADS,
    "n_head": HEADS,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def rehearse(profile: str, *, pages: bool = True) -> list[tuple[str, float]]:
    """Run every phase of `profile` with a toy model and few examples.

    Parameters
    ----------
    profile
        A name in `profiles/`, or a path.
    pages
        Also run the book's notebooks over the rehearsal's records.

    Returns
    -------
    list of (str, float)
        The parts of the rehearsal, and their seconds.

    Raises
    ------
    InputError
        The error that would stop the run, or an architecture without a toy.
    """
    settings = load_profile(profile)
    durations: list[tuple[str, float]] = []
    with _toy_profile(settings, durations) as (toy, path):
        for name, spec in toy.experiments.items():
            with _timed(durations, f"experiment {name} ({', then '.join(spec.stages) or 'no training'})"):
                experiment(toy, name, toy.seeds[0])
        if pages:
            for page in sorted(path.stem for path in (project_root() / "notebooks").glob("[0-9]*.ipynb")):
                with _timed(durations, f"page {page}"):
                    _run_page(page, path)
    return durations


@contextmanager
def _toy_profile(settings: Settings, durations: list) -> Iterator[tuple[Settings, Path]]:
    """A small copy of the profile, with model and votes, and the copy's file; removed after the block."""
    runs = working_root() / "runs"
    runs.mkdir(exist_ok=True)
    name = f"{REHEARSAL}{settings.profile}"
    shutil.rmtree(runs / name, ignore_errors=True)  # files of an interrupted rehearsal
    with tempfile.TemporaryDirectory(dir=runs, prefix=f".{name}-") as scratch:
        try:
            with _timed(durations, "tokenizer, and a toy of the architecture"):
                folder = make_toy(settings, Path(scratch) / "model")
            with _timed(durations, "data, teachers' files and keys, benchmarks' files: whole", aloud=True):
                preflight.check_data(settings)
            small = _small(settings, folder)
            with _timed(durations, "data, and votes of the local teachers"):
                train = [row for row in data.load_pool(small) if row["split"] == "train"]
                _ask_local_teachers(small, train)
            votes = Path(scratch) / "votes.csv"
            pd.DataFrame({"id": [r["id"] for r in train], "system": [1 + i % 2 for i in range(len(train))]}).to_csv(
                votes, index=False
            )
            sections = [{"kind": "recorded", "name": t.name, "path": str(votes)} for t in settings.voting.teachers]
            sections = sections or [{"kind": "recorded", "name": "colleague", "path": str(votes)}]
            small = small.changed(profile=name, voting={"teachers": sections})
            path = Path(scratch) / f"{name}.yaml"
            content = small.model_dump(mode="json", exclude={"profile", "profile_file"})
            path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
            yield load_profile(path), path
        finally:
            shutil.rmtree(runs / name, ignore_errors=True)


def make_toy(settings: Settings, folder: Path) -> Path:
    """A model folder of a few megabytes: the profile's tokenizer, and random weights of the model's architecture."""
    full_config = models.load_config(settings)
    torch.manual_seed(settings.seed)
    try:
        config = toy_config(full_config)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1, 2]]), use_cache=False)
    except Exception as error:  # an architecture may have unknown constraints between sizes
        raise InputError(
            f"rehearse: no toy can be made of {full_config.model_type} ({str(error).splitlines()[0][:200]}); "
            "rehearse with a small model of the same family, or go without"
        ) from None
    source, options = source_of(settings, weights=False)
    try:
        model.generation_config = GenerationConfig.from_pretrained(source, **options)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(config)
    model.generation_config.do_sample = True  # else sampling settings cannot be saved; none is used
    model.save_pretrained(folder)
    models.load_tokenizer(settings).save_pretrained(folder)
    return folder


def toy_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """`config` at toy width, with the full vocabulary and two layers, or one of each kind if there are more."""
    return type(config).from_dict(_toy_values(config.to_dict()))


def _toy_values(wide: dict) -> dict:
    values = wide | {key: size for key, size in SIZES.items() if wide.get(key) is not None}
    kinds = list(dict.fromkeys(wide.get("layer_types") or []))
    layers = max(LAYERS, len(kinds))
    values |= {key: layers for key in ("num_hidden_layers", "n_layer") if key in wide}
    if kinds:
        values["layer_types"] = (kinds * layers)[:layers]
    if wide.get("num_key_value_heads") is not None:
        shared = wide["num_key_value_heads"] != wide.get("num_attention_heads")
        values["num_key_value_heads"] = HEADS // 2 if shared else HEADS
    if any(isinstance(value, list) for value in (wide.get("rope_parameters") or {}).values()):
        values["rope_parameters"] = None  # lists with a factor for each frequency of the wide model
    values.pop("quantization_config", None)
    # A model that also reads images or sound has one configuration per part.
    parts = {key: part for key, part in wide.items() if key.endswith("_config") and isinstance(part, dict)}
    return values | {key: _toy_values(part) for key, part in parts.items() if key in values}


def _small(settings: Settings, folder: Path) -> Settings:
    """The profile with few examples, few steps and the toy as model, in fp32 and one process."""
    few = {"train": 12, "validation": 4, "test": 4}
    sizes = {
        system: {split: min(count, getattr(getattr(settings.pool, system), split)) for split, count in few.items()}
        for system in ("system1", "system2")
    }
    grpo = {"steps": 1, "prompts_per_step": 2, "completions": 2, "micro_batch": 4, "rollout_batch": None}
    grpo |= {"max_completion_length": 12, "gradient_checkpointing": False, "rollouts": "here"}
    evaluation = {"batch_size": 8, "max_new_tokens": 8, "pass_k": 2, "pass_k_prompts": 2, "watch_every": 1}
    evaluation |= {"watch_prompts": min(settings.evaluation.watch_prompts, 2)}
    evaluation |= {"gsm8k": {"items": 2, "max_new_tokens": 8}, "mmlu": {"items": 1}}
    evaluation |= {"gsm_symbolic": {"items": 2, "max_new_tokens": 8}}
    samples = min(settings.evaluation.humaneval.samples, 2)
    evaluation |= {"humaneval": {"items": 2, "max_new_tokens": 8, "samples": samples}}
    model = {"source": str(folder), "gguf_file": None, "revision": None, "dtype": "float32"}
    return settings.changed(
        publishable=False,
        seeds=(settings.seed,),
        threads=min(settings.threads, 2),
        processes=1,
        checkpoint_every=1,
        model=model | {"quantization": None, "sharded": False},
        pool=sizes,
        voting={"batch_size": 8},
        importance={"examples": 4, "batch_size": 2, "stability": ()},
        adapter={"r": min(settings.adapter.r, WIDTH // 2)},  # the highest rank of the toy's narrowest layer
        sft={"epochs": 0.5, "batch_size": 4, "accumulation": 1, "gradient_checkpointing": False},
        grpo=grpo,
        evaluation=evaluation,
        experiments=_one_of_each_kind(settings),
    )


def _one_of_each_kind(settings: Settings) -> dict[str, ExperimentSection]:
    """The first experiment of each kind. Theta, alpha, beta and seeds do not make a kind."""
    kinds: dict[tuple, tuple[str, ExperimentSection]] = {}
    for name, spec in settings.experiments.items():
        kind = (spec.method, spec.init, spec.stages, spec.selection, spec.modules, spec.split_by == "construction")
        kinds.setdefault(kind, (name, spec.model_copy(update={"seeds": None})))
    return {name: spec.model_dump() for name, spec in kinds.values()}


def _ask_local_teachers(settings: Settings, rows: list[dict]) -> None:
    local = [t.model_copy(update={"source": None}) for t in settings.voting.teachers if t.kind == "local"]
    local += [t.model_copy(update={"max_new_tokens": 4}) for t in settings.voting.teachers if t.kind == "success"]
    if not local:
        return
    everybody = {"panels": {}, "panel": None, "quorum": None, "tie": "undecided"}
    local_settings = settings.changed(voting={"teachers": [t.model_dump() for t in local], **everybody})
    with tempfile.TemporaryDirectory() as scratch, diskcache.Cache(scratch, disk=diskcache.JSONDisk) as cache:
        local_teachers = teachers.build_teachers(local_settings, rows)
        voting.vote(datasets.Dataset.from_list(rows), local_teachers, cache, calibration=settings.voting.calibration)


def _run_page(name: str, profile: Path) -> None:
    """Run the code of a notebook over `profile`, cell by cell in this process.

    Papermill would start a kernel per page, and importing torch and TRL there takes longer than the page.
    """
    cells = jupytext.read(project_root() / "notebooks" / f"{name}.ipynb").cells
    main_module = sys.modules["__main__"]  # an InteractiveShell replaces it
    shell = InteractiveShell.instance()
    try:
        shell.reset(new_session=True)
        for cell in cells:
            if cell.cell_type != "code":
                continue
            sources = [cell.source]
            if "parameters" in cell.metadata.get("tags", []):
                sources.append(f"# Parameters\nprofile = {str(profile)!r}")
            for source in sources:
                result = shell.run_cell(source, store_history=True)
                if error := result.error_before_exec or result.error_in_exec:
                    raise error
    finally:
        matplotlib.pyplot.close("all")
        InteractiveShell.clear_instance()
        sys.modules["__main__"] = main_module


@contextmanager
def _timed(durations: list, part: str, *, aloud: bool = False) -> Iterator[None]:
    """Print the part of the rehearsal and the seconds, and with `aloud` also the part's own output."""
    start, output = time.time(), io.StringIO()
    try:
        with redirect_stdout(output), redirect_stderr(output):
            yield
    except BaseException:
        print(f"  failed     {part}", flush=True)
        raise
    durations.append((part, time.time() - start))
    print(f"  {durations[-1][1]:6.1f} s   {part}", flush=True)
    if aloud:
        print(textwrap.indent(output.getvalue(), " " * 13), end="", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lorapar_utils.planning.rehearsal", description=__doc__.splitlines()[0]
    )
    parser.add_argument("profile")
    parser.add_argument("--no-pages", action="store_true", help="leave the book's pages out")
    options = parser.parse_args(arguments)
    matplotlib.use("agg")
    try:
        durations = rehearse(options.profile, pages=not options.no_pages)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.profile}: rehearsed in {sum(seconds for _, seconds in durations):.0f} s; nothing of it is kept")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
