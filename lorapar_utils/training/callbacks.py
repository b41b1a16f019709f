"""What TRL's trainers do beside training: show progress, answer validation prompts, stop when training diverges."""

import math
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from IPython import get_ipython
from IPython.display import HTML, display
from pandas.io.formats.style import Styler
from tqdm.auto import tqdm
from transformers import TrainerCallback

from lorapar_utils.errors import InputError
from lorapar_utils.training.checkpoints import finished_checkpoints


class Diverged(TrainerCallback):
    """Ends a stage when the loss or gradient is NaN or infinite, before the checkpoint of this step is written."""

    def __init__(self, checkpoints: str):
        self.checkpoints = Path(checkpoints)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {key: float(logs[key]) for key in ("loss", "grad_norm") if key in (logs or {})}
        broken = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
        if broken:
            finished = finished_checkpoints(self.checkpoints)
            last = f"the last good checkpoint is {finished[-1]}" if finished else "no checkpoint had been written"
            raise InputError(
                f"training diverged at step {state.global_step} of {state.max_steps}: {', '.join(broken)}; {last}. "
                "Lower the stage's learning_rate (sft or grpo), or train in float32 (model.dtype)"
            )


class Watch(TrainerCallback):
    """Calls `watch` during training and adds the result to the log, which checkpoints include."""

    def __init__(self, watch: Callable[[], dict] | None, every: int):
        self.watch, self.every = watch, every

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.watch is not None and state.global_step % self.every == 0:
            state.log_history.append({"step": state.global_step, **self.watch()})
            model.train()


class Progress(TrainerCallback):
    """A `tqdm.auto` progress bar that shows one figure of the log."""

    def __init__(self, title: str, figure: str):
        self.title, self.figure = title, figure

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.figure in (logs or {}):
            self.bar.set_postfix({self.figure: f"{float(logs[self.figure]):.3f}"})

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(1)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class Curve(TrainerCallback):
    """Draws one figure of the log into the notebook while a stage trains; it goes when the stage ends.

    Validation accuracy stands beside it once it is known. There is at most one drawing every `SECONDS`.
    """

    SECONDS = 3

    def __init__(self, title: str, figure: str):
        self.title, self.figure = title, figure

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown, self.drawn_at = None, time.monotonic()
        if get_ipython():
            self.shown = display(HTML(""), display_id=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.shown is not None and time.monotonic() - self.drawn_at >= self.SECONDS:
            self.shown.update(self.drawing(state))
            self.drawn_at = time.monotonic()

    def drawing(self, state):
        """The log so far as a matplotlib figure: by step the one, and shares of right validation answers, if any."""
        from matplotlib.figure import Figure  # here, because processes without a notebook do without

        panels = {self.figure: (self.figure,), "right validation answers": ("validation/system1", "validation/system2")}
        figure = Figure(figsize=(9, 2.6), layout="constrained")
        for axes, (title, keys) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for key in keys:
                points = [(row["step"], float(row[key])) for row in state.log_history if key in row]
                if points:
                    axes.plot(*zip(*points, strict=True), marker=".", label=key.removeprefix("validation/"))
            axes.set(title=f"{self.title}: {title}", xlabel="step", xlim=(0, state.max_steps))
        if axes.lines:
            axes.legend()
        return figure

    def on_train_end(self, args, state, control, **kwargs):
        if self.shown is not None:
            self.shown.update(HTML(""))


class Completions(TrainerCallback):
    """Shows completions of the last step of GRPO with their rewards, which TRL writes to a file after it has logged.

    A notebook has them in one table, which changes from step to step; elsewhere, and by several processes, they are
    printed.
    """

    def __init__(self, count: int):
        self.count = count

    def on_train_begin(self, args, state, control, **kwargs):
        self.shown = display(HTML(""), display_id=True) if get_ipython() else None

    def on_step_begin(self, args, state, control, **kwargs):
        file = Path(args.output_dir) / "completions" / f"completions_{state.global_step:05d}.parquet"
        if not (state.is_world_process_zero and file.is_file()):
            return
        rows = pd.read_parquet(file).head(self.count)
        if self.shown is None:
            with pd.option_context("display.max_colwidth", 60):
                print(rows.round(2).to_string(index=False))
            return
        self.shown.update(self._table(rows))

    on_train_end = on_step_begin

    @staticmethod
    def _table(rows: pd.DataFrame) -> Styler:
        table = rows.style.hide(axis="index").format(precision=2, escape="html")
        return table.set_properties(**{"white-space": "pre-line", "text-align": "left"})
