"""Which LoRA elements each stage trains (paper, section 3.3): the theta rule, the regions, the control.

Per system, elements are taken by falling importance until their sum reaches theta of the total; the element that
crosses is taken. Equal scores are taken in model order, and theta = 1 takes every element. No vector is sorted: the
cut is found by adding up scores in bins of their leading bits, and only the bin it falls into is put in order.

Deviation: more than two systems are possible (the paper's future work); with two, everything is as in the paper.
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
CHUNK = 1 << 20  # elements at a time, so that counting needs next to no memory


@dataclass(frozen=True, eq=False)
class Partition:
    """A selected set for each system over the elements of all LoRA matrices, and the elements each stage trains.

    All are flat BoolTensors over the elements in the order of `shapes`; `selected[0]` and `active[0]` belong to
    System 1 and stage 1.
    """

    shapes: Shapes
    selected: tuple[torch.Tensor, ...]
    active: tuple[torch.Tensor, ...]
    parameters: dict

    def stage_mask(self, stage: int) -> dict[str, torch.Tensor]:
        """Parameter name -> BoolTensor of its shape, True = trained in `stage` (1 = SFT, 2 = GRPO, …)."""
        if stage not in range(1, len(self.active) + 1):
            raise InputError(f"stage = {stage!r}: must lie in 1..{len(self.active)}")
        return _split(self.active[stage - 1], self.shapes)

    def regions(self) -> dict[str, torch.Tensor]:
        """Region name -> flat BoolTensor, disjoint and complete.

        `system1_only`, `system2_only`, …, `shared` (selected by more than one system), `inactive` (by none).
        """
        times = self._times()
        regions = {f"system{k}_only": its & (times == 1) for k, its in enumerate(self.selected, start=1)}
        return regions | {"shared": times > 1, "inactive": times == 0}

    @property
    def jaccard(self) -> float:
        """Elements that every system selects over elements that any selects."""
        times = self._times()
        return int((times == len(self.selected)).sum()) / int((times > 0).sum())

    @property
    def active_share(self) -> dict[str, float]:
        """Share of all elements that stage 1, stage 2, … or any of them trains."""
        total = self.active[0].numel()
        shares = {f"stage{k}": int(its.sum()) / total for k, its in enumerate(self.active, start=1)}
        return shares | {"either": int(functools.reduce(torch.logical_or, self.active).sum()) / total}

    def _times(self) -> torch.Tensor:
        times = torch.zeros(self.selected[0].shape, dtype=torch.uint8)
        for its in self.selected:
            times += its
        return times

    def summary(self) -> pd.DataFrame:
        """One row a matrix: layer, module, matrix (A or B), elements, and the share in each region and stage."""
        parts = self.regions() | {f"stage{k}": its for k, its in enumerate(self.active, start=1)}
        split = {key: _split(value, self.shapes) for key, value in parts.items()}
        rows = [
            {**_locate(name), "elements": int(np.prod(shape))}
            | {key: float(masks[name].float().mean()) for key, masks in split.items()}
            for name, shape in self.shapes.items()
        ]
        return pd.DataFrame(rows)

    def by_rank(self) -> pd.DataFrame:
        """One row a rank and matrix kind (A or B): the share in each region and stage, over all layers and modules."""
        parts = self.regions() | {f"stage{k}": its for k, its in enumerate(self.active, start=1)}
        rows = []
        for key, flat in parts.items():
            for name, mask in _split(flat, self.shapes).items():
                matrix = _locate(name)["matrix"]
                # A is rank x in, B is out x rank.
                shares = mask.float().mean(1 if matrix == "A" else 0)
                rows += [
                    {"matrix": matrix, "rank": rank, "part": key, "share": float(share)}
                    for rank, share in enumerate(shares)
                ]
        table = pd.DataFrame(rows).groupby(["matrix", "rank", "part"], sort=False)["share"].mean().unstack("part")
        return table[list(parts)].reset_index()

    def save(self, folder: str | Path) -> Path:
        """Write masks (eight to a byte) as safetensors and the rest as JSON; complete or not at all."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            inner = Path(scratch) / "partition"
            inner.mkdir()
            packed = {
                f"{field}{k}": torch.from_numpy(np.packbits(mask.numpy()))
                for field in ("selected", "active")
                for k, mask in enumerate(getattr(self, field), start=1)
            }
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
            selected, active = (
                tuple(
                    torch.from_numpy(np.unpackbits(packed[f"{field}{k}"].numpy(), count=total).view(bool))
                    for k in range(1, len(packed) // 2 + 1)
                )
                for field in ("selected", "active")
            )
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
    """The theta rule on each system's scores, then each stage's active set.

    Parameters
    ----------
    system1, system2, *more
        Scores >= 0 by parameter name, as `importance.score_importance` returns; same names and shapes.
    theta
        In (0, 1]: the share of total importance that a system's set must reach.
    alpha, beta
        In [0, 1]: the share of shared elements that stage 1 (by System 1 score) and stage 2 (by System 2
        score) train, rounded to the nearest element. Stages of further systems train all that they share.

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
    # One flat vector at a time: at 143 million elements every copy counts.
    selected = tuple(_select(_flatten(*system), theta) for system in named)
    parameters = {"theta": theta, "alpha": alpha, "beta": beta, "selection": "importance"}
    partition = Partition(shapes, selected, (), parameters)
    shared = partition._times() > 1
    active = tuple(
        its if share == 1.0 else (its & ~shared) | _top_shared(_flatten(*system), shared & its, share)
        for its, system, share in zip(selected, named, (alpha, beta, *(1.0 for _ in more)), strict=True)
    )
    return replace(partition, active=active)


def random_partition(like: Partition, seed: int) -> Partition:
    """The control: as many elements for each stage, selected set and overlap as `like`, drawn at random.

    One random permutation of the elements carries all of `like`'s masks along, so every count stays.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(like.selected[0].numel(), generator=generator)
    return Partition(
        shapes=like.shapes,
        selected=tuple(mask[order] for mask in like.selected),
        active=tuple(mask[order] for mask in like.active),
        parameters={**like.parameters, "selection": "random", "seed": seed},
    )


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
    """Shortest prefix by falling score whose sum reaches theta of the total, crossing element included."""
    if theta == 1.0:
        return torch.ones_like(scores, dtype=torch.bool)
    bins = _bins(scores, by_count=False)
    return _prefix(scores, bins, theta * float(bins.sum()), by_count=False)


def _top_shared(scores: torch.Tensor, shared: torch.Tensor, share: float) -> torch.Tensor:
    """The `share` of shared elements with the highest scores, rounded to the nearest element."""
    positions = shared.nonzero().squeeze(1)
    count = round(share * positions.numel())
    chosen = torch.zeros_like(shared)
    if count:
        its = scores[positions]
        chosen[positions[_prefix(its, _bins(its, by_count=True), count, by_count=True)]] = True
    return chosen


def _bins(scores: torch.Tensor, *, by_count: bool) -> torch.Tensor:
    """Sum (or count) of the scores >= 0 with each value of their leading 16 bits, highest scores first, in double.

    As integers, the bits of non-negative floats are in the order of the floats.
    """
    totals = torch.zeros(1 << 15, dtype=torch.float64)
    for chunk in scores.split(CHUNK):
        weights = None if by_count else chunk.double()
        totals += torch.bincount(chunk.view(torch.int32) >> 16, weights=weights, minlength=1 << 15)
    return totals.flip(0)


def _prefix(scores: torch.Tensor, bins: torch.Tensor, goal: float, *, by_count: bool) -> torch.Tensor:
    """The shortest prefix by falling score, ties in order, whose sum (or count) reaches `goal`."""
    reached = bins.cumsum(0)
    last = min(int((reached < goal).sum()), int(bins.nonzero().max()))
    above = float(reached[last - 1]) if last else 0.0
    lead = (1 << 15) - 1 - last
    # The bin that the cut falls into, put in order.
    low, high = (torch.tensor(edge << 16, dtype=torch.int32).view(torch.float32) for edge in (lead, lead + 1))
    inside = ((scores >= low) & (scores < high)).nonzero().squeeze(1)
    order = inside[torch.argsort(scores[inside], descending=True, stable=True)]
    steps = torch.ones(order.numel(), dtype=torch.float64) if by_count else scores[order].double()
    count = int((above + steps.cumsum(0) < goal).sum()) + 1
    chosen = scores >= high
    chosen[order[:count]] = True
    return chosen


def _split(flat: torch.Tensor, shapes: Shapes) -> dict[str, torch.Tensor]:
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
