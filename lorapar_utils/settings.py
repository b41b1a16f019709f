"""Profiles: one YAML file a scale, laid over `profiles/defaults.yaml` and validated by pydantic."""

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lorapar_utils.errors import InputError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Theta = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0.0)]
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

# What an experiment's method changes about the adapter. All of them train every element, LoRA-PAR a part; `lora` and
# `lorapar` start from the profile's own `adapter.init`, so that one differs from the other in the partition only.
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

# What a notebook parameter or keyword changes: the paper's symbols have one short name each.
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
}


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    source: str = Field(description="'packaged', a local folder, or a hub id")
    gguf_file: str | None
    revision: str | None
    target_name: str
    system_prompt: str
    dtype: Literal["auto", "float32", "bfloat16"]
    quantization: Literal["nf4"] | None
    sharded: bool


class SplitSizes(Section):
    train: Positive
    validation: Positive
    test: Positive


class PoolSection(Section):
    source: Literal["builtin", "gsm8k", "dolly-15k", "open-platypus", "codealpaca-20k"]
    path: str | None
    running_totals: bool
    seed: int
    system1: SplitSizes
    system2: SplitSizes


class LocalTeacher(Section):
    """A causal LM that is read by the log-likelihood of its two labels."""

    kind: Literal["local"]
    name: Name
    role_play: bool
    persona: str
    question: str
    labels: tuple[str, str] = Field(description="System 1's label, System 2's label")
    source: str | None = None  # another model than the target: a local folder, a hub id, or gemma3-270m
    gguf_file: str | None = None


class ApiTeacher(Section):
    """A model behind an OpenAI-compatible server, that answers in words."""

    kind: Literal["api"]
    name: Name
    role_play: bool
    persona: str = ""
    question: str = API_QUESTION
    model: str
    base_url: str | None = None  # null = OpenAI's own
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0  # null = not sent: some reasoning models refuse it
    max_tokens: Positive = 2048
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] | None = None  # null = as `limit_field` says
    concurrency: Positive = 8
    timeout: Rate = 120.0
    retries: Annotated[int, Field(ge=0)] = 6
    price_in: Annotated[float, Field(ge=0.0)] = 0.0  # a million prompt tokens, in your currency
    price_out: Annotated[float, Field(ge=0.0)] = 0.0  # a million completion tokens

    @property
    def limit_field(self) -> str:
        """OpenAI's reasoning models refuse `max_tokens`; many other servers know nothing else."""
        return self.max_tokens_field or ("max_tokens" if self.base_url else "max_completion_tokens")


class RecordedTeacher(Section):
    """Votes that were cast elsewhere: a CSV or Parquet file with columns `id` and `system` (1, 2, or 0)."""

    kind: Literal["recorded"]
    name: Name
    path: str


Teacher = Annotated[LocalTeacher | ApiTeacher | RecordedTeacher, Field(discriminator="kind")]


class VotingSection(Section):
    teachers: tuple[Teacher, ...]
    panels: dict[str, tuple[str, ...]]
    panel: str | None
    quorum: Positive | None
    tie: Literal["undecided", "system1", "system2"] | None
    calibration: Literal["pool", "content-free", "none"]
    batch_size: Positive
    split_by: Literal["votes", "construction", "random"]
    role_play_template: str
    plain_template: str

    def members(self, panel: str | None = None) -> tuple[str, ...]:
        """Names of the teachers whose votes count: `panel`'s, else `voting.panel`'s, else everybody's."""
        chosen = panel or self.panel
        return self.panels[chosen] if chosen else tuple(teacher.name for teacher in self.teachers)

    @model_validator(mode="after")
    def _panels_can_decide(self):
        names = [teacher.name for teacher in self.teachers]
        if len(set(names)) != len(names):
            raise ValueError(f"teacher names must differ, got {names}")
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
    modules: Literal["QKV", "GUD", "QKVGUD"]
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
    max_completion_length: Positive
    temperature: Rate
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
        """Completions of a step."""
        return self.prompts_per_step * self.completions

    @property
    def rows_at_once(self) -> int:
        """Completions that are written together; a step's are, one such batch after the other."""
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


class MmluSection(Section):
    path: str | None
    shots: Annotated[int, Field(ge=0)]
    items: Positive | None


class HumanEvalSection(Section):
    max_new_tokens: Positive
    samples: Annotated[int, Field(ge=0)]


class EvaluationSection(Section):
    batch_size: Positive
    max_new_tokens: Positive
    pass_k: Positive
    pass_k_prompts: Positive
    watch_prompts: Annotated[int, Field(ge=0)]
    watch_every: Positive
    run_model_code: bool
    benchmarks: tuple[Literal["gsm8k", "mmlu", "humaneval"], ...]
    gsm8k: Gsm8kSection
    mmlu: MmluSection
    humaneval: HumanEvalSection


class ExperimentSection(Section):
    """One training configuration; `None` takes the profile's own value."""

    sweep: Literal["theta", "two_stage", "baseline", "voting", "alpha_beta", "order"]
    method: Literal[tuple(METHODS)]
    init: Literal["normal", "olora", "pissa"] | None = None
    learning_rate: Rate | None = None
    stages: tuple[Literal["sft", "sft_all", "grpo"], ...]
    selection: Literal["importance", "random"] = "importance"
    score: Score | None = None
    modules: Literal["QKV", "GUD", "QKVGUD"] | None = None
    theta: Theta | None = None
    alpha: Share | None = None
    beta: Share | None = None
    panel: str | None = None
    split_by: Literal["votes", "construction", "random"] | None = None
    seeds: tuple[int, ...] | None = None
    title: str


class Settings(Section):
    profile: str
    publishable: bool
    seed: int
    seeds: tuple[int, ...]
    threads: Positive
    processes: Positive
    checkpoint_every: Positive
    show_rollouts: Annotated[int, Field(ge=0)]
    model: ModelSection
    pool: PoolSection
    voting: VotingSection
    adapter: AdapterSection
    importance: ImportanceSection
    partition: PartitionSection
    sft: SftSection
    grpo: GrpoSection
    evaluation: EvaluationSection
    experiments: dict[str, ExperimentSection]

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
    def runs(self) -> Path:
        """Where everything that this profile makes is written."""
        return project_root() / "runs" / self.profile

    @property
    def target_modules(self) -> tuple[str, ...]:
        return MODULES[self.adapter.modules]

    @property
    def scores_folder(self) -> Path:
        """Where these settings' importance scores are kept."""
        parts = (self.importance.score, self.adapter.init, self.adapter.modules, self.split_name, f"seed{self.seed}")
        return self.runs / "scores" / "-".join(parts)

    @property
    def split_name(self) -> str:
        """What System 1 and System 2 were told apart by, for folder names."""
        by_votes = self.voting.panel or "votes"
        return by_votes if self.voting.split_by == "votes" else self.voting.split_by

    def experiment_runs(self) -> list[tuple[str, int]]:
        """Every (experiment name, seed) of this profile, in order."""
        return [(name, seed) for name, spec in self.experiments.items() for seed in spec.seeds or self.seeds]

    def for_experiment(self, name: str, seed: int) -> "Settings":
        """The settings under which one experiment runs: its theta, alpha, beta and seed filled in."""
        if name not in self.experiments:
            raise InputError(
                f"experiment: {name!r} is not in profile {self.profile!r}; it has {', '.join(self.experiments)}"
            )
        spec = self.experiments[name]
        chosen = {key: value for key in SHORT_NAMES if (value := getattr(spec, key, None)) is not None}
        return self.changed(seed=seed, adapter=METHODS[spec.method], **chosen)

    def changed(self, **overrides: Any) -> "Settings":
        """A validated copy with `overrides` (see `load_profile`) in place."""
        return _validate(_merge(self.model_dump(), _expand(overrides)), where=f"profile {self.profile}")


def project_root() -> Path:
    """The folder that holds `profiles/defaults.yaml`: the working directory's, or else the package's."""
    package = Path(__file__).resolve().parent.parent
    for folder in (Path.cwd(), *Path.cwd().parents, package):
        if (folder / "profiles" / "defaults.yaml").is_file():
            return folder
    raise InputError(f"no profiles/defaults.yaml above {Path.cwd()} or {package}: run from a clone of the project")


def load_profile(name_or_path: str | os.PathLike = "cpu", **overrides: Any) -> Settings:
    """Read a profile over the defaults and validate it.

    Parameters
    ----------
    name_or_path
        `smoke`, `cpu`, … (a file of `profiles/`), or the path of a YAML file.
    **overrides
        Values on top: a setting (`seed=1`), a short name (`theta`, `alpha`, `beta`, `modules`, `init`), or a
        whole section as a dict (`sft={"epochs": 1}`). `None` keeps the profile's value.

    Raises
    ------
    InputError
        An unknown profile, key or value; the message names file, key and what is allowed.
    """
    layers: dict = {}
    for path in profile_files(name_or_path):
        own = _read_yaml(path)
        own.pop("extends", None)
        layers = _merge(layers, own)
    layers["profile"] = path.stem
    layers["experiments"] = _with_grids(layers.get("experiments") or {}, layers.pop("grids", None) or [], str(path))
    return _validate(_merge(layers, _expand(overrides)), where=str(path))


def profile_files(name_or_path: str | os.PathLike) -> list[Path]:
    """The files that a profile is laid over, itself last: the defaults, then the profile that it `extends`."""
    folder = project_root() / "profiles"
    path = Path(name_or_path) if str(name_or_path).endswith((".yaml", ".yml")) else folder / f"{name_or_path}.yaml"
    if not path.is_file() or path.name == "defaults.yaml":
        known = sorted(p.stem for p in folder.glob("*.yaml") if p.stem != "defaults")
        raise InputError(f"profile: no {str(name_or_path)!r}; choose one of {', '.join(known)} or give a YAML file")
    files = [folder / "defaults.yaml", path]
    if (parent := _read_yaml(path).get("extends")) is not None:
        if not (folder / f"{parent}.yaml").is_file():
            raise InputError(f"{path}: extends = {parent!r}: there is no profiles/{parent}.yaml")
        files.insert(1, folder / f"{parent}.yaml")
    return files


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected 'key: value' lines, found {type(content).__name__}")
    return content


def _merge(base: dict, over: dict) -> dict:
    """Sections merge key by key; lists, scalars, experiments and panels are replaced whole, grids with experiments."""
    merged = {key: value for key, value in base.items() if key != "grids" or "experiments" not in over}
    for key, value in over.items():
        whole = key in ("experiments", "panels") or not isinstance(value, dict) or not isinstance(base.get(key), dict)
        merged[key] = value if whole else _merge(base[key], value)
    return merged


def _with_grids(experiments: dict, grids: list[dict], where: str) -> dict:
    """The experiments, and one more for every combination of each grid's `over`.

    A grid is an experiment whose `name` and `title` take the combination's values: `{name: "{modules}_{theta}", over:
    {modules: [QKV, GUD], theta: [0.5, 0.9]}, …}` is four.
    """
    found = dict(experiments)
    for grid in grids:
        if missing := {"name", "title", "over"} - set(grid):
            raise InputError(f"{where}: grids: {grid} lacks {', '.join(sorted(missing))}")
        if loose := [key for key, values in grid["over"].items() if not isinstance(values, list)]:
            raise InputError(f"{where}: grids: {grid['name']}: over.{loose[0]} is no list; write [a, b, …]")
        common = {key: value for key, value in grid.items() if key not in ("name", "title", "over")}
        for values in itertools.product(*grid["over"].values()):
            chosen = dict(zip(grid["over"], values, strict=True))
            try:
                name, title = (grid[key].format(**chosen) for key in ("name", "title"))
            except KeyError as unknown:
                raise InputError(
                    f"{where}: grids: {grid['name']} uses {unknown}; its `over` has {', '.join(chosen)}"
                ) from None
            if name in found:
                raise InputError(f"{where}: grids: {name!r} is there twice; give each grid its own names")
            found[name] = {**common, **chosen, "title": title}
    return found


def _expand(overrides: dict) -> dict:
    nested: dict = {}
    for key, value in overrides.items():
        if value is None:
            continue
        section, leaf = SHORT_NAMES.get(key, (None, key))
        nested = _merge(nested, {section: {leaf: value}} if section else {leaf: value})
    return nested


def _validate(content: dict, where: str) -> Settings:
    try:
        return Settings.model_validate(content)
    except ValidationError as error:
        raise InputError("\n".join(_explain(item, where) for item in error.errors())) from None


def _explain(item: dict, where: str) -> str:
    key = ".".join(str(part) for part in item["loc"]) or "profile"
    if item["type"] == "extra_forbidden":
        section = _section_at(item["loc"][:-1])
        allowed = ", ".join(getattr(section, "model_fields", {})) or "see profiles/defaults.yaml"
        return f"{where}: {key} is not a setting; allowed here: {allowed}"
    if item["type"] == "missing":
        return f"{where}: {key} is missing; give it a value, as profiles/defaults.yaml does"
    value = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    return f"{where}: {key}{value}: {item['msg']}"


def _section_at(location: tuple) -> Any:
    """The class that validates the setting at `location`, through teachers' kinds and experiments' names."""
    kinds = {"local": LocalTeacher, "api": ApiTeacher, "recorded": RecordedTeacher}
    section: Any = Settings
    for part in location:
        if part in getattr(section, "model_fields", {}):
            section = section.model_fields[part].annotation
        elif part in kinds:
            section = kinds[part]
        elif section == dict[str, ExperimentSection]:
            section = ExperimentSection
    return section
