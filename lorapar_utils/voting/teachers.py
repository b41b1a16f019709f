"""The kinds of teacher: a local model, a server, recorded votes, the target's own success (paper, section 3.1).

Deviation: the paper's teachers are large reasoning models that answer in words, like `api` teachers here. A `local`
teacher votes for the label with the higher log-likelihood, so every vote has a margin.
"""

import functools
import hashlib
from collections.abc import Callable, Sequence

import jinja2

from lorapar_utils.cache import code_of, fingerprint, libraries
from lorapar_utils.errors import InputError
from lorapar_utils.machine import compute_dtype
from lorapar_utils.models.identity import model_identity
from lorapar_utils.settings import ApiTeacher, LocalTeacher, RecordedTeacher, Settings, SuccessTeacher
from lorapar_utils.voting import Ballot, Teacher
from lorapar_utils.voting.recorded import read_votes_file, recorded_teacher
from lorapar_utils.voting.success import success_teacher

# Fields that shape no answer: names, keys, prices and limits.
LOGISTICS = {"name", "api_key_env", "price_in", "price_out"}
LOGISTICS |= {"max_tokens", "max_tokens_field", "concurrency", "timeout", "retries"}
# Two prompts for which a template has to give different texts.
PROBES = ("What is 2 + 3?", "Name the capital of France.")


def build_teachers(settings: Settings, examples: Sequence[dict]) -> list[Teacher]:
    """The profile's teachers, checked as far as possible without asking a question.

    Raises
    ------
    InputError
        A template with an unknown variable or without the prompt; of an API teacher: a missing or unusable key, an
        invalid address; of recorded votes: a missing file or column, missing, repeated or unknown ids, a cell that is
        no vote.
    """

    @functools.cache
    def load(source: str | None, gguf_file: str | None):
        """Load a model on the first question, once for all teachers that use it."""
        from lorapar_utils import models

        return models.load_base(over(source, gguf_file, settings))

    teachers = []
    for section in settings.voting.teachers:
        if section.kind == "recorded":
            teachers.append(recorded_teacher(section, [example["id"] for example in examples]))
            continue
        if section.kind == "success":
            teachers.append(success_teacher(section, _key_of_computed(section, settings), settings, load))
            continue
        _check_template(section, settings)
        teachers.append(_server(section, settings) if section.kind == "api" else _local(section, settings, load))
    return teachers


def identity(section: LocalTeacher | ApiTeacher | RecordedTeacher | SuccessTeacher, settings: Settings) -> dict:
    """Everything that shapes a teacher's answers; part of the key of cached votes."""
    if section.kind == "recorded":
        return {"kind": "recorded", "sha256": hashlib.sha256(read_votes_file(section)).hexdigest()}
    shaping = section.model_dump(exclude=LOGISTICS)
    if section.kind == "api":
        from lorapar_utils.voting.servers import server_address  # here, because openai takes a second

        return shaping | {"base_url": server_address(section)}
    if section.kind == "success":
        return shaping | {"model": model_identity(settings)}
    model = model_identity(over(section.source, section.gguf_file, settings))
    model.pop("system_prompt")  # teachers get no system prompt
    return shaping | {"source": None, "gguf_file": None, "model": model}


def _key_of_computed(section: LocalTeacher | SuccessTeacher, settings: Settings) -> str:
    """The key of answers that this machine computes. They cost nothing, so other code, libraries or dtype ask anew."""
    dtype = compute_dtype(settings.model.dtype)
    return fingerprint([identity(section, settings), code_of(__file__), libraries(), dtype])


def over(source: str | None, gguf_file: str | None, settings: Settings) -> Settings:
    """The settings with a teacher's own model in place of the target; a `source` of None is the target itself."""
    if source is None:
        return settings
    return settings.changed(model={"source": source, "gguf_file": gguf_file, "revision": None})


def teacher_prompt(section: LocalTeacher | ApiTeacher, example: dict, settings: Settings) -> str:
    """The profile's template, filled in. The role-play template names the target model."""
    name = _template_name(section)
    variables = {"target": settings.model.target_name, "persona": section.persona, "question": section.question}
    variables |= {"prompt": example["prompt"], "answer": example["answer"]}
    try:
        return _template(getattr(settings.voting, name)).render(variables).strip()
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"voting.{name}: {error}; it may use target, persona, prompt, answer and question") from None


def _check_template(section: LocalTeacher | ApiTeacher, settings: Settings) -> None:
    if len({teacher_prompt(section, {"prompt": prompt, "answer": "5"}, settings) for prompt in PROBES}) == 1:
        raise InputError(
            f"voting.{_template_name(section)} asks the same question about every example; "
            "write {{ prompt }} where the example's own belongs"
        )


def _template_name(section: LocalTeacher | ApiTeacher) -> str:
    return "role_play_template" if section.role_play else "plain_template"


@functools.cache
def _template(source: str) -> jinja2.Template:
    return jinja2.Environment(undefined=jinja2.StrictUndefined).from_string(source)


def _local(section: LocalTeacher, settings: Settings, load: Callable) -> Teacher:
    prompt = functools.partial(teacher_prompt, section, settings=settings)

    def ask(asked: Sequence[dict], answered: Callable[[int, Ballot], None]) -> None:
        from lorapar_utils.fast.label_scores import margins_in_batches

        model, tokenizer = load(section.source, section.gguf_file)
        texts, plain = [prompt(example) for example in asked], settings.model.plain_template
        size = settings.voting.batch_size
        for rows, margins in margins_in_batches(model, tokenizer, texts, section.labels, plain, size):
            for i, margin in zip(rows, margins, strict=True):
                answered(i, Ballot(margin=margin))

    return Teacher(section.name, _key_of_computed(section, settings), prompt, ask)


def _server(section: ApiTeacher, settings: Settings) -> Teacher:
    from lorapar_utils.voting.servers import server_teacher  # here, because openai takes a second

    prompt = functools.partial(teacher_prompt, section, settings=settings)
    return server_teacher(section, fingerprint(identity(section, settings)), prompt)
