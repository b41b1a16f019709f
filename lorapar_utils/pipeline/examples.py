"""The rows that a phase reads: D1 and D2 to train on, validation and test. Each is made once, at first use."""

import functools
import itertools

import datasets

from lorapar_utils import data
from lorapar_utils.settings import ExperimentSection, Settings
from lorapar_utils.voting import split


class Examples:
    """The pool of a profile and its division into the two systems; handed on from phase to phase.

    Parameters
    ----------
    settings
        For an experiment, those of `Settings.for_experiment`: an experiment may have a split of its own.
    pool
        Every row, of all splits; None loads it.
    """

    def __init__(self, settings: Settings, pool: datasets.Dataset | None = None):
        self._settings, self._pool = settings, pool

    @functools.cached_property
    def pool(self) -> datasets.Dataset:
        """Every row, of all splits."""
        return data.load_pool(self._settings) if self._pool is None else self._pool

    @functools.cached_property
    def systems(self) -> dict[int, list[dict]]:
        """D1 and D2 by system, from the training split. An InputError if one of them is empty."""
        return split.systems(self._settings, self.pool)

    @functools.cached_property
    def validation(self) -> dict[int, list[dict]]:
        """Validation rows by the system that they were constructed for, 0 if unknown; of systems that have any."""
        by_system: dict[int, list[dict]] = {}
        for row in self._of("validation"):
            by_system.setdefault(row["construction"], []).append(row)
        return dict(sorted(by_system.items()))

    @functools.cached_property
    def test(self) -> list[dict]:
        return self._of("test")

    @functools.cached_property
    def held_out(self) -> list[dict]:
        """The rows that nothing is trained on, in the pool's order."""
        return [row for row in self.pool if row["split"] != "train"]

    def measured(self, spec: ExperimentSection) -> list[dict]:
        """The rows that an experiment is measured on: the test split's, or, to choose settings, validation's."""
        return self.test if spec.measured_on == "test" else [row for rows in self.validation.values() for row in rows]

    def chains(self, spec: ExperimentSection) -> list[dict]:
        """System 2's validation rows that are sampled for pass@k, some of each task; none without a use."""
        sampled = "grpo" in spec.stages or spec.measured_on == "validation"
        if not sampled or self._settings.has_free_text:
            return []
        by_task: dict[str, list[dict]] = {}
        for row in self.validation.get(2, []):
            by_task.setdefault(row["task"], []).append(row)
        turns = itertools.zip_longest(*by_task.values())
        rows = [row for turn in turns for row in turn if row is not None]
        return rows[: self._settings.evaluation.pass_k_prompts]

    @property
    def watched(self) -> list[dict]:
        """The validation rows that are answered now and then while a stage trains."""
        count = self._settings.evaluation.watch_prompts
        return [row for rows in self.validation.values() for row in rows[:count]]

    def _of(self, name: str) -> list[dict]:
        return [row for row in self.held_out if row["split"] == name]
