"""Log-likelihoods of a local teacher's two labels, in batches.

`transformers` reads label logits too (`pipeline("decision")`), one prompt a pass and one token a label; here prompts
are batched and a label may have several tokens. A test holds the two equal.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
