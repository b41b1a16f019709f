"""Forward passes that read a shared prefix once.

Completions of one prompt share this prompt, and all prompts share the system prompt. A bundle puts such sequences into
one row, prefix first. Each sequence attends only to the prefix and to itself. The hidden states stay the same, from a
half or a third of the tokens and without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Attention compares all tokens of a bundle. In a longer bundle this costs more than sharing saves.
LONGEST = 512


@dataclass(frozen=True)
class Bundle:
    """Sequences in one row: the shared prefix, then the rest of each sequence.

    Attributes
    ----------
    rows
        Indices of the sequences.
    prefix
        Number of shared tokens.
    """

    rows: tuple[int, ...]
    prefix: int


def bundled(sequences: Sequence[Sequence[int]], longest: int = LONGEST) -> list[Bundle]:
    """Bundles that cover `sequences`. A bundle of several sequences has at most `longest` tokens.

    Sequences are sorted, so neighbours share the longest prefixes. We add the next sequence to the current bundle when
    the tokens it saves (the prefix it shares) exceed the tokens it costs (the part of the old prefix that the others
    must now read themselves).

    >>> bundled([[1, 2, 3, 4], [1, 2, 3, 5, 6], [7, 8]])
    [Bundle(rows=(0, 1), prefix=3), Bundle(rows=(2,), prefix=2)]
    """
    bundles: list[Bundle] = []
    length = 0
    for row in sorted(range(len(sequences)), key=lambda row: sequences[row]):
        tokens = len(sequences[row])
        if bundles:
            last = bundles[-1]
            saved = min(last.prefix, _common(sequences[last.rows[0]], sequences[row]))
            cost = (len(last.rows) - 1) * (last.prefix - saved)
            new_length = length + cost + tokens - saved
            if cost < saved and new_length <= longest:
                bundles[-1], length = Bundle((*last.rows, row), saved), new_length
                continue
        bundles.append(Bundle((row,), tokens))
        length = tokens
    return bundles


def layout(
    bundle: Bundle, sequences: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """Tokens, positions and attention mask of a bundle.

    Returns
    -------
    tokens, positions : LongTensor, shape (1, L)
    allowed : BoolTensor, shape (L, L)
        `allowed[i, j]`: token i may attend to token j.
    places : dict of int to LongTensor
        Index of a sequence -> indices of the sequence's tokens, prefix included, in the row.
    """
    tokens = list(sequences[bundle.rows[0]][: bundle.prefix])
    positions = list(range(bundle.prefix))
    owners = [-1] * bundle.prefix
    places = {}
    for row in bundle.rows:
        rest = sequences[row][bundle.prefix :]
        places[row] = torch.tensor([*range(bundle.prefix), *range(len(tokens), len(tokens) + len(rest))])
        tokens += rest
        positions += range(bundle.prefix, bundle.prefix + len(rest))
        owners += [row] * len(rest)
    owner, order = torch.tensor(owners), torch.arange(len(tokens))
    same_sequence = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    allowed = same_sequence & (order[None, :] <= order[:, None])
    return torch.tensor([tokens]), torch.tensor([positions]), allowed, places


def hidden_before(
    backbone: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, scored: torch.Tensor, **options
) -> torch.Tensor:
    """Hidden states that predict the scored tokens.

    Parameters
    ----------
    backbone
        A decoder that takes a 4-dimensional additive mask (transformers' `sdpa` or `eager` attention).
    input_ids, attention_mask : LongTensor, shape (B, T)
        Sequences, padded on either side.
    scored : BoolTensor, shape (B, T - 1)
        Marks the scored tokens among tokens 1 … T - 1. The first token of a sequence cannot be scored.

    Returns
    -------
    Tensor, shape (scored tokens, hidden size), dtype of the backbone
        In row-major order of `scored`.
    """
    device = input_ids.device
    is_token = attention_mask.bool()
    index = is_token.cumsum(1) - 1
    sequences = [ids[row_mask].tolist() for ids, row_mask in zip(input_ids, is_token, strict=True)]
    hidden: dict[int, torch.Tensor] = {}
    for bundle in bundled(sequences):
        tokens, positions, allowed, places = layout(bundle, sequences)
        mask = None  # a longer sequence is alone in its bundle; the model makes the mask, with its window if any
        if tokens.shape[1] <= LONGEST:
            lowest = torch.finfo(backbone.dtype).min
            bias = torch.zeros(allowed.shape, dtype=backbone.dtype).masked_fill_(~allowed, lowest)
            mask = bias[None, None].to(device)
        states = backbone(
            input_ids=tokens.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            use_cache=False,
            **options,
        ).last_hidden_state[0]
        for row in bundle.rows:
            hidden[row] = states[places[row].to(device)[index[row, 1:][scored[row]] - 1]]
    return torch.cat([hidden[row] for row in range(len(sequences))])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the common prefix of two sequences."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
