"""Which LoRA elements each stage trains (paper, section 3.3): the theta rule, the regions, the control.

Deviation: none. Per system, elements are taken by falling importance until their sum reaches theta of the total;
the element that crosses is taken. Equal scores are taken in model order, and theta = 1 takes every element.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorapar_utils.errors import InputError

Shapes = dict[str, tuple[int, ...]]
REGIONS = ("system1_only", "system2_only", "shared", "inactive")


@dataclass(frozen=True, eq=False)
class Partition:
    """Two selected sets over the elements of all LoRA matrices, and the elements each stage trains.

    All four are flat BoolTensors over the elements in the order of `shapes`.
    """

    shapes: Shapes
    selected1: torch.Tensor
    selected2: torch.Tensor
    active1: torch.Tensor
    active2: torch.Tensor
    parameters: dict

    def stage_mask(self, stage: int) -> dict[str, torch.Tensor]:
        """Parameter name -> BoolTensor of its shape, True = trained in `stage` (1 or 2)."""
        if stage not in (1, 2):
            raise InputError(f"stage = {stage!r}: must be 1 (SFT) or 2 (GRPO)")
        return _split(self.active1 if stage == 1 else self.active2, self.shapes)

    def regions(self) -> dict[str, torch.Tensor]:
        """Region name -> flat BoolTensor; the four regions of `REGIONS` are disjoint and complete."""
        return {
            "system1_only": self.selected1 & ~self.selected2,
            "system2_only": self.selected2 & ~self.selected1,
            "shared": self.selected1 & self.selected2,
            "inactive": ~(self.selected1 | self.selected2),
        }

    @property
    def jaccard(self) -> float:
        """|S1 and S2| / |S1 or S2|."""
        return int((self.selected1 & self.selected2).sum()) / int((self.selected1 | self.selected2).sum())

    @property
    def active_share(self) -> dict[str, float]:
        """Share of all elements that stage 1, stage 2, or either of them trains."""
        total = self.active1.numel()
        return {
            "stage1": int(self.active1.sum()) / total,
            "stage2": int(self.active2.sum()) / total,
            "either": int((self.active1 | self.active2).sum()) / total,
        }

    def summary(self) -> pd.DataFrame:
        """One row a matrix: layer, module, matrix (A or B), elements, and the share in each region and stage."""
        parts = {**self.regions(), "stage1": self.active1, "stage2": self.active2}
        split = {key: _split(value, self.shapes) for key, value in parts.items()}
        rows = [
            {**_locate(name), "elements": int(np.prod(shape))}
            | {key: float(masks[name].float().mean()) for key, masks in split.items()}
            for name, shape in self.shapes.items()
        ]
        return pd.DataFrame(rows)

    def save(self, folder: str | Path) -> Path:
        """Write masks (eight to a byte) as safetensors and the rest as JSON; complete or not at all."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            inner = Path(scratch) / "partition"
            inner.mkdir()
            flat = {key: getattr(self, key) for key in ("selected1", "selected2", "active1", "active2")}
            packed = {key: torch.from_numpy(np.packbits(value.numpy())) for key, value in flat.items()}
            save_file(packed, inner / "masks.safetensors")
            content = {"shapes": {k: list(v) for k, v in self.shapes.items()}, "parameters": self.parameters}
            (inner / "partition.json").write_text(json.dumps(content, indent=1))
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
            content = json.loads((folder / "partition.json").read_text())
            packed = load_file(folder / "masks.safetensors")
            shapes = {name: tuple(shape) for name, shape in content["shapes"].items()}
            total = sum(int(np.prod(shape)) for shape in shapes.values())
            flat = {k: torch.from_numpy(np.unpackbits(v.numpy(), count=total).astype(bool)) for k, v in packed.items()}
            return cls(shapes=shapes, parameters=content["parameters"], **flat)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"partition {folder}: cannot be read ({error}); build it again") from None


def build_partition(
    system1: dict[str, torch.Tensor],
    system2: dict[str, torch.Tensor],
    *,
    theta: float,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> Partition:
    """The theta rule on each system's scores, then each stage's active set.

    Parameters
    ----------
    system1, system2
        Scores >= 0 by parameter name, as `importance.score_importance` returns; same names and shapes.
    theta
        In (0, 1]: the share of total importance that a system's set must reach.
    alpha, beta
        In [0, 1]: the share of shared elements that stage 1 (by System 1 score) and stage 2 (by System 2
        score) train, rounded to the nearest element.

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
    shapes = {name: tuple(scores.shape) for name, scores in system1.items()}
    if shapes != {name: tuple(scores.shape) for name, scores in system2.items()}:
        raise InputError("system1, system2: scores must cover the same matrices in the same order and shapes")
    scores1, scores2 = _flatten("system1", system1), _flatten("system2", system2)
    selected1, selected2 = _select(scores1, theta), _select(scores2, theta)
    shared = selected1 & selected2
    return Partition(
        shapes=shapes,
        selected1=selected1,
        selected2=selected2,
        active1=(selected1 & ~selected2) | _top_shared(scores1, shared, alpha),
        active2=(selected2 & ~selected1) | _top_shared(scores2, shared, beta),
        parameters={"theta": theta, "alpha": alpha, "beta": beta, "selection": "importance"},
    )


def random_partition(like: Partition, seed: int) -> Partition:
    """The control: as many elements for each stage, selected set and overlap as `like`, drawn at random.

    One random permutation of the elements carries all of `like`'s masks along, so every count stays.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(like.active1.numel(), generator=generator)
    return Partition(
        shapes=like.shapes,
        selected1=like.selected1[order],
        selected2=like.selected2[order],
        active1=like.active1[order],
        active2=like.active2[order],
        parameters={**like.parameters, "selection": "random", "seed": seed},
    )


def full_partition(shapes: Shapes) -> Partition:
    """Every element active in both stages: plain LoRA."""
    every = torch.ones(sum(int(np.prod(shape)) for shape in shapes.values()), dtype=torch.bool)
    return Partition(shapes, every, every.clone(), every.clone(), every.clone(), {"selection": "all"})


def _flatten(field: str, scores: dict[str, torch.Tensor]) -> torch.Tensor:
    if not scores:
        raise InputError(f"{field}: holds no scores")
    flat = torch.cat([values.flatten() for values in scores.values()])
    if not torch.isfinite(flat).all():
        raise InputError(f"{field}: holds NaN or infinity; score again in float32")
    if (flat < 0).any():
        raise InputError(f"{field}: holds negative scores; importance is an absolute value")
    if not flat.any():
        raise InputError(f"{field}: every score is 0; score with an adapter whose A and B are both non-zero")
    return flat


def _select(scores: torch.Tensor, theta: float) -> torch.Tensor:
    """Shortest prefix by falling score whose sum reaches theta of the total, crossing element included."""
    if theta == 1.0:
        return torch.ones_like(scores, dtype=torch.bool)
    order = torch.argsort(scores, descending=True, stable=True)
    reached = torch.cumsum(scores[order].double(), 0)
    count = int((reached < theta * reached[-1]).sum()) + 1
    selected = torch.zeros_like(scores, dtype=torch.bool)
    selected[order[:count]] = True
    return selected


def _top_shared(scores: torch.Tensor, shared: torch.Tensor, share: float) -> torch.Tensor:
    positions = shared.nonzero().squeeze(1)
    count = round(share * positions.numel())
    order = torch.argsort(scores[positions], descending=True, stable=True)
    chosen = torch.zeros_like(shared)
    chosen[positions[order[:count]]] = True
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
