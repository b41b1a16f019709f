"""Which LoRA elements each stage trains (paper, section 3.3): the theta rule, the regions, the control.

For each system, elements are taken by falling importance until the sum reaches theta of the total. The element that
crosses this threshold is taken too. Equal scores are taken in model order, and theta = 1 takes every element.

Deviation: more than two systems are possible (the paper's future work). With two, everything is as in the paper.
"""

import functools
import json
import math
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorapar_utils.errors import InputError

Shapes = dict[str, tuple[int, ...]]
CHUNK = 1 << 20  # elements summed at a time, to save memory
TOP_BITS = 16  # leading bits of a float32 that make a bin; non-negative floats sort as their bits do as integers
LOW_BITS, N_BINS = 32 - TOP_BITS, 1 << (TOP_BITS - 1)  # the sign bit is always 0


@dataclass(frozen=True, eq=False)
class Partition:
    """The LoRA elements that each system selects (`selected`) and that each stage trains (`active`).

    Each mask is a flat BoolTensor, shape (elements,), over all matrices in the order of `shapes`. `selected[0]` belongs
    to System 1, `active[0]` to stage 1.
    """

    shapes: Shapes
    selected: tuple[torch.Tensor, ...]
    active: tuple[torch.Tensor, ...]
    parameters: dict

    def stage_mask(self, stage: int) -> dict[str, torch.Tensor]:
        """Parameter name -> BoolTensor of the parameter's shape, True = trained in `stage` (1 = SFT, 2 = GRPO, …)."""
        if stage not in range(1, len(self.active) + 1):
            raise InputError(f"stage = {stage!r}: must lie in 1..{len(self.active)}")
        return _as_matrices(self.active[stage - 1], self.shapes)

    def regions(self) -> dict[str, torch.Tensor]:
        """Region name -> flat BoolTensor, shape (elements,). Every element is in exactly one region.

        `system1_only`, `system2_only`, …, `shared` (selected by more than one system), `inactive` (by none).
        """
        counts = self._counts()
        regions = {f"system{k}_only": mask & (counts == 1) for k, mask in enumerate(self.selected, start=1)}
        return regions | {"shared": counts > 1, "inactive": counts == 0}

    @property
    def jaccard(self) -> float:
        """Number of elements that every system selects, divided by the number that any system selects."""
        counts = self._counts()
        return int((counts == len(self.selected)).sum()) / int((counts > 0).sum())

    @property
    def active_share(self) -> dict[str, float]:
        """Share of all elements that a stage trains (`stage1`, `stage2`, …), or that any stage trains (`either`)."""
        total = self.active[0].numel()
        shares = {f"stage{k}": int(mask.sum()) / total for k, mask in enumerate(self.active, start=1)}
        return shares | {"either": int(functools.reduce(torch.logical_or, self.active).sum()) / total}

    def _counts(self) -> torch.Tensor:
        """How many systems select each element."""
        counts = torch.zeros(self.selected[0].shape, dtype=torch.uint8)
        for mask in self.selected:
            counts += mask
        return counts

    def summary(self) -> pd.DataFrame:
        """One row per matrix: layer, module, matrix (A or B), elements, and the share in each region and stage."""
        parts = self.regions() | {f"stage{k}": mask for k, mask in enumerate(self.active, start=1)}
        sizes = np.array([math.prod(shape) for shape in self.shapes.values()])
        starts = np.cumsum(sizes) - sizes
        table = pd.DataFrame([_locate(name) for name in self.shapes]).assign(elements=sizes)
        shares = {key: np.add.reduceat(mask.numpy(), starts, dtype=np.int64) / sizes for key, mask in parts.items()}
        return table.assign(**shares)

    def save(self, folder: str | Path) -> Path:
        """Write masks (eight to a byte) as safetensors and the rest as JSON. The folder appears only when complete.

        A stage that trains all that its system selects has no mask of its own.
        """
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            inner = Path(scratch) / "partition"
            inner.mkdir()
            masks = {f"selected{k}": mask for k, mask in enumerate(self.selected, start=1)}
            for k, mask in enumerate(self.active, start=1):
                if not torch.equal(mask, masks[f"selected{k}"]):
                    masks[f"active{k}"] = mask
            packed = {name: torch.from_numpy(np.packbits(mask.numpy())) for name, mask in masks.items()}
            save_file(packed, inner / "masks.safetensors")
            content = {"shapes": {k: list(v) for k, v in self.shapes.items()}, "parameters": self.parameters}
            (inner / "partition.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            inner.rename(folder)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Partition":
        """Read what `save` wrote.

        Raises
        ------
        InputError
            A missing or damaged folder.
        """
        folder = Path(folder)
        try:
            content = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
            packed = load_file(folder / "masks.safetensors")
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            total = sum(int(np.prod(shape)) for shape in shapes.values())
            masks = {
                name: torch.from_numpy(np.unpackbits(bits.numpy(), count=total).view(bool))
                for name, bits in packed.items()
            }
            systems = range(1, sum(name.startswith("selected") for name in masks) + 1)
            selected = tuple(masks[f"selected{k}"] for k in systems)
            active = tuple(masks.get(f"active{k}", masks[f"selected{k}"]) for k in systems)
            return cls(shapes, selected, active, content["parameters"])
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"partition {folder}: cannot be read ({error}); build it again") from None


def build_partition(
    system1: dict[str, torch.Tensor],
    system2: dict[str, torch.Tensor],
    *more: dict[str, torch.Tensor],
    theta: float,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Partition:
    """Apply the theta rule to each system's scores, then build each stage's active set.

    >>> scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]])
    >>> build_partition({"A": scores}, {"A": scores.flip(1)}, theta=0.6).stage_mask(1)
    {'A': tensor([[ True,  True, False, False]])}

    Parameters
    ----------
    system1, system2, *more
        Parameter name -> scores >= 0, as `importance.score_importance` returns, with the same names and shapes.
    theta
        In (0, 1]: the share of total importance that a system's set must reach.
    alpha, beta
        In [0, 1]: the share of the shared elements that stage 1 (by System 1 score) and stage 2 (by System 2 score)
        train, rounded to the nearest element. Stages of further systems train all their shared elements.

    Raises
    ------
    InputError
        A value out of range, scores that differ in names or shapes, are negative, NaN, or all zero.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if not 0.0 <= value <= 1.0:
            raise InputError(f"{name} = {value}: must lie in [0, 1]")
    if not 0.0 < theta <= 1.0:
        raise InputError(f"theta = {theta}: must lie in (0, 1]")
    systems = (system1, system2, *more)
    shapes = {name: tuple(scores.shape) for name, scores in system1.items()}
    if any(shapes != {name: tuple(scores.shape) for name, scores in other.items()} for other in systems[1:]):
        raise InputError("system1, system2: scores must cover the same matrices in the same order and shapes")
    named = [(f"system{k}", scores) for k, scores in enumerate(systems, start=1)]
    # One flat vector at a time, because a vector may hold 143 million scores.
    selected = tuple(_select(_flatten(*system), theta) for system in named)
    parameters = {"theta": theta, "alpha": alpha, "beta": beta, "selection": "importance"}
    partition = Partition(shapes, selected, (), parameters)
    shared = partition._counts() > 1
    active = tuple(
        mask if share == 1.0 else (mask & ~shared) | _top_shared(_flatten(*system), shared & mask, share)
        for mask, system, share in zip(selected, named, (alpha, beta, *(1.0 for _ in more)), strict=True)
    )
    return replace(partition, active=active)


def random_partition(like: Partition, seed: int) -> Partition:
    """The control: random masks with the same number of elements in every selected set, overlap and stage as `like`.

    One random permutation is applied to all masks of `like`, so every count stays the same.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(like.selected[0].numel(), generator=generator)
    return _reordered(like, order, {"selection": "random", "seed": seed})


def random_in_matrix_partition(like: Partition, seed: int) -> Partition:
    """The control that keeps the allocation: random masks with as many elements in every matrix as `like`.

    Counts of every selected set, overlap and stage are those of `like`, matrix by matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    order, start = [], 0
    for shape in like.shapes.values():
        elements = math.prod(shape)
        order.append(start + torch.randperm(elements, generator=generator))
        start += elements
    return _reordered(like, torch.cat(order), {"selection": "random_in_matrix", "seed": seed})


def random_stage2_partition(like: Partition, seed: int) -> Partition:
    """The control of stage 2 alone: stage 1 trains what `like` does, later stages as many random elements."""
    drawn = random_partition(like, seed)
    return replace(
        like,
        selected=(like.selected[0], *drawn.selected[1:]),
        active=(like.active[0], *drawn.active[1:]),
        parameters={**drawn.parameters, "selection": "random_stage2"},
    )


def largest_partition(like: Partition, values: dict[str, torch.Tensor]) -> Partition:
    """The control by `values` >= 0, such as `|phi|`: each set takes its number of elements from the largest on.

    Both systems then select by one order, so the smaller set lies within the larger one.
    """
    flat = _flatten("values", values)

    def largest(mask: torch.Tensor) -> torch.Tensor:
        taken = torch.zeros_like(mask)
        if count := int(mask.sum()):
            taken |= _count_prefix(flat, count)
        return taken

    selected, active = (tuple(map(largest, masks)) for masks in (like.selected, like.active))
    return replace(like, selected=selected, active=active, parameters={**like.parameters, "selection": "magnitude"})


def swapped_partition(like: Partition) -> Partition:
    """The control of the paper's central claim: stage 1 trains System 2's elements, and stage 2 System 1's."""
    parameters = {**like.parameters, "selection": "swapped"}
    return replace(like, selected=like.selected[::-1], active=like.active[::-1], parameters=parameters)


def _reordered(like: Partition, order: torch.Tensor, parameters: dict) -> Partition:
    selected, active = (tuple(mask[order] for mask in masks) for masks in (like.selected, like.active))
    return replace(like, selected=selected, active=active, parameters={**like.parameters, **parameters})


def _flatten(field: str, scores: dict[str, torch.Tensor]) -> torch.Tensor:
    if not scores:
        raise InputError(f"{field}: holds no scores")
    flat = torch.cat([values.detach().flatten() for values in scores.values()]).float()
    low, high = map(float, torch.aminmax(flat))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise InputError(f"{field}: holds NaN or infinity; score again in float32")
    if low < 0:
        raise InputError(f"{field}: holds negative scores; importance is an absolute value")
    if high == 0:
        raise InputError(f"{field}: every score is 0; score with an adapter whose A and B are both non-zero")
    return flat


def _select(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """Mask of the elements that the theta rule selects."""
    return torch.ones_like(scores, dtype=torch.bool) if theta == 1.0 else _value_prefix(scores, theta)


def _top_shared(scores: torch.Tensor, shared: torch.Tensor, share: float) -> torch.Tensor:
    """Mask of the `share` of shared elements with the highest scores, rounded to the nearest element."""
    positions = shared.nonzero().squeeze(1)
    count = round(share * positions.numel())
    mask = torch.zeros_like(shared)
    if count:
        mask[positions[_count_prefix(scores[positions], count)]] = True
    return mask


def _value_prefix(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """Mask of the highest scores whose sum reaches `theta` of the total.

    The plain rule: `order = argsort(-s); n = searchsorted(cumsum(s[order]), theta * total) + 1`. Because sorting is
    slow, scores are first summed in bins of equal leading bits. Only the bin in which the sum crosses is sorted.
    """
    sums = torch.zeros(N_BINS, dtype=torch.float64)
    for chunk in scores.split(CHUNK):
        sums += torch.bincount(chunk.view(torch.int32) >> LOW_BITS, weights=chunk.double(), minlength=N_BINS)
    sums = sums.flip(0)  # highest scores first
    goal, cumulative = theta * float(sums.sum()), sums.cumsum(0)
    crossing = min(int((cumulative < goal).sum()), int(sums.nonzero().max()))
    sum_above = float(cumulative[crossing - 1]) if crossing else 0.0
    edges = torch.tensor([N_BINS - 1 - crossing, N_BINS - crossing], dtype=torch.int32) << LOW_BITS
    low, high = edges.view(torch.float32)
    in_bin = ((scores >= low) & (scores < high)).nonzero().squeeze(1)
    order = in_bin[torch.argsort(scores[in_bin], descending=True, stable=True)]
    count = int((sum_above + scores[order].double().cumsum(0) < goal).sum()) + 1
    mask = scores >= high
    mask[order[:count]] = True
    return mask


def _count_prefix(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the `count` highest scores. Of equal scores the first ones are taken."""
    threshold = float(np.partition(scores.numpy(), -count)[-count])
    mask = scores > threshold
    ties = (scores == threshold).nonzero().squeeze(1)
    mask[ties[: count - int(mask.sum())]] = True
    return mask


def _as_matrices(flat: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
    """Views of a vector as matrices, one after the other."""
    parts = flat.split([int(np.prod(shape)) for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _locate(name: str) -> dict:
    """Layer, module and matrix of a PEFT parameter such as `….layers.3.self_attn.q_proj.lora_A.default.weight`."""
    parts = name.split(".")
    matrix = next((i for i, part in enumerate(parts) if part.startswith("lora_")), len(parts) - 1)
    layers = [int(part) for part in parts[:matrix] if part.isdigit()]
    return {
        "layer": layers[0] if layers else -1,
        "module": parts[matrix - 1] if matrix else name,
        "matrix": parts[matrix].removeprefix("lora_"),
    }
