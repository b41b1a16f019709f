"""Log-likelihoods of given replies: a local teacher's two labels, and the reference solutions (held-out loss).

`transformers` also scores labels (`pipeline("decision")`), with one prompt per pass and one token per label. Here
prompts are batched, a shared prefix is read once, and a label may have several tokens. A test checks that both agree.
"""

import copy
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.data.encoding import PLAIN_TEMPLATE, question_ids
from lorapar_utils.fast.architecture import rotation_limit
from lorapar_utils.fast.checks import answer_logits, shortcuts_of
from lorapar_utils.fast.decoding import answering, has_virtual_tokens, read, read_prefix
from lorapar_utils.fast.shared_prefix import hidden_before

TOKENS = 1024  # scored at a time, to limit the memory for logits


def label_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    labels: tuple[str, str],
    plain_template: str = PLAIN_TEMPLATE,
) -> list[float]:
    """log p(second label) - log p(first label) as the reply to each question, summed over a label's tokens.

    A question becomes one user turn, or fills `plain_template` if the model has no chat template.
    """
    margins: dict[int, float] = {}
    for rows, values in margins_in_batches(model, tokenizer, questions, labels, plain_template, len(questions)):
        margins |= zip(rows, values, strict=True)
    return [margins[i] for i in range(len(questions))]


@torch.inference_mode()
def margins_in_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    labels: tuple[str, str],
    plain_template: str,
    batch_size: int,
) -> Iterator[tuple[list[int], list[float]]]:
    """The margins of `label_margins`, batch by batch, each with the indices of its questions.

    What all questions begin with, such as a teacher's persona, is read once for all of them. Where each label is one
    token, a question is read once for both labels.
    """
    prompts = [question_ids(question, tokenizer, plain_template=plain_template) for question in questions]
    replies = [tokenizer(label, add_special_tokens=False).input_ids for label in labels]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    longest = max(map(len, prompts))
    single = all(len(reply) == 1 for reply in replies) and not has_virtual_tokens(model)
    if single and shortcuts_of(model).completions and longest <= rotation_limit(model):
        with answering(model):
            prefix = read_prefix(model, prompts)
        for rows in batches:
            with answering(model):
                logits = read(model, [prompts[i] for i in rows], copy.deepcopy(prefix))[0].float()
            yield rows, (logits[:, replies[1][0]] - logits[:, replies[0][0]]).tolist()
        return
    for rows in batches:
        # In one call, so that a bundle reads a question once for both labels.
        totals = reply_log_probs(model, [(prompts[i], reply) for reply in replies for i in rows])
        yield rows, [b - a for a, b in zip(totals[: len(rows)], totals[len(rows) :], strict=True)]


@torch.inference_mode()
def reply_log_probs(model: PreTrainedModel, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    """log p(reply | prompt) for each (prompt, reply) pair of token ids, summed over the reply's tokens."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with answering(model):
        longest = max(len(prompt) + len(reply) for prompt, reply in pairs)
        if has_virtual_tokens(model) or not shortcuts_of(model).shared_prefix or longest > rotation_limit(model):
            return [_alone(model, prompt, reply) for prompt, reply in pairs]
        rows = [prompt + reply for prompt, reply in pairs]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        scored = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for row, (prompt, reply) in enumerate(pairs):
            scored[row, len(prompt) - 1 : len(prompt) - 1 + len(reply)] = True
        ids, mask, scored = (part.to(model.device) for part in (ids, mask, scored))
        hidden, targets = hidden_before(base.base_model, ids, mask, scored), ids[:, 1:][scored]
        # In parts, because fp32 logits of a whole batch of long replies would fill a GPU.
        log_probs = torch.cat(
            [
                answer_logits(base, states).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
                for states, tokens in zip(hidden.split(TOKENS), targets.split(TOKENS), strict=True)
            ]
        )
        return torch.zeros(len(rows), device=model.device).index_add(0, scored.nonzero()[:, 0], log_probs).tolist()


def _alone(model: PreTrainedModel, prompt: list[int], reply: list[int]) -> float:
    ids = torch.tensor([prompt + reply], device=model.device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
    log_probs = logits[-len(reply) - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(1, ids[0, -len(reply) :, None]).sum().item()
