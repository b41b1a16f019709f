"""Teachers vote every example into System 1 or System 2 (paper, section 3.1).

Deviation: the paper's teachers are large reasoning models that answer in words. A local teacher here is read by
the log-likelihood of its two label words, so every vote comes with a margin, and a constant leaning toward one
label is removed by calibration (`voting.calibration`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import datasets
import diskcache
import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.errors import InputError
from lorapar_utils.records import fingerprint
from lorapar_utils.settings import Settings, TeacherSection

CONTENT_FREE = {"prompt": "N/A", "answer": "N/A"}


@dataclass(frozen=True)
class Teacher:
    """A named judge: `margins(examples)` > 0 where it leans to System 2.

    `key` identifies everything that shapes its answers (model, prompt); the cache stores margins under it.
    """

    name: str
    key: str
    margins: Callable[[Sequence[dict]], list[float]]


def local_teacher(
    section: TeacherSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> Teacher:
    """A causal LM that reads the role-play prompt and compares the log-likelihood of its two labels."""

    def margins(examples: Sequence[dict]) -> list[float]:
        prompts = [teacher_prompt(section, example, tokenizer, settings) for example in examples]
        return _label_margins(model, tokenizer, prompts, section.labels)

    key = fingerprint([settings.model.model_dump(), section.model_dump()])
    return Teacher(section.name, key, margins)


def teacher_prompt(
    section: TeacherSection, example: dict, tokenizer: PreTrainedTokenizerBase, settings: Settings
) -> str:
    """The chat prompt up to where the label comes: persona, role, the example, the question."""
    role = f"Act as the language model {settings.model.target_name}. " if section.role_play else ""
    text = (
        f"{role}{section.persona}\n\nQuestion: {example['prompt']}\nAnswer: {example['answer']}\n\n{section.question}"
    )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
    )


def vote(
    pool: datasets.Dataset,
    teachers: Sequence[Teacher],
    cache: diskcache.Cache,
    *,
    calibration: str = "pool",
    quorum: int = 2,
    batch_size: int = 32,
) -> datasets.Dataset:
    """Ask every teacher about every example, once, and count.

    Parameters
    ----------
    pool
        Rows with `id`, `prompt`, `answer`.
    teachers
        At least one.
    cache
        Keeps each margin under teacher key and example content: an interrupted run asks only what is missing.
    calibration
        What to subtract from a teacher's margins: `pool`, their mean over the pool; `content-free`, the margin
        on an empty example; `none`, nothing.
    quorum
        Votes that one system needs. An example that reaches it for neither gets system 0 and is left out of
        both sets.

    Returns
    -------
    datasets.Dataset
        The pool's columns, `margin_NAME` per teacher, `votes` (list of 1 | 2), `system` (1 | 2 | 0), `agreement`
        (share of votes for the more frequent system).

    Raises
    ------
    InputError
        No teacher, duplicate ids, or a teacher that answers NaN.
    """
    if not teachers:
        raise InputError("voting.teachers: the list is empty; name at least one")
    if len(set(pool["id"])) != len(pool):
        raise InputError("pool: example ids repeat; give every example its own id")
    examples = list(pool)
    columns: dict[str, list] = {}
    votes = []
    for teacher in teachers:
        margins = np.asarray(_cached_margins(teacher, examples, cache, batch_size))
        if not np.isfinite(margins).all():
            raise InputError(f"teacher {teacher.name!r}: a margin is NaN or infinite; check its model's dtype")
        offset = {
            "pool": lambda teacher, margins: margins.mean(),
            "content-free": lambda teacher, margins: _cached_margins(teacher, [CONTENT_FREE], cache, 1)[0],
            "none": lambda teacher, margins: 0.0,
        }[calibration](teacher, margins)
        columns[f"margin_{teacher.name}"] = (margins - offset).tolist()
        votes.append(np.where(margins - offset > 0, 2, 1))
    table = np.stack(votes, axis=1)
    twos = (table == 2).sum(1)
    ones = table.shape[1] - twos
    columns["votes"] = table.tolist()
    columns["system"] = np.select([ones >= quorum, twos >= quorum], [1, 2], 0).tolist()
    columns["agreement"] = (np.maximum(ones, twos) / table.shape[1]).tolist()
    return datasets.Dataset.from_list(
        [example | {key: values[i] for key, values in columns.items()} for i, example in enumerate(examples)]
    )


def _cached_margins(teacher: Teacher, examples: Sequence[dict], cache: diskcache.Cache, batch_size: int) -> list[float]:
    keys = [f"{teacher.key}-{fingerprint([e['prompt'], e['answer']])}" for e in examples]
    missing = [i for i, key in enumerate(keys) if key not in cache]
    # By length, so that a batch is padded little.
    missing.sort(key=lambda i: len(examples[i]["prompt"]))
    batches = [missing[i : i + batch_size] for i in range(0, len(missing), batch_size)]
    for batch in tqdm(batches, desc=f"teacher {teacher.name}", leave=False, disable=not batches):
        for i, margin in zip(batch, teacher.margins([examples[i] for i in batch]), strict=True):
            cache[keys[i]] = margin
    return [cache[key] for key in keys]


@torch.inference_mode()
def _label_margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], labels: tuple[str, str]
) -> list[float]:
    """log p(second label) - log p(first label) after each prompt, summed over a label's tokens."""
    ids = [tokenizer(label, add_special_tokens=False).input_ids for label in labels]
    tokenizer.padding_side = "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    if all(len(tokens) == 1 for tokens in ids):
        logits = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        return (logits[:, ids[1][0]] - logits[:, ids[0][0]]).tolist()
    totals = []
    for tokens in ids:
        label = torch.tensor(tokens, device=model.device).expand(len(prompts), -1)
        logits = model(
            input_ids=torch.cat([batch["input_ids"], label], 1),
            attention_mask=torch.cat([batch["attention_mask"], torch.ones_like(label)], 1),
            use_cache=False,
            logits_to_keep=len(tokens) + 1,
        ).logits[:, :-1]
        totals.append(logits.float().log_softmax(-1).gather(2, label.unsqueeze(2)).sum((1, 2)))
    return (totals[1] - totals[0]).tolist()
