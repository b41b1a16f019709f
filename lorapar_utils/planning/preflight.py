"""Checks of model, data, teachers and benchmarks before anything is trained or paid for.

Nothing that takes long is loaded: of the model only the headers of the files, the configuration and the tokenizer.
"""

import torch
from transformers import AutoModelForCausalLM

from lorapar_utils import data, evaluation, models, training
from lorapar_utils.data.encoding import check_prompts, encode_examples, prompt_ids
from lorapar_utils.data.splits import normalised
from lorapar_utils.errors import InputError, require
from lorapar_utils.evaluation.benchmarks import benchmark_tables
from lorapar_utils.models.files import check_fit, source_of
from lorapar_utils.settings import Settings
from lorapar_utils.voting import teachers


def check(settings: Settings) -> None:
    """Check everything that a run of the profile reads.

    Raises
    ------
    InputError
        The first error that a phase would raise.
    """
    check_packages(settings)
    check_model(settings)
    check_data(settings)


def check_packages(settings: Settings) -> None:
    """Check the optional packages that the profile needs; a plan can be made without them."""
    if settings.model.quantization:
        require("bitsandbytes", f"model.quantization = {settings.model.quantization!r}", "qlora")
    if settings.grpo.rollouts != "here" and any("grpo" in spec.stages for spec in settings.experiments.values()):
        require("vllm", f"grpo.rollouts = {settings.grpo.rollouts!r}", "vllm")


def check_data(settings: Settings) -> None:
    """Check the whole pool, also as tokens, the teachers' models, files and keys, and the benchmarks' files."""
    if not settings.voting.teachers:
        votes = settings.voting.split_by == "votes"
        remedy = ", or set voting.split_by: construction" if votes else ": the book's first chapter shows their votes"
        raise InputError(f"voting.teachers: the list is empty; name at least one{remedy}")
    for teacher in settings.voting.teachers:
        if teacher.kind == "local" and teacher.source:
            own_model = teachers.over(teacher.source, teacher.gguf_file, settings)
            source_of(own_model)
            models.load_tokenizer(own_model)
    rows = [row for row in data.load_pool(settings) if row["split"] == "train"]
    teachers.build_teachers(settings, rows)
    evaluation.check_benchmarks(settings)
    if "gsm8k" in settings.evaluation.benchmarks:
        questions = {normalised(question) for question in benchmark_tables("gsm8k", settings)["test"]["question"]}
        if repeated := [row["id"] for row in rows if normalised(row["prompt"]) in questions]:
            raise InputError(
                f"evaluation.gsm8k: {len(repeated)} of its test questions are in the pool's training split, first "
                f"{repeated[0]}; take them out of the pool's files, or score another benchmark"
            )
    stages = {stage for spec in settings.experiments.values() for stage in spec.stages}
    if stages & {"sft", "sft_all"}:
        encode_examples(rows, models.load_tokenizer(settings), settings)  # prints how many are too long
    if "grpo" in stages:
        training.check_references(rows, settings)


def check_model(settings: Settings) -> None:
    """Check the model's files, tokenizer and templates, and that it has the layers that the experiments train."""
    source_of(settings)
    tokenizer = models.load_tokenizer(settings)
    prompt_ids("1 + 1?", tokenizer, settings)
    check_prompts(tokenizer, settings.model.plain_template)
    config = models.load_config(settings)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # configurations from elsewhere fail in many ways
            raise InputError(
                f"model.source = {settings.model.source!r}: {config.model_type} is no causal language model that "
                f"transformers can make ({str(error).splitlines()[0][:200]})"
            ) from None
    check_fit(settings, model)
    for name, spec in settings.experiments.items():
        if spec.stages:
            models.check_modules(model, settings.for_experiment(name, settings.seed))
    if not settings.experiments:
        models.check_modules(model, settings)
