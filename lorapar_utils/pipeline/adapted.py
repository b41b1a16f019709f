"""The model of an experiment: loaded when something has to be trained or scored, then moved from stage to stage."""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorapar_utils import distributed, models
from lorapar_utils.settings import Settings


class AdaptedModel:
    """A base model with one adapter, which is set to its state after any stage.

    Parameters
    ----------
    settings
        Those of the experiment.
    has_stages
        False for the base model alone.
    """

    def __init__(self, settings: Settings, has_stages: bool):
        self._settings, self._has_stages = settings, has_stages
        self._loaded: tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase] | None = None
        self._after: Path | None = None
        # PiSSA and OLoRA change the base, so an adapter is saved as its difference from the initial one.
        self._initial = (
            tempfile.TemporaryDirectory() if has_stages and settings.adapter.init in ("olora", "pissa") else None
        )
        self.trainable: list[str] = []

    def after(self, stage: Path | None) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Model and tokenizer as they were after the stage kept in a folder; None stands for before any training."""
        if self._loaded is None:
            model, tokenizer = models.load_base(self._settings)
            if self._has_stages:
                model = models.attach_adapter(model, self._settings)
                self.trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
                if self._initial:
                    distributed.by_first(lambda: model.save_pretrained(self._initial.name))
            self._loaded = model, tokenizer
        if stage != self._after:
            models.restore_adapter(self._loaded[0], stage)
            self._after = stage
        return self._loaded

    @property
    def current(self) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
        """Model and tokenizer as they are, such as in the middle of a stage."""
        return self._loaded

    def initial_values(self) -> dict[str, torch.Tensor]:
        """LoRA matrices before any training, by name, on the CPU: a new adapter's, because this one may be trained."""
        model, _ = AdaptedModel(self._settings, has_stages=True).after(None)
        return {name: p.detach().clone().cpu() for name, p in model.named_parameters() if ".lora_" in name}

    def trained_to(self, stage: Path | None) -> None:
        """Note which stage the adapter now is after; None while it is being trained."""
        self._after = stage

    def save(self, folder: Path) -> None:
        """Write the adapter to `folder/adapter`, in PEFT's format."""
        models.save_adapter(self._loaded[0], folder, Path(self._initial.name) if self._initial else None)
