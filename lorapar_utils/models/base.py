"""Load the base model (packaged GGUF, local folder or hub id), with a folder's adapter merged into it."""

from functools import partial
from pathlib import Path

import torch
from peft import (
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
)
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lorapar_utils import distributed, machine
from lorapar_utils.data.encoding import check_prompts, continuation_ids, question_ids, turn_end
from lorapar_utils.errors import InputError, require
from lorapar_utils.fast.checks import shortcuts_of
from lorapar_utils.models.files import ADAPTER_NOTE, check_layers, read_note, source_of, unreachable_hub
from lorapar_utils.settings import Settings


def load_base(settings: Settings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen base model and the tokenizer that `model.source` names.

    Returns
    -------
    (model, tokenizer)
        The model in evaluation mode, every parameter frozen, in `compute_dtype(settings)`.

    Raises
    ------
    InputError
        A folder without weights, an unknown hub id, a broken download or a corrupted cache.
    """
    torch.set_num_threads(machine.threads_from_environment(settings.threads))
    source, options = source_of(settings)
    if (Path(source) / ADAPTER_NOTE).is_file():
        model = _merged(Path(source), settings)
    else:
        model = _whole(source, options, settings)
    tokenizer = load_tokenizer(settings)
    check_prompts(tokenizer, settings.model.plain_template)
    _prepare_tokenizer(tokenizer, model, settings)
    if torch.cuda.is_available() and settings.model.quantization is None:
        model = model.to(distributed.state().device)
    # Hidden states of the last tokens are strided. For these torch copies the whole bf16 head once per row, which
    # doubles the time of a CPU step. A contiguous copy of the few hidden states avoids this.
    model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    model.requires_grad_(False).eval()
    shortcuts_of(model, settings.shortcuts)
    return model, tokenizer


def load_tokenizer(settings: Settings) -> PreTrainedTokenizerBase:
    """The unchanged tokenizer of `model.source`. If an adapter has no tokenizer, it is the tokenizer of the base."""
    source, options = source_of(settings, weights=False)
    if (Path(source) / ADAPTER_NOTE).is_file() and not (Path(source) / "tokenizer_config.json").is_file():
        source, options = source_of(_adapter_base(Path(source), settings), weights=False)
    return _read(AutoTokenizer, source, settings, "tokenizer", **options)


def load_config(settings: Settings) -> PreTrainedConfig:
    """The configuration of `model.source`. For an adapter it is the configuration of the base."""
    source, options = source_of(settings, weights=False)
    if (Path(source) / ADAPTER_NOTE).is_file():
        source, options = source_of(_adapter_base(Path(source), settings), weights=False)
    return _read(AutoConfig, source, settings, "configuration", **options)


def _whole(source: str, options: dict, settings: Settings) -> PreTrainedModel:
    options = options | {"dtype": compute_dtype(settings), "output_loading_info": True} | _quantized(settings)
    model, report = _read(AutoModelForCausalLM, source, settings, "weights", **options)
    # transformers initializes missing layers at random and only logs a warning.
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model.source = {settings.model.source!r}: {len(missing)} of the model's weights are not in its files, "
            f"first {missing[0]}; save the whole model there, and see that config.json is that of these weights"
        )
    check_layers(settings, model, report["unexpected_keys"])
    return model


def _merged(folder: Path, settings: Settings) -> PreTrainedModel:
    """The base of an adapter with the adapter merged into the weights."""
    if settings.model.quantization:
        raise InputError(
            f"model.quantization: an adapter cannot be added to a 4-bit base; merge {folder} first, or set null"
        )
    base = _adapter_base(folder, settings)
    source, options = source_of(base)
    wrapped = _read(partial(PeftModel.from_pretrained, _whole(source, options, base)), str(folder), settings, "adapter")
    expected = set(get_peft_model_state_dict(wrapped))
    if unmatched := sorted(expected ^ set(load_peft_weights(str(folder)))):
        raise InputError(
            f"model.source: the adapter in {folder} does not fit {base.model.source}: {len(unmatched)} weights have "
            f"no counterpart, first {unmatched[0]}; name the base that it was trained over"
        )
    print(f"model.source: {folder} is an adapter; it is added to the weights of {base.model.source}")
    return _read(lambda _: wrapped.merge_and_unload(), str(folder), settings, "adapter")


def _adapter_base(folder: Path, settings: Settings) -> Settings:
    """The settings with the adapter's base as the model."""
    name = read_note(folder / ADAPTER_NOTE).get("base_model_name_or_path") or ""
    path = folder / name
    base = settings.changed(model={"source": str(path.resolve()) if name and path.is_dir() else name or "nowhere"})
    if not name or (Path(base.model.source) / ADAPTER_NOTE).is_file():
        raise InputError(
            f"model.source: {folder} is an adapter over {name!r}, which is no base; merge it into its base"
        )
    return base


def _read(reader, source: str, settings: Settings, what: str, **options):
    """Call `reader.from_pretrained`. Any error about damaged, unknown or missing files becomes an InputError."""
    load = getattr(reader, "from_pretrained", reader)
    try:
        if not Path(source).exists() and (reason := unreachable_hub(source)):
            raise OSError(f"{reason}.")
        return load(source, **options)
    except (torch.OutOfMemoryError, MemoryError, InputError):
        raise
    except Exception as error:  # each file format raises other errors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # A line that ends in a colon introduces the next ones.
        reason = " ".join(lines[:3] if lines[0].endswith(":") else lines[:1])
        if not Path(settings.model.source).is_dir() and settings.model.source != "packaged":
            reason = f"no such folder beside the profile or in the clone, and as a hub id: {reason}"
        raise InputError(
            f"model.source = {settings.model.source!r}: its {what} could not be loaded: {reason[:300]} "
            "Give 'packaged', a folder with config.json, tokenizer and weights, or a hub id that you can reach."
        ) from error


def _prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, settings: Settings) -> None:
    """Make the token that ends a turn the tokenizer's end token, and keep only token ids of the generation config.

    Sampling settings in a model's generation config (repetition penalty, temperature) are dropped.
    """
    where = f"model.source = {settings.model.source!r}"
    _check_vocabulary(tokenizer, model.get_input_embeddings().num_embeddings, settings)
    declared = model.generation_config.eos_token_id
    declared = [token for token in (declared if isinstance(declared, list) else [declared]) if token is not None]
    for token in declared:
        if not isinstance(token, int) or not 0 <= token < len(tokenizer):
            raise InputError(
                f"{where}: eos_token_id = {token!r} of its generation config is no id of its tokenizer; correct it in "
                "generation_config.json"
            )
    end = turn_end(tokenizer)
    if end in declared:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    elif tokenizer.eos_token_id is None and declared:
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(declared[0])
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"{where}: neither its tokenizer (eos_token) nor its generation_config.json (eos_token_id) names an end "
            "token, so no answer would end; set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # Add the template's turn end, because a base model's generation config often does not list it.
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *declared, *([] if end is None else [end])]))
    # Decoding keeps end tokens that were added as ordinary tokens, so make them special.
    ordinary = [token.content for i, token in tokenizer.added_tokens_decoder.items() if i in ends and not token.special]
    tokenizer.add_special_tokens({"extra_special_tokens": ordinary}, replace_extra_special_tokens=False)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    _leave_texts_open(tokenizer)


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, settings: Settings) -> None:
    """Check that every token that a prompt can contain has a row in the embedding.

    Control tokens without a row (images, infilling) do no harm, because questions that quote them are read as text.
    """
    where = f"model.source = {settings.model.source!r}"
    without_row = {token for token in tokenizer.get_vocab().values() if token >= rows}
    control = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    used = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    used |= set(question_ids("1 + 1?", tokenizer, plain_template=settings.model.plain_template))
    if reachable := (without_row - control) | (without_row & used):
        raise InputError(
            f"{where}: its tokenizer has tokens up to id {max(reachable)}, its embedding only {rows} rows; save the "
            "tokenizer that the model was trained with, or resize the model's embedding and train the new rows first"
        )
    if not tokenizer("1 + 1").input_ids:
        raise InputError(f"{where}: its tokenizer reads nothing of '1 + 1'; save the one that belongs to the model")


def _leave_texts_open(tokenizer: PreTrainedTokenizerBase) -> None:
    """Stop a tokenizer from adding an end token to every text, as those of some fine-tunes do (`add_eos_token`)."""
    if tokenizer("1").input_ids[-1:] != [tokenizer.eos_token_id]:
        return
    if not tokenizer.is_fast:
        raise InputError(
            "model.source: its tokenizer ends every text with its end token; save it as a fast one, without"
        )
    front = [(tokenizer.convert_ids_to_tokens(token), token) for token in continuation_ids("", tokenizer)]
    words = [word for word, _ in front]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*words, "$A"], pair=[*words, "$A", "$B"], special_tokens=front
    )
    print("tokenizer: it ended every text with its end token; it no longer does")


def _quantized(settings: Settings) -> dict:
    """Options to load the base in 4 bits, as QLoRA does. Empty without `model.quantization`."""
    if settings.model.quantization is None:
        return {}
    require("bitsandbytes", f"model.quantization = {settings.model.quantization!r}", "qlora")
    return {
        "device_map": {"": distributed.state().device},
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.model.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute_dtype(settings),
        ),
    }


def compute_dtype(settings: Settings) -> torch.dtype:
    """The dtype of `model.dtype` on this machine (see `machine.compute_dtype`)."""
    return getattr(torch, machine.compute_dtype(settings.model.dtype))
