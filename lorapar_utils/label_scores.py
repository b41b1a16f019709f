"""Log-likelihoods of a local teacher's two labels, in batches.

`transformers` reads label logits too (`pipeline("decision")`), one prompt a pass and one token a label; here prompts
are batched, what they share is read once, and a label may have several tokens. A test holds the two equal.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils.bundles import hidden_before


@torch.inference_mode()
def label_margins(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    labels: tuple[str, str],
) -> list[float]:
    """log p(second label) - log p(first label) as the reply to each question, summed over a label's tokens.

    A question becomes one user turn; a model without a chat template reads it as plain text.
    """
    if tokenizer.chat_template:
        prompts = [
            tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
            for q in questions
        ]
    else:
        prompts = [f"{q}\nReply: " for q in questions]
    asked = tokenizer(prompts, add_special_tokens=False).input_ids
    replies = [tokenizer(label, add_special_tokens=False).input_ids for label in labels]
    rows = [prompt + reply for reply in replies for prompt in asked]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    scored = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (reply, prompt) in enumerate((reply, prompt) for reply in replies for prompt in asked):
        scored[row, len(prompt) - 1 : len(prompt) - 1 + len(reply)] = True
    ids, mask, scored = (part.to(model.device) for part in (ids, mask, scored))
    # Both labels of a question share it, and the questions of a teacher share its persona: bundles read that once.
    hidden = hidden_before(model.base_model, ids, mask, scored)
    log_probs = model.get_output_embeddings()(hidden).float().log_softmax(-1)
    each = log_probs.gather(1, ids[:, 1:][scored].unsqueeze(1)).squeeze(1)
    totals = torch.zeros(len(rows), device=model.device).index_add(0, scored.nonzero()[:, 0], each)
    return (totals[len(asked) :] - totals[: len(asked)]).tolist()
