"""Forward passes that read a prefix shared by several sequences once.

The completions of one prompt share it, and all prompts share the system prompt. A bundle lays such sequences out in
one row, prefix first, and lets each attend to the prefix and itself only: the same hidden states from a half or a
third of the tokens, without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Attention compares all tokens of a bundle: past this length that costs more than sharing saves.
LONGEST = 512


@dataclass(frozen=True)
class Bundle:
    """Sequences laid out as one row: `prefix` tokens that all share, then what is each one's own.

    Attributes
    ----------
    rows
        Which sequences these are.
    prefix
        Number of shared tokens.
    """

    rows: tuple[int, ...]
    prefix: int


def bundled(sequences: Sequence[Sequence[int]], longest: int = LONGEST) -> list[Bundle]:
    """Bundles that cover `sequences`, each at most `longest` tokens long unless it holds one sequence.

    Sequences are taken in the order of their tokens, so shared prefixes meet; one joins the bundle before it if
    that saves tokens: what it shares is read once less, what the others no longer share is read once each.
    """
    order = sorted(range(len(sequences)), key=lambda row: sequences[row])
    found: list[Bundle] = []
    length = 0
    for row in order:
        tokens = len(sequences[row])
        if found:
            last = found[-1]
            shared = min(last.prefix, _common(sequences[last.rows[0]], sequences[row]))
            split = (len(last.rows) - 1) * (last.prefix - shared)
            joined = length + split + tokens - shared
            if split < shared and joined <= longest:
                found[-1], length = Bundle((*last.rows, row), shared), joined
                continue
        found.append(Bundle((row,), tokens))
        length = tokens
    return found


def layout(
    bundle: Bundle, sequences: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict[int, torch.Tensor]]:
    """The row that a bundle becomes.

    Returns
    -------
    tokens, positions : LongTensor, shape (1, L)
    allowed : BoolTensor, shape (L, L)
        Whether the token of a row may attend to that of a column.
    places : dict of int to LongTensor
        For each sequence, where in the row its tokens stand.
    """
    tokens = list(sequences[bundle.rows[0]][: bundle.prefix])
    positions = list(range(bundle.prefix))
    owners = [-1] * bundle.prefix
    places = {}
    for row in bundle.rows:
        own = sequences[row][bundle.prefix :]
        places[row] = torch.tensor([*range(bundle.prefix), *range(len(tokens), len(tokens) + len(own))])
        tokens += own
        positions += range(bundle.prefix, bundle.prefix + len(own))
        owners += [row] * len(own)
    owner, order = torch.tensor(owners), torch.arange(len(tokens))
    mine = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
    allowed = mine & (order[None, :] <= order[:, None])
    return torch.tensor([tokens]), torch.tensor([positions]), allowed, places


def hidden_before(
    backbone: torch.nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor, scored: torch.Tensor, **options
) -> torch.Tensor:
    """Hidden states that predict the scored tokens.

    Parameters
    ----------
    backbone
        A decoder that takes a 4-dimensional additive mask (transformers' `sdpa` or `eager` attention).
    input_ids, attention_mask : shape (B, T)
        Sequences padded on either side.
    scored : BoolTensor, shape (B, T - 1)
        Which of tokens 1 … T - 1 are predicted; never a sequence's first.

    Returns
    -------
    Tensor, shape (scored tokens, hidden size)
        In row-major order of `scored`.
    """
    device = input_ids.device
    kept = attention_mask.bool()
    index = kept.cumsum(1) - 1
    sequences = [ids[keep].tolist() for ids, keep in zip(input_ids, kept, strict=True)]
    found: dict[int, torch.Tensor] = {}
    for bundle in bundled(sequences):
        tokens, positions, allowed, places = layout(bundle, sequences)
        mask = None  # a longer sequence stands alone, and is read as the model itself reads it, windows and all
        if tokens.shape[1] <= LONGEST:
            lowest = torch.finfo(backbone.dtype).min
            mask = (
                torch.zeros(allowed.shape, dtype=backbone.dtype).masked_fill_(~allowed, lowest)[None, None].to(device)
            )
        states = backbone(
            input_ids=tokens.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            use_cache=False,
            **options,
        ).last_hidden_state[0]
        for row in bundle.rows:
            found[row] = states[places[row].to(device)[index[row, 1:][scored[row]] - 1]]
    return torch.cat([found[row] for row in range(len(sequences))])


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences share from their start."""
    count = 0
    for a, b in zip(first, second, strict=False):
        if a != b:
            break
        count += 1
    return count
