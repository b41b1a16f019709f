"""Models of many builds: each takes a shortcut only where it gives the model's own numbers."""

import math

import pytest
import torch
from conftest import make_tiny_tokenizer
from peft import LoraConfig, get_peft_model
from tiny_training import examples
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    ModernBertDecoderConfig,
    ModernBertDecoderForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from lorapar_utils import importance, training
from lorapar_utils.errors import InputError
from lorapar_utils.fast.answer_head import use_answer_head
from lorapar_utils.fast.checks import shortcuts_of
from lorapar_utils.fast.completions import complete, next_token_logits, uniform
from lorapar_utils.fast.label_scores import reply_log_probs
from lorapar_utils.importance import score_importance
from lorapar_utils.settings import load_profile

SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ALL = {"answer_head", "shared_prefix", "completions"}
# name -> (how to make it, the shortcuts that it takes, layers to train)
BUILDS = {
    "Llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **ENDS)), ALL, ["q_proj", "down_proj"]),
    "Gemma-2, logits capped": (
        lambda: Gemma2ForCausalLM(
            Gemma2Config(**SMALL, **ENDS, num_key_value_heads=2, head_dim=8, final_logit_softcapping=5.0)
        ),
        ALL,
        ["q_proj", "down_proj"],
    ),
    "Cohere, logits scaled": (
        lambda: CohereForCausalLM(CohereConfig(**SMALL, **ENDS, logit_scale=0.0625)),
        ALL,
        ["q_proj", "down_proj"],
    ),
    "Granite, logits divided": (
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, **ENDS, logits_scaling=4.0, embedding_multiplier=3.0)),
        ALL,
        ["q_proj", "down_proj"],
    ),
    "Mistral with a window shorter than a bundle": (
        lambda: MistralForCausalLM(MistralConfig(**SMALL, **ENDS, num_key_value_heads=2, sliding_window=6)),
        {"answer_head", "completions"},
        ["q_proj", "down_proj"],
    ),
    "LFM2, convolutions between attention layers": (
        lambda: Lfm2ForCausalLM(
            Lfm2Config(**SMALL, **ENDS, num_key_value_heads=2, full_attn_idxs=[1], block_multiple_of=8)
        ),
        {"answer_head"},
        ["q_proj", "in_proj", "w1"],
    ),
    "Falcon-H1, a recurrence beside attention": (
        lambda: FalconH1ForCausalLM(
            FalconH1Config(
                **SMALL,
                **ENDS,
                num_key_value_heads=2,
                lm_head_multiplier=0.5,
                mamba_d_ssm=32,
                mamba_n_heads=4,
                mamba_d_head=8,
                mamba_d_state=8,
                mamba_chunk_size=8,
            )
        ),
        set(),
        ["q_proj", "down_proj"],
    ),
    "Mixtral, a mixture of experts": (
        lambda: MixtralForCausalLM(MixtralConfig(**SMALL, **ENDS, num_key_value_heads=2, num_local_experts=4)),
        ALL,
        ["q_proj", "v_proj"],
    ),
    "GPT-2, learned positions": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, **ENDS)),
        ALL,
        ["c_attn", "c_fc"],
    ),
    "OPT, other positions": (
        lambda: OPTForCausalLM(
            OPTConfig(
                vocab_size=97,
                hidden_size=32,
                ffn_dim=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=64,
                **ENDS,
            )
        ),
        None,
        ["q_proj", "fc1"],
    ),
    "Phi-3, fused projections": (
        lambda: Phi3ForCausalLM(Phi3Config(**SMALL, **ENDS, num_key_value_heads=2)),
        ALL,
        ["qkv_proj", "gate_up_proj"],
    ),
}
PROMPTS = [[5, 9, 11, 12, 13, 14], [5, 9, 11, 12, 7], [5, 9, 11, 30, 31, 32, 33, 34], [40]]


@pytest.fixture(scope="module", params=BUILDS)
def build(request):
    """A model of the build, its weights wide enough that a leak shows, and the same with an adapter."""
    make, expected, layers = BUILDS[request.param]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.mul_(4.0)
    return model.requires_grad_(False), expected, layers


def test_a_model_takes_the_shortcuts_that_give_its_numbers(build, capsys):
    model, expected, _ = build
    model.__dict__.pop("_shortcuts", None)
    shortcuts = shortcuts_of(model)
    taken = {name for name in ALL if getattr(shortcuts, name)}
    if expected is not None:
        assert taken == expected
    assert ("by the libraries' own path" in capsys.readouterr().out) == (taken != ALL)


def test_completions_are_those_of_generate(build):
    model, *_ = build
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": 2, "pad_token_id": 0}
        written = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        expected.append(written[0, len(prompt) :].tolist())
    assert complete(model, PROMPTS, ends=[2], max_new_tokens=8) == expected
    alone = torch.stack([model(torch.tensor([prompt])).logits[0, -1] for prompt in PROMPTS])
    torch.testing.assert_close(next_token_logits(model, PROMPTS), alone, rtol=1e-3, atol=1e-3)


def test_what_is_drawn_hangs_on_the_numbers_given_alone(build):
    model, *_ = build
    draws = uniform(2 * len(PROMPTS), 6, 7)
    options = {"ends": [2], "max_new_tokens": 6, "samples": 2, "temperature": 1.0}
    together = complete(model, PROMPTS, **options, draws=draws)
    alone = [
        c for i, prompt in enumerate(PROMPTS) for c in complete(model, [prompt], **options, draws=draws[2 * i :][:2])
    ]
    assert together == alone and len(set(map(tuple, together))) > len(PROMPTS)


def test_a_completion_that_is_stopped_ends_there(build):
    model, *_ = build
    options = {"ends": [2], "max_new_tokens": 6, "temperature": 5.0, "draws": uniform(len(PROMPTS), 6, 1)}
    whole = complete(model, PROMPTS, **options)
    stopped = complete(model, PROMPTS, **options, stopped=lambda tokens: tokens == whole[2][:3])
    assert stopped == [*whole[:2], whole[2][:3], whole[3]] and len(whole[2]) > 3


def test_replies_have_the_log_probability_of_one_plain_pass_each(build):
    model, *_ = build
    pairs = [(prompt, reply) for prompt in PROMPTS for reply in ([20, 21], [22])]
    for (prompt, reply), ours in zip(pairs, reply_log_probs(model, pairs), strict=True):
        log_probs = model(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
        plain = sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(reply))
        assert ours == pytest.approx(plain, rel=1e-3, abs=1e-3)


def test_the_loss_that_stage_1_trains_on_is_the_models_own(build):
    model, *_ = build
    ids = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :6] = -100
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    plain = model(**batch).loss
    forward = model.forward
    use_answer_head(model)
    try:
        if model.forward != forward:  # else the libraries' own head stays
            torch.testing.assert_close(model(**batch, fused_lm_head=True).loss, plain, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(model(**batch).loss, plain)
    finally:
        model.__dict__.pop("forward", None)


def test_importance_is_that_of_one_example_at_a_time(build):
    model, _, layers = build
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    wrapped.eval()
    for parameter in importance.lora_parameters(wrapped).values():
        torch.nn.init.normal_(parameter, std=0.1)
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(5):
        ids = torch.randint(3, 97, (5 + i,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    try:
        scores = score_importance(wrapped, examples, batch_size=3)
        parameters = importance.lora_parameters(wrapped)
        gradient, fisher = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
        for example in examples:
            wrapped.zero_grad()
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            wrapped(input_ids=ids, labels=labels).loss.backward()
            for name, p in parameters.items():
                gradient[name] += p.grad / len(examples)
                fisher[name] += p.grad**2 / len(examples)
        for name, p in parameters.items():
            expected = (gradient[name] * p - 0.5 * fisher[name] * p**2).abs().detach()
            torch.testing.assert_close(scores[name], expected, rtol=2e-3, atol=2e-3 * float(expected.max()))
    finally:
        wrapped.unload()


@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_both_stages_train_it(build, stage):
    """Stage 2 draws by the model's own states, and no loss of a mixture's router joins the answers'."""
    model, _, layers = build
    tokenizer = make_tiny_tokenizer()
    chosen = load_profile(
        "smoke",
        model={"dtype": "float32", "system_prompt": "system"},
        sft={"epochs": 1, "batch_size": 4},
        grpo={"steps": 1, "prompts_per_step": 2, "completions": 2, "micro_batch": 4, "max_completion_length": 4},
    )
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=layers, task_type="CAUSAL_LM"))
    for parameter in importance.lora_parameters(wrapped).values():
        torch.nn.init.normal_(parameter, std=0.1)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in importance.lora_parameters(wrapped).items()}
    try:
        run = {"sft": training.run_sft, "grpo": training.run_grpo}[stage]
        history = run(wrapped, tokenizer, examples()[:4], masks, chosen)
        assert history and all(math.isfinite(float(entry["loss"])) for entry in history)
        assert not any("aux_loss" in entry for entry in history)
    finally:
        wrapped.unload()


def test_a_model_whose_loss_trl_computes_otherwise_is_refused():
    """ModernBERT's decoder has a layer of its own between backbone and head, which TRL's fused head passes over."""
    torch.manual_seed(0)
    config = ModernBertDecoderConfig(
        **SMALL, **ENDS, global_attn_every_n_layers=1, cls_token_id=1, sep_token_id=2, max_position_embeddings=64
    )
    model = ModernBertDecoderForCausalLM(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in importance.lora_parameters(wrapped).items()}
    chosen = load_profile("smoke", model={"dtype": "float32", "system_prompt": "system"}, sft={"epochs": 1})
    with pytest.raises(InputError, match="TRL's trainers compute another loss for ModernBertDecoderForCausalLM"):
        training.run_sft(wrapped, make_tiny_tokenizer(), examples()[:4], masks, chosen)


def test_rows_longer_than_a_rotation_knows_are_read_alone():
    """Past its first context such a model rotates every row of a batch by the longest."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    model = LlamaForCausalLM(LlamaConfig(**SMALL, **ENDS, max_position_embeddings=32, rope_parameters=rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    generator = torch.Generator().manual_seed(3)
    prompts = [[5, 9], [5, 9, *torch.randint(3, 97, (45,), generator=generator).tolist()]]
    expected = [complete(model, [prompt], ends=[2], max_new_tokens=6)[0] for prompt in prompts]
    assert complete(model, prompts, ends=[2], max_new_tokens=6) == expected
    [short, long] = reply_log_probs(model, [(prompt, [20, 21]) for prompt in prompts])
    assert [short, long] == pytest.approx([reply_log_probs(model, [(p, [20, 21])])[0] for p in prompts], rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_that_shifts_a_models_own_positions_is_noticed_in_bf16_too(dtype):
    """MPT counts its distances from the end of the batch's longest row."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "d_model": 128, "n_layers": 4, "n_heads": 4, "max_seq_len": 512, "expansion_ratio": 2}
    model = MptForCausalLM(MptConfig(**sizes, **ENDS)).to(dtype).eval()
    assert not shortcuts_of(model).completions
