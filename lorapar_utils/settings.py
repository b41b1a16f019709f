"""Profiles: YAML files merged over `profiles/defaults.yaml` and validated by pydantic."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorapar_utils.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Theta = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]
Seed = Annotated[int, Field(ge=0)]  # part of file names
Selection = Literal["importance", "random", "random_in_matrix", "random_stage2", "magnitude", "swapped"]
Score = Literal["second_order", "first_order", "fisher", "magnitude", "random"]
Name = Annotated[str, Field(pattern=r"^[\w.-]+$")]

API_QUESTION = (
    "System 1 questions are answered at once: a fact recalled, a one-step inference. System 2 questions need several "
    "steps of reasoning, each resting on the one before. Which kind is this? End with a line that says only "
    "System 1 or System 2."
)

MODULES = {
    "QKV": ("q_proj", "k_proj", "v_proj"),
    "GUD": ("gate_proj", "up_proj", "down_proj"),
    "QKVGUD": ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"),
}

LayerNames = tuple[Annotated[str, Field(pattern=r"^[\w.]+$")], ...]
Modules = Literal["QKV", "GUD", "QKVGUD"] | Annotated[LayerNames, Field(min_length=1)]

# System prompts for profiles that set none. They ask for the form of the pool's own answers.
SYSTEM_PROMPTS = {
    "checked": ("Answer the question. Work in short steps, one a line, if you need any. End with #### and the answer."),
    "free text": "Follow the instruction. Answer with the response alone.",
}
# Sources whose answers are free text, with no value to compare.
FREE_TEXT = ("dolly-15k", "open-platypus", "codealpaca-20k")

# Method of an experiment -> changes to the section `adapter`. Only LoRA-PAR trains a part of the elements. `lora` and
# `lorapar` both start from the profile's `adapter.init`, so they differ in the partition only.
METHODS = {
    "lorapar": {},
    "lora": {},
    "olora": {"init": "olora"},
    "pissa": {"init": "pissa"},
    "dora": {"kind": "dora"},
    "prompt_tuning": {"kind": "prompt_tuning"},
    "p_tuning": {"kind": "p_tuning"},
    "prefix_tuning": {"kind": "prefix_tuning"},
    "ia3": {"kind": "ia3"},
    "shira": {"kind": "shira"},
}

# Settings that name a file or folder, as paths of keys; `*` is any item of a list.
PATHS = (
    ("model", "source"),
    ("pool", "path"),
    ("voting", "teachers", "*", "path"),
    ("voting", "teachers", "*", "source"),
    ("evaluation", "gsm8k", "path"),
    ("evaluation", "mmlu", "path"),
)
# Values of `source` that are never read as a folder, even if a folder has that name.
KEYWORDS = ("packaged", "gemma3-270m")

# What `speed` can switch. Each computes what PyTorch, TRL, transformers or lm-eval compute, in less time.
SHORTCUTS = ("importance", "answer_head", "shared_prefix", "completions", "grpo_trainer", "lm_eval_model")

# Names become file and folder names, parts of shell commands, and Snakemake's wildcards.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
NAME_RULE = "use up to 100 of a-z, A-Z, 0-9, '_', '.' and '-', with neither '.' nor '-' at the beginning"
# Folders of runs/ that belong to no profile, and what the names of those of rehearsals begin with.
RESERVED, REHEARSAL = ("vote_cache", "file_hashes", "slurm", "read"), "rehearsal-"

# Short names of settings, for notebook parameters and keyword arguments.
SHORT_NAMES = {
    "theta": ("partition", "theta"),
    "alpha": ("partition", "alpha"),
    "beta": ("partition", "beta"),
    "modules": ("adapter", "modules"),
    "init": ("adapter", "init"),
    "score": ("importance", "score"),
    "panel": ("voting", "panel"),
    "split_by": ("voting", "split_by"),
    "learning_rate": ("sft", "learning_rate"),
    "epochs": ("sft", "epochs"),
    "grpo_learning_rate": ("grpo", "learning_rate"),
    "kl": ("grpo", "kl"),
    "r": ("adapter", "r"),
    "lora_alpha": ("adapter", "lora_alpha"),
    "flipped": ("voting", "flipped"),
}


def _check_names(named: Any) -> Any:
    """Refuse keys of `named` that are not safe as a file name, shell word or papermill parameter (see `NAME`)."""
    known: dict[str, str] = {}
    for name in named if isinstance(named, dict) else ():
        if not isinstance(name, str):
            raise ValueError(f"YAML reads the name {name!r} as {_kind(name)}; put it in quotes, with a letter in it")
        if not NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot name a file; {NAME_RULE}")
        if re.search(r"-seed\d+$", name):
            raise ValueError(f"{name!r} ends as runs do, which are named NAME-seed0; choose another ending")
        if _reads_as_value(name):
            raise ValueError(f"{name!r} would be read as a value, not as a name; begin it with a word, as in theta_0.5")
        if (twin := known.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"{twin!r} and {name!r} would be one file on macOS; let them differ by more than case")
    return named


def _reads_as_value(name: str) -> bool:
    """Whether `papermill -p` would read `name` as a number, boolean or None."""
    try:
        float(name)
    except ValueError:
        return name in ("True", "False", "None")
    return True


def _kind(value: object) -> str:
    kinds = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "a section", str: "text"}
    return kinds.get(type(value), "nothing" if value is None else f"a {type(value).__name__}")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    source: str = Field(description="'packaged', a local folder, or a hub id")
    gguf_file: str | None
    revision: str | None
    target_name: str
    system_prompt: str | None  # null = as the pool's answers are written; see `Settings.system_prompt`
    plain_template: str
    dtype: Literal["auto", "float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    sharded: bool


class SplitSizes(Section):
    train: Positive
    validation: Positive
    test: Positive


class PoolSection(Section):
    source: Literal["ladder", "builtin", "gsm8k", "dolly-15k", "open-platypus", "codealpaca-20k"]
    path: str | None
    bad_rows: Literal["refuse", "drop"]
    running_totals: bool
    seed: int
    system1: SplitSizes
    system2: SplitSizes


class LocalTeacher(Section):
    """A causal LM whose vote is the label with the higher log-likelihood."""

    kind: Literal["local"]
    name: Name
    role_play: bool
    persona: str
    question: str
    labels: tuple[str, str] = Field(description="System 1's label, System 2's label")
    source: str | None = None  # another model than the target: a local folder, a hub id, or gemma3-270m
    gguf_file: str | None = None

    @field_validator("labels")
    @classmethod
    def _labels_differ(cls, labels: tuple[str, str]) -> tuple[str, str]:
        if labels[0].strip() == labels[1].strip():
            raise ValueError(f"both are {labels[0]!r}, so that no margin says anything; give each system its own")
        return labels


class ApiTeacher(Section):
    """A model behind an OpenAI-compatible server, which answers in words."""

    kind: Literal["api"]
    name: Name
    role_play: bool
    persona: str = ""
    question: str = API_QUESTION
    model: str
    base_url: str | None = None  # null = OPENAI_BASE_URL, else OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0  # null = not sent: some reasoning models refuse it
    max_tokens: Positive = 2048  # raised later, only answers that it cut off are asked for again
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None  # null = as `limit_field` says
    concurrency: Positive = 8
    timeout: Rate = 120.0
    retries: Annotated[int, Field(ge=0)] = 6
    price_in: Annotated[float, Field(ge=0.0)] = 0.0  # a million prompt tokens, in your currency
    price_out: Annotated[float, Field(ge=0.0)] = 0.0  # a million completion tokens

    @property
    def key(self) -> str:
        """The server's key, from the environment; empty if it is not set."""
        return os.environ.get(self.api_key_env, "").strip().strip("\ufeff").strip()

    def key_to_set(self) -> str | None:
        """The environment variable that has no key yet, or None. An InputError if its name looks like a key."""
        variable = self.api_key_env
        like_a_name = variable.isidentifier() and (len(variable) <= 20 or variable.isupper())
        if variable not in os.environ and not like_a_name:
            # The value is not shown, because it looks like the key itself.
            raise InputError(
                f"teacher {self.name!r}: api_key_env is the name of an environment variable, such as OPENAI_API_KEY"
            )
        return None if self.key else variable

    @property
    def limit_field(self) -> str:
        """The request's token limit field: OpenAI's reasoning models refuse `max_tokens`, which others need."""
        return self.max_tokens_field or ("max_tokens" if self.base_url else "max_completion_tokens")


class RecordedTeacher(Section):
    """Votes from a CSV or Parquet file with columns `id` and `system` (1, 2, or 0 for an abstention)."""

    kind: Literal["recorded"]
    name: Name
    path: str


class SuccessTeacher(Section):
    """The target itself: the more of its sampled completions are wrong, the slower a question is."""

    kind: Literal["success"]
    name: Name
    role_play: Literal[False] = False
    completions: Positive = 4  # of each question, at temperature 1
    max_new_tokens: Positive = 64


Teacher = Annotated[LocalTeacher | ApiTeacher | RecordedTeacher | SuccessTeacher, Field(discriminator="kind")]


class VotingSection(Section):
    teachers: tuple[Teacher, ...]
    panels: Annotated[dict[str, tuple[str, ...]], BeforeValidator(_check_names)]
    panel: str | None
    quorum: Positive | None
    tie: Literal["undecided", "system1", "system2"] | None
    calibration: Literal["pool", "content-free", "none"]
    batch_size: Positive
    split_by: Literal["votes", "construction", "random"]
    flipped: Share
    role_play_template: str
    plain_template: str

    def members(self, panel: str | None = None) -> tuple[str, ...]:
        """Names of the teachers in `panel`, else in `voting.panel`, else of all teachers."""
        panel = panel or self.panel
        return self.panels[panel] if panel else tuple(teacher.name for teacher in self.teachers)

    @model_validator(mode="after")
    def _panels_can_decide(self):
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teacher names must differ, got {names}")
        if "majority" in names:
            raise ValueError("teachers: 'majority' is what the panel decides; give the teacher another name")
        for panel, members in self.panels.items():
            if panel in ("votes", "construction", "random"):
                raise ValueError(f"panels: {panel!r} is a value of split_by; give the panel another name")
            if unknown := set(members) - set(names):
                raise ValueError(f"panels.{panel} names no teacher: {', '.join(sorted(unknown))}")
        if self.panel is not None and self.panel not in self.panels:
            raise ValueError(f"panel = {self.panel!r} is not in panels: {', '.join(self.panels) or 'there is none'}")
        for panel in self.panels or [None]:
            size = len(self.members(panel))
            label = f"panel {panel!r}" if panel else "the panel"
            if self.quorum is not None and self.quorum > size > 0:
                raise ValueError(f"quorum = {self.quorum} exceeds the {size} teachers of {label}")
            if size and size % 2 == 0 and self.tie is None:
                raise ValueError(
                    f"tie: the {size} teachers of {label} can tie; set tie to undecided, system1 or system2, "
                    "or ask an odd number"
                )
        return self


class AdapterSection(Section):
    kind: Literal["lora", "dora", "prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "shira"]
    init: Literal["normal", "lora", "gaussian", "olora", "pissa"]
    r: Positive
    lora_alpha: Positive
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)]
    modules: Modules
    virtual_tokens: Positive


class ImportanceSection(Section):
    examples: Positive
    batch_size: Positive
    score: Score
    stability: tuple[Positive, ...]


class PartitionSection(Section):
    theta: Theta
    alpha: Share
    beta: Share


class SftSection(Section):
    epochs: Rate
    learning_rate: Rate
    batch_size: Positive
    accumulation: Positive
    max_length: Positive
    long_rows: Literal["drop", "truncate", "refuse"]
    warmup_ratio: Share
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Rate
    gradient_checkpointing: bool


class GrpoSection(Section):
    steps: Positive
    learning_rate: Rate
    prompts_per_step: Positive
    completions: Annotated[int, Field(ge=2)]
    micro_batch: Positive
    rollout_batch: Positive | None
    max_prompt_length: Positive
    max_completion_length: Positive
    reward: Literal["auto", "answer", "overlap"]
    temperature: Rate
    kl: Annotated[float, Field(ge=0.0)]
    warmup_ratio: Share
    weight_decay: Annotated[float, Field(ge=0.0)]
    max_grad_norm: Rate
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"]
    scale_rewards: Literal["group", "batch", "none"]
    mask_truncated_completions: bool
    gradient_checkpointing: bool
    rollouts: Literal["here", "vllm-colocate", "vllm-server"]
    vllm_memory: Share
    vllm_server: str | None

    @model_validator(mode="after")
    def _server_is_named(self):
        if self.rollouts == "vllm-server" and self.vllm_server is None:
            raise ValueError("vllm_server is null; give the address of `trl vllm-serve`, such as http://localhost:8000")
        return self

    @property
    def rows(self) -> int:
        """How many completions a step generates."""
        return self.prompts_per_step * self.completions

    @property
    def rows_at_once(self) -> int:
        """How many completions are generated at once. A step generates its completions in batches of this size."""
        return self.rollout_batch or self.rows

    @model_validator(mode="after")
    def _batches_divide(self):
        total = self.rows
        if self.rollout_batch is not None and (self.rollout_batch % self.completions or self.rollout_batch > total):
            raise ValueError(
                f"rollout_batch = {self.rollout_batch} has to be a multiple of completions = {self.completions}, "
                f"at most prompts_per_step x completions = {total}"
            )
        if total % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} does not divide prompts_per_step x completions = {total}"
            )
        return self


class Gsm8kSection(Section):
    path: str | None
    shots: Annotated[int, Field(ge=0)]
    items: Positive | None
    max_new_tokens: Positive


class GsmSymbolicSection(Section):
    items: Positive
    max_new_tokens: Positive


class MmluSection(Section):
    path: str | None
    shots: Annotated[int, Field(ge=0)]
    items: Positive | None


class HumanEvalSection(Section):
    items: Positive | None
    max_new_tokens: Positive
    samples: Annotated[int, Field(ge=0)]


class EvaluationSection(Section):
    batch_size: Positive
    max_new_tokens: Positive
    pass_k: Positive
    pass_k_prompts: Positive
    watch_prompts: Annotated[int, Field(ge=0)]
    watch_every: Positive
    published_items: Annotated[int, Field(ge=0)]
    run_model_code: bool
    benchmarks: tuple[Literal["gsm8k", "gsm_symbolic", "mmlu", "humaneval"], ...]
    gsm8k: Gsm8kSection
    gsm_symbolic: GsmSymbolicSection
    mmlu: MmluSection
    humaneval: HumanEvalSection


class ExperimentSection(Section):
    """One training configuration; `None` stands for the profile's value."""

    sweep: Literal["theta", "two_stage", "baseline", "voting", "alpha_beta", "order", "regions", "tuning"]
    method: Literal[tuple(METHODS)]
    init: Literal["normal", "lora", "olora", "pissa"] | None = None
    r: Positive | None = None
    lora_alpha: Positive | None = None
    epochs: Rate | None = None
    learning_rate: Rate | None = None
    grpo_learning_rate: Rate | None = None
    kl: Annotated[float, Field(ge=0.0)] | None = None
    flipped: Share | None = None
    stages: tuple[Literal["sft", "sft_all", "grpo"], ...]
    selection: Selection = "importance"
    measured_on: Literal["test", "validation", "validation_loss"] = "test"
    score: Score | None = None
    modules: Modules | None = None
    theta: Theta | None = None
    alpha: Share | None = None
    beta: Share | None = None
    panel: str | None = None
    split_by: Literal["votes", "construction", "random"] | None = None
    seeds: tuple[Seed, ...] | None = None
    title: str

    @model_validator(mode="after")
    def _method_sets_no_other_init(self):
        if self.init not in (None, METHODS[self.method].get("init", self.init)):
            raise ValueError(
                f"init = {self.init!r}: method {self.method} has its own; leave init out, or take method lora"
            )
        return self

    @model_validator(mode="after")
    def _selection_is_of_a_partition(self):
        if self.selection != "importance" and self.method != "lorapar":
            raise ValueError(
                f"selection = {self.selection!r}: {self.method} trains every element; set method to lorapar"
            )
        return self

    @model_validator(mode="after")
    def _tuning_reads_no_test_row(self):
        if self.sweep == "tuning" and self.measured_on == "test":
            raise ValueError("measured_on = 'test': a tuning run chooses settings; use validation or validation_loss")
        return self


class Settings(Section):
    profile: str
    profile_file: str  # from the project's root, else from the home directory (`~/…`), else in full
    publishable: bool
    seed: Seed
    seeds: tuple[Seed, ...]
    threads: Positive
    processes: Positive
    checkpoint_every: Positive
    show_rollouts: Annotated[int, Field(ge=0)]
    show_curves: bool
    speed: Literal["fast", "plain"] | tuple[Literal[SHORTCUTS], ...]
    model: ModelSection
    pool: PoolSection
    voting: VotingSection
    adapter: AdapterSection
    importance: ImportanceSection
    partition: PartitionSection
    sft: SftSection
    grpo: GrpoSection
    evaluation: EvaluationSection
    experiments: Annotated[dict[str, ExperimentSection], BeforeValidator(_check_names)]

    @model_validator(mode="after")
    def _panels_split_by_votes(self):
        for name, spec in self.experiments.items():
            if spec.panel and (split_by := spec.split_by or self.voting.split_by) != "votes":
                raise ValueError(f"experiments.{name}.panel = {spec.panel!r}: split_by is {split_by}; set it to votes")
        return self

    @model_validator(mode="after")
    def _base_can_be_had(self):
        if self.model.sharded and self.processes == 1:
            raise ValueError("model.sharded = true shares the base over processes; set processes above 1")
        if self.model.quantization and self.model.sharded:
            raise ValueError("model.quantization: a 4-bit base cannot be shared out; set model.sharded to false")
        if self.model.quantization and self.adapter.init in ("olora", "pissa"):
            raise ValueError(f"adapter.init = {self.adapter.init} changes the base's weights, which 4 bits cannot take")
        return self

    @property
    def profile_argument(self) -> str:
        """The argument of `load_profile` for this profile: name, or path of a file outside `profiles/`."""
        return self.profile if self.profile_file == f"profiles/{self.profile}.yaml" else self.profile_file

    @property
    def runs(self) -> Path:
        """The folder for all output of this profile."""
        return working_root() / "runs" / self.profile

    @property
    def target_modules(self) -> tuple[str, ...]:
        """Names of the linear layers with an adapter."""
        modules = self.adapter.modules
        return MODULES[modules] if isinstance(modules, str) else modules

    @property
    def has_free_text(self) -> bool:
        """Whether the pool's answers are free text, scored by overlap and loss instead of by value."""
        return self.pool.source in FREE_TEXT

    @property
    def system_prompt(self) -> str:
        """`model.system_prompt`, or the default for the pool's kind of answers."""
        if self.model.system_prompt is not None:
            return self.model.system_prompt
        return SYSTEM_PROMPTS["free text" if self.has_free_text else "checked"]

    @property
    def reward(self) -> str:
        """`grpo.reward`, with `auto` resolved: `overlap` for free text, else `answer`."""
        if self.grpo.reward != "auto":
            return self.grpo.reward
        return "overlap" if self.has_free_text else "answer"

    @property
    def shortcuts(self) -> tuple[str, ...]:
        """The shortcuts that may be taken, in the order of `SHORTCUTS`: all if `speed` is `fast`, none if `plain`."""
        wanted = {"fast": SHORTCUTS, "plain": ()}.get(self.speed, self.speed)
        return tuple(name for name in SHORTCUTS if name in wanted)

    @property
    def split_name(self) -> str:
        """The panel or rule that splits the examples into System 1 and System 2, by name."""
        by_votes = self.voting.panel or "votes"
        return by_votes if self.voting.split_by == "votes" else self.voting.split_by

    def local_files(self) -> list[Path]:
        """The files behind all settings that name a local file or folder (see `PATHS`), hidden ones left out."""
        places = [Path(value).expanduser() for keys in PATHS for value in _values_at(self.model_dump(), keys) if value]
        files = [[place] if place.is_file() else sorted(place.rglob("*")) for place in places if place.exists()]
        return [path for group in files for path in group if path.is_file() and not path.name.startswith(".")]

    def experiment_runs(self) -> list[tuple[str, int]]:
        """Every (experiment name, seed) of this profile, in order."""
        return [(name, seed) for name, spec in self.experiments.items() for seed in self.seeds_of(spec)]

    def seeds_of(self, experiment: ExperimentSection) -> tuple[int, ...]:
        """The experiment's own seeds, of which there may be none, else the profile's."""
        return self.seeds if experiment.seeds is None else experiment.seeds

    def for_experiment(self, name: str, seed: int) -> "Settings":
        """The settings of one experiment: the profile's, with the experiment's own values and `seed` in place."""
        if name not in self.experiments:
            raise InputError(
                f"experiment: {name!r} is not in profile {self.profile!r}; it has {', '.join(self.experiments)}"
            )
        spec = self.experiments[name]
        values = {key: value for key in SHORT_NAMES if (value := getattr(spec, key, None)) is not None}
        return self.changed(seed=seed, adapter=METHODS[spec.method], **values)

    def changed(self, **overrides: Any) -> "Settings":
        """A validated copy with `overrides` (see `load_profile`) applied."""
        over = _with_paths(_expand(overrides), (Path.cwd(), project_root()))
        return _validate(_merge(self.model_dump(), over), where=f"profile {self.profile}")


def project_root() -> Path:
    """The folder with `profiles/defaults.yaml`: at or above the working directory, else the package's clone.

    A package that was installed from a wheel has a copy of its own (see `setup.py`).
    """
    for folder in (Path.cwd(), *Path.cwd().parents, PACKAGE.parent, INSTALLED):
        if (folder / "profiles" / "defaults.yaml").is_file():
            return folder
    raise InputError(f"no profiles/defaults.yaml above {Path.cwd()} or {PACKAGE}: run from a clone of the project")


def working_root() -> Path:
    """The folder that `runs/` is in: the project's root, or without a clone the working directory."""
    root = project_root()
    return Path.cwd() if root == INSTALLED else root


PACKAGE = Path(__file__).resolve().parent
INSTALLED = PACKAGE / "project"


def load_profile(name_or_path: str | os.PathLike = "laptop", **overrides: Any) -> Settings:
    """Read a profile over the defaults and validate it.

    Relative paths in a profile (see `PATHS`) start at the profile's folder, else at the project's root, so they mean
    the same wherever the profile is loaded. Relative paths in `overrides` start at the working directory, else at the
    root. A value that is no file or folder in either place stays unchanged, because it may be a hub id.

    Parameters
    ----------
    name_or_path
        `smoke`, `laptop`, … (a file of `profiles/`), or the path of a YAML file anywhere.
    **overrides
        Values that replace the profile's: a setting (`seed=1`), a short name (`theta`, `alpha`, `modules`, …), or keys
        of a section as a dict (`sft={"epochs": 1}`). `None` keeps the profile's value.

    Raises
    ------
    InputError
        An unknown profile, key or value; the message names the file, the key and the allowed values.
    """
    root = project_root()
    merged: dict = {}
    for path, layer in _layers(name_or_path):
        merged = _merge(merged, _with_paths(layer, (path.parent, root)))
    _check_file_name(path)
    merged |= {"profile": path.stem, "profile_file": _shown(path)}
    merged["experiments"] = _with_grids(merged.get("experiments") or {}, merged.pop("grids", None) or [], str(path))
    over = _with_paths(_expand(overrides), (Path.cwd(), root))
    return _validate(_merge(merged, over), where=str(path), over=over)


def profile_files(name_or_path: str | os.PathLike) -> list[Path]:
    """The files of a profile in order of merging: the defaults, the profiles that it `extends`, the profile itself."""
    return [path for path, _ in _layers(name_or_path)]


def _layers(name_or_path: str | os.PathLike) -> list[tuple[Path, dict]]:
    """Each of `profile_files` with the file's own content."""
    defaults = project_root() / "profiles" / "defaults.yaml"
    path = _profile_at(str(name_or_path))
    if path is None or path.samefile(defaults):
        raise InputError(
            f"profile: no {str(name_or_path)!r}; choose one of {', '.join(_known_profiles())} or give a YAML file"
        )
    layers = [(path, _read_yaml(path))]
    while "extends" in layers[-1][1]:
        parent = _parent([path for path, _ in layers], layers[-1][1].pop("extends"))
        layers.append((parent, _read_yaml(parent)))
    return [(defaults, _read_yaml(defaults)), *reversed(layers)]


def _parent(chain: Sequence[Path], named: object) -> Path:
    """The file that the last profile of `chain` extends under the name `named`; each of `chain` extends the next."""
    child, defaults = chain[-1], project_root() / "profiles" / "defaults.yaml"
    where = f"{child}: extends = {named!r}"
    trail = " -> ".join([*(path.name for path in chain), str(named)])
    if not isinstance(named, str) or not named.strip():
        raise InputError(f"{where} is no name; give that of one profile, as in `extends: laptop` ({trail})")
    parent = _profile_at(named, child.parent)
    if named == "defaults" or (parent and parent.samefile(defaults)):
        raise InputError(f"{where}: every profile starts from the defaults; leave the line out ({trail})")
    if parent is None:
        file = f"profiles/{named}.yaml" if Path(named).name == named and not _is_yaml(named) else named
        profiles = f"one of {', '.join(_known_profiles())}"
        raise InputError(f"{where}: there is no {file} ({trail}); name {profiles}, or a path from {child.parent}")
    if any(parent.samefile(path) for path in chain):
        raise InputError(f"{where}: the profiles extend each other in a circle ({trail}); take one `extends` out")
    return parent


def _profile_at(named: str, folder: Path | None = None) -> Path | None:
    """The file of a profile: a name in `profiles/`, or a path from `folder` (the working directory) or the root.

    A name without folder and suffix is searched in `profiles/` first, so that it means the same everywhere.
    """
    root, text = project_root(), os.path.expanduser(named)
    places = [folder or Path.cwd(), root, root / "profiles"]
    if Path(text).name == text and not _is_yaml(text):
        places = [root / "profiles", places[0]]
    for place in places:
        path = os.path.abspath(place / (text if _is_yaml(text) else f"{text}.yaml"))
        if os.path.isfile(path):
            return Path(path)
    return None


def _is_yaml(named: str) -> bool:
    return named.lower().endswith((".yaml", ".yml"))


def _known_profiles() -> list[str]:
    return sorted(path.stem for path in (project_root() / "profiles").glob("*.yaml") if path.stem != "defaults")


def _check_file_name(path: Path) -> None:
    """Refuse a file name that cannot name the folder `runs/<name>/`, or that another profile has."""
    # Some file systems ignore case. A rehearsal's own profile lies in a hidden folder.
    folded = path.stem.casefold()
    is_reserved = folded in RESERVED or (folded.startswith(REHEARSAL) and not path.parent.name.startswith("."))
    if not NAME.fullmatch(path.stem) or is_reserved:
        reserved = "runs/ has something else of that name; " if is_reserved else ""
        raise InputError(f"profile: {path} would be run in runs/{path.stem}: {reserved}rename the file; {NAME_RULE}")
    for other in sorted((project_root() / "profiles").glob("*.y*ml")):
        if other.is_file() and other.stem.casefold() == folded and not other.samefile(path):
            raise InputError(
                f"profile: {path} and {other} have one name, and both would be run in runs/{path.stem}; rename one"
            )


def _shown(path: Path) -> str:
    """`path` for commands and records: relative to the root, or with `~` for the home directory."""
    if path.is_relative_to(project_root()):
        return path.relative_to(project_root()).as_posix()
    home = Path(os.path.expanduser("~"))
    for folder in (home, home.resolve()):
        if path.is_relative_to(folder):
            return f"~/{path.relative_to(folder).as_posix()}"
    return str(path)


class _ProfileLoader(yaml.SafeLoader):
    """Refuses a repeated key, of which YAML would silently take the second value."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        keys = set()
        for key, _ in node.value:
            # `<<` merges another section and may be repeated.
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in keys:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is there twice", problem_mark=key.start_mark)
            keys.add((key.tag, key.value))
        return node


def _read_yaml(path: Path) -> dict:
    """The content of a profile's file, which is never empty."""
    try:
        # utf-8-sig, because some editors begin a file with a byte-order mark.
        text = path.read_text(encoding="utf-8-sig")
        content = yaml.load(text, Loader=_ProfileLoader)
    except yaml.YAMLError as error:
        raise InputError(_explain_yaml(error, path, text)) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not text in UTF-8; save it in that encoding") from None
    except ValueError as error:  # a date such as 2026-13-01
        raise InputError(f"{path}: not valid YAML ({error}); put what is meant as text in quotes") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if content is None or content == {}:
        raise InputError(f"{path}: the file is empty; begin it with `extends: laptop` or the settings that it changes")
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found {_kind(content)}")
    for key in ("profile", "profile_file"):
        if key in content:
            raise InputError(f"{path}: {key} is not a setting: a profile is called as its file; leave the line out")
    return content


def _explain_yaml(error: yaml.YAMLError, path: Path, text: str) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return f"{path}: not valid YAML ({error})"
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    indent = line[: len(line) - len(line.lstrip())]
    remedy = "; indent with spaces, not with tabs" if "\t" in indent else ""
    return f"{path}: not valid YAML in line {mark.line + 1}: {error.problem}{remedy}"


def _with_paths(content: Any, folders: Sequence[Path], keys: tuple = ()) -> Any:
    """`content` with each path (see `PATHS`) made absolute under the first of `folders` that has the file.

    Other paths stay unchanged, because they may be hub ids. If not, messages show the user's own words.
    """
    if isinstance(content, dict):
        return {key: _with_paths(value, folders, (*keys, key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_with_paths(value, folders, (*keys, "*")) for value in content]
    if keys not in PATHS or not isinstance(content, str) or not content:
        return content
    if keys[-1] == "source" and content in KEYWORDS:
        return content
    for folder in folders:
        path = os.path.abspath(folder / os.path.expanduser(content))
        # A file with the same name as a model on the hub is not a model.
        if os.path.isdir(path) or (os.path.isfile(path) and (keys[-1] == "path" or path.endswith(".gguf"))):
            return path
    return content


def _values_at(content: Any, keys: tuple) -> list:
    """The values at a path of `PATHS`; none where a key is absent."""
    if not keys:
        return [content]
    if keys[0] == "*":
        return [value for item in content for value in _values_at(item, keys[1:])]
    return _values_at(content[keys[0]], keys[1:]) if keys[0] in content else []


def _merge(base: dict, over: dict) -> dict:
    """Merge sections key by key. Lists, scalars, experiments (with grids) and panels are replaced as a whole.

    A list under `key+` is added to the list under `key`, as in `teachers+: [my own]`.
    """
    merged = {key: value for key, value in base.items() if key != "grids" or "experiments" not in over}
    for key, value in over.items():
        longer = key[:-1] if str(key).endswith("+") else None
        if longer and isinstance(value, list | tuple) and isinstance(merged.get(longer), list | tuple):
            merged[longer] = [*merged[longer], *value]
            continue
        whole = key in ("experiments", "panels") or not isinstance(value, dict) or not isinstance(base.get(key), dict)
        merged[key] = value if whole else _merge(base[key], value)
    return merged


def _with_grids(experiments: dict, grids: list[dict], where: str) -> dict:
    """The experiments, plus one for every combination of values in each grid's `over`.

    The values are filled into the grid's `name` and `title`. `{name: "{modules}_{theta}", over: {modules: [QKV, GUD],
    theta: [0.5, 0.9]}, …}` gives four experiments.
    """
    if not isinstance(experiments, dict):
        raise InputError(f"{where}: experiments is {_kind(experiments)}; write a line `name: {{sweep: …}}` for each")
    if not isinstance(grids, list) or not all(isinstance(grid, dict) for grid in grids):
        raise InputError(f"{where}: grids is no list of sections; write `- {{name: …, title: …, over: …}}` for each")
    all_experiments = dict(experiments)
    for grid in grids:
        if missing := {"name", "title", "over"} - set(grid):
            raise InputError(f"{where}: grids: {grid} lacks {', '.join(sorted(missing))}")
        if not isinstance(grid["over"], dict):
            raise InputError(f"{where}: grids: {grid['name']}: over is {_kind(grid['over'])}; write `theta: [a, b, …]`")
        if loose := [key for key, values in grid["over"].items() if not isinstance(values, list) or not values]:
            raise InputError(f"{where}: grids: {grid['name']}: over.{loose[0]} is no list; write [a, b, …]")
        common = {key: value for key, value in grid.items() if key not in ("name", "title", "over")}
        for values in itertools.product(*grid["over"].values()):
            combination = dict(zip(grid["over"], values, strict=True))
            try:
                name, title = (str(grid[key]).format(**combination) for key in ("name", "title"))
            except KeyError as unknown:
                raise InputError(
                    f"{where}: grids: {grid['name']} uses {unknown}; its `over` has {', '.join(combination)}"
                ) from None
            except (AttributeError, IndexError, ValueError) as error:
                raise InputError(
                    f"{where}: grids: {grid['name']}: {error}; write {{theta}} where a value of `over` belongs"
                ) from None
            if name in all_experiments:
                raise InputError(f"{where}: grids: {name!r} is there twice; give each grid its own names")
            all_experiments[name] = {**common, **combination, "title": title}
    return all_experiments


def _expand(overrides: dict) -> dict:
    nested: dict = {}
    for key, value in overrides.items():
        if value is None:
            continue
        section, leaf = SHORT_NAMES.get(key, (None, key))
        nested = _merge(nested, {section: {leaf: value}} if section else {leaf: value})
    return nested


def _validate(content: dict, where: str, over: dict | None = None) -> Settings:
    """The settings; an error names `where` the content is from, or for a value of `over`, that it is a parameter."""
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        given = f"parameter over {where}"
        explained = [_explain(item, given if _holds(over, item["loc"]) else where) for item in error.errors()]
        raise InputError("\n".join(explained)) from None


def _holds(content: Any, location: tuple) -> bool:
    """Whether the value at `location` is from `content`, whose lists replace others as a whole."""
    for part in location:
        if not isinstance(content, dict):
            return content is not None
        if part not in content:
            return False
        content = content[part]
    return bool(location)


def _explain(item: dict, where: str) -> str:
    # Parts with brackets, such as `tuple[str, ...]`, are pydantic's names of types.
    key = ".".join(str(part) for part in item["loc"] if "[" not in str(part)) or "profile"
    if item["type"] == "extra_forbidden":
        section = _section_at(item["loc"][:-1])
        names = (name for name in getattr(section, "model_fields", {}) if name not in ("profile", "profile_file"))
        allowed = ", ".join(names) or "see profiles/defaults.yaml"
        return f"{where}: {key} is not a setting; allowed here: {allowed}"
    if item["type"] == "missing":
        # The defaults have no teacher.
        like = "book/reuse.md" if item["loc"][:2] == ("voting", "teachers") else "profiles/defaults.yaml"
        return f"{where}: {key} is missing; give it a value, as {like} does"
    value = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    return f"{where}: {key}{value}: {item['msg'].removeprefix('Value error, ')}{_remedy(item)}"


def _remedy(item: dict) -> str:
    """Advice for a value that YAML read as another type than the setting has."""
    if item["type"] == "float_parsing" and re.fullmatch(r"-?\d+,\d+", str(item["input"])):
        return f"; write {item['input'].replace(',', '.')}"
    if item["type"] == "string_type" and isinstance(item["input"], bool | int | float):
        return f"; YAML reads it as {_kind(item['input'])}, so put it in quotes"
    if item["type"] in ("tuple_type", "list_type"):
        return "; write a list: [a, b]"
    if item["type"] in ("model_type", "dict_type"):
        return "; write its settings below it, as `key: value` lines"
    return ""


def _section_at(location: tuple) -> Any:
    """The class that validates the setting at `location`, a path through teachers' kinds and experiments' names."""
    kinds = {"local": LocalTeacher, "api": ApiTeacher, "recorded": RecordedTeacher, "success": SuccessTeacher}
    section: Any = Settings
    for part in location:
        if part in getattr(section, "model_fields", {}):
            section = section.model_fields[part].annotation
        elif part in kinds:
            section = kinds[part]
        elif section == dict[str, ExperimentSection]:
            section = ExperimentSection
    return section
