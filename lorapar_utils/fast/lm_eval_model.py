"""`lm-eval`'s model class with our completions, and with each context read once for all choices."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm.auto import tqdm

from lorapar_utils.data.encoding import end_tokens
from lorapar_utils.fast.completions import complete, next_token_logits
from lorapar_utils.fast.decoding import has_virtual_tokens


class LeanLM(HFLM):
    """`lm-eval`'s model class with the same answers for less work.

    The shared prefix of a batch is read once, and a finished sequence leaves the batch. `HFLM` handles all other
    requests (sampled completions, choices of several tokens, virtual tokens).
    """

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        options = [normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks) for request in requests]
        if has_virtual_tokens(self.model) or any(kwargs.get("do_sample") for kwargs in options):
            return super().generate_until(requests, disable_tqdm)
        results = [""] * len(requests)
        ends = end_tokens(self.model, self.tokenizer)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        for batch in tqdm(self._batches(requests), desc="generating", leave=False, disable=disable_tqdm):
            first = options[batch[0]]
            room, stop = first["max_gen_toks"], handle_stop_sequences(list(first["until"]), eos=end)
            prompts = [self.tok_encode(requests[i].args[0])[room - self.max_length :] for i in batch]
            ended = _EndsWith(stop, self.tokenizer)
            completions = complete(self.model, prompts, ends=ends, max_new_tokens=room, stopped=ended)
            for i, tokens in zip(batch, completions, strict=True):
                text = self.tok_decode(tokens)
                results[i] = postprocess_generated_text(text, stop, None)
                requests[i].truncated = tokens[-1] not in ends and not ended(tokens)
        return results

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._encode_pair(*request.args) if request.args[0] else ([], []) for request in requests]
        if has_virtual_tokens(self.model) or any(len(continuation) != 1 for _, continuation in pairs):
            return super().loglikelihood(requests, disable_tqdm)
        results = [(0.0, False)] * len(requests)
        # The choices of a question have the same context, which is read once.
        by_context = defaultdict(list)
        for i, (context, _) in enumerate(pairs):
            by_context[tuple(context[-self.max_length :])].append(i)
        first = {indices[0]: context for context, indices in by_context.items()}
        batches = self._batches([requests[i] for i in first], list(first))
        for batch in tqdm(batches, desc="log-likelihoods", leave=False, disable=disable_tqdm):
            contexts = [first[i] for i in batch]
            for context, logits in zip(contexts, next_token_logits(self.model, contexts), strict=True):
                logprobs = torch.log_softmax(logits, -1, dtype=self.softmax_dtype)
                likeliest = logits.argmax().item()
                for i in by_context[context]:
                    [token] = pairs[i][1]
                    results[i] = (logprobs[token].item(), token == likeliest)
        return results

    def _batches(self, requests: Sequence[Instance], indices: Iterable[int] | None = None) -> list[list[int]]:
        """Batches of indices. A batch has requests of one task, whose prompts share a prefix, of similar length."""
        by_task = defaultdict(list)
        for i, request in zip(indices or range(len(requests)), requests, strict=True):
            by_task[request.task_name].append((len(request.args[0]), i))
        batches = []
        for lengths in by_task.values():
            order = [i for _, i in sorted(lengths)]
            batches += [order[k : k + self.batch_size] for k in range(0, len(order), self.batch_size)]
        return batches


class _EndsWith:
    """Whether the last tokens of a completion contain one of the strings."""

    def __init__(self, strings: Sequence[str], tokenizer):
        self.strings = strings
        self.tokenizer = tokenizer
        # A model may spell a string with more tokens than the tokenizer. `MultiTokenEOSCriteria` of lm-eval adds 2 too.
        self.longest = 2 + max(len(tokenizer.encode(s, add_special_tokens=False)) for s in strings)

    def __call__(self, tokens: list[int]) -> bool:
        tail = self.tokenizer.decode(tokens[-self.longest :])
        return any(string in tail for string in self.strings)
