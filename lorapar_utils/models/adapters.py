"""The adapters: LoRA as the paper trains it, and the baselines; attached, saved, restored."""

import copy
import shutil
import tempfile
from pathlib import Path

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    ShiraConfig,
    get_peft_model,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lorapar_utils import distributed
from lorapar_utils.errors import InputError
from lorapar_utils.models.files import decoder_layers_name
from lorapar_utils.settings import Settings

IA3_MODULES = ("k_proj", "v_proj", "down_proj")
ENCODER = "encoder.safetensors"


def attach_adapter(model: PreTrainedModel, settings: Settings) -> PeftModel:
    """Wrap the base in a new fp32 adapter.

    Deviation from PEFT's default: `init: normal` draws A and B from N(0, 0.01^2), as the paper's script does. With
    B = 0 (`lora`, `gaussian`) every importance score is 0, so there is no partition.

    Parameters
    ----------
    settings
        `adapter`: kind, init, r, lora_alpha, dropout, modules, virtual_tokens; `seed` fixes the initial weights.

    Raises
    ------
    InputError
        `adapter.modules` names layers that the model does not have.
    """
    check_modules(model, settings)
    torch.manual_seed(settings.seed)
    try:
        wrapped = get_peft_model(model, _adapter_config(settings), autocast_adapter_dtype=True)
    except Exception as error:  # PEFT raises many types, depending on method and layers
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"adapter.kind = {settings.adapter.kind!r}, init = {settings.adapter.init!r}: PEFT cannot attach that to "
            f"{type(model).__name__} ({reason}); take another kind, or name other adapter.modules"
        ) from None
    if settings.adapter.kind == "lora" and settings.adapter.init == "normal":
        for module in wrapped.modules():
            if isinstance(module, LoraLayer):
                for part in (*module.lora_A.values(), *module.lora_B.values()):
                    torch.nn.init.normal_(part.weight, std=0.01)
    if settings.model.sharded and distributed.state().num_processes > 1:
        distributed.share_out(wrapped, decoder_layers(wrapped.get_base_model()))
    return wrapped


def check_modules(model: PreTrainedModel, settings: Settings) -> None:
    """Check that `model` has at least one layer for each module name of the adapter.

    PEFT silently skips names without a layer.

    Raises
    ------
    InputError
        A name has no layer. The message lists the linear layers that the model has.
    """
    if settings.adapter.kind in ("prompt_tuning", "p_tuning", "prefix_tuning"):
        return
    targets = IA3_MODULES if settings.adapter.kind == "ia3" else settings.target_modules
    head = model.get_output_embeddings()
    names = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]
    missing = [word for word in targets if not any(name == word or name.endswith(f".{word}") for name in names)]
    if missing:
        linear = dict.fromkeys(name.rsplit(".", 1)[-1] for name in names)
        setting, remedy = (
            f"adapter.modules = {settings.adapter.modules!r}",
            (f"name those to train in adapter.modules, such as [{', '.join(list(linear)[:2])}]"),
        )
        if settings.adapter.kind == "ia3":
            setting, remedy = "method: ia3", "leave this method out for such a model"
        raise InputError(
            f"{setting}: {type(model).__name__} has no {', '.join(missing)}; its linear layers are "
            f"{', '.join(linear)}: {remedy}"
        )


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The decoder layers of a base model of any architecture."""
    return model.get_submodule(decoder_layers_name(model))


def _adapter_config(settings: Settings) -> PeftConfig:
    adapter = settings.adapter
    task = {"task_type": "CAUSAL_LM"}
    modules = list(settings.target_modules)
    virtual = {"num_virtual_tokens": adapter.virtual_tokens, **task}
    if adapter.kind == "prompt_tuning":
        return PromptTuningConfig(prompt_tuning_init="RANDOM", **virtual)
    if adapter.kind == "p_tuning":
        return PromptEncoderConfig(encoder_hidden_size=128, **virtual)
    if adapter.kind == "prefix_tuning":
        return PrefixTuningConfig(prefix_projection=False, **virtual)
    if adapter.kind == "ia3":
        return IA3Config(target_modules=list(IA3_MODULES), feedforward_modules=["down_proj"], **task)
    if adapter.kind == "shira":
        return ShiraConfig(r=adapter.r, target_modules=modules, random_seed=settings.seed, **task)
    return LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules,
        init_lora_weights={"normal": True, "lora": True}.get(adapter.init, adapter.init),
        use_dora=adapter.kind == "dora",
        bias="none",
        **task,
    )


def save_adapter(model: PeftModel, folder: Path, initial: Path | None = None) -> None:
    """Write `folder/adapter`, which `PeftModel.from_pretrained` loads over the original base.

    Parameters
    ----------
    initial
        Folder of the adapter before training (`save_pretrained`), for PiSSA and OLoRA, which change the base. `adapter`
        then holds the change by training, as a LoRA of twice the rank, and `trainable` the adapter itself. P-Tuning
        has a `trainable` too, because PEFT saves what its encoder computes, not the encoder.
    """
    if _has_encoder(model):
        (folder / "trainable").mkdir(parents=True)
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "trainable" / ENCODER)
    if initial is None:
        model.save_pretrained(folder / "adapter")
        return
    model.save_pretrained(folder / "trainable")
    # The conversion by PEFT changes the initial adapter's folder and the model's configuration, so use copies.
    config = copy.deepcopy(model.peft_config["default"])
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(initial, scratch, dirs_exist_ok=True)
        model.save_pretrained(folder / "adapter", path_initial_model_for_weight_conversion=scratch)
    model.peft_config["default"] = config


def restore_adapter(model: PeftModel, folder: Path) -> None:
    """Load the weights that `save_adapter` wrote into a new adapter of the same settings."""
    trainable = folder / "trainable"
    if _has_encoder(model):
        model.load_state_dict(load_file(trainable / ENCODER), strict=False)
        return
    set_peft_model_state_dict(model, load_peft_weights(str(trainable if trainable.is_dir() else folder / "adapter")))


def _has_encoder(model: PeftModel) -> bool:
    return model.active_peft_config.peft_type == PeftType.P_TUNING
