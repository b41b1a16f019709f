"""What a GPU waits for: operators of a token, a pass and a step, and the time that Python and the dispatcher take.

The model has LLaMA-2-7B's depth and adapters, and matrices so narrow that arithmetic costs next to nothing. What time
is left is what a fast card would wait for. Needs no GPU.

    python benchmarks/waits.py
"""

import statistics
import sys
from collections.abc import Callable

import torch
from measure import Operators, timed
from transformers import LlamaConfig, LlamaForCausalLM

from lorapar_utils import importance, models
from lorapar_utils.fast.completions import complete
from lorapar_utils.optim import ActiveAdamW
from lorapar_utils.settings import load_profile

REPEATS, ROWS, PROMPT, ANSWER, NEW = 3, 8, 32, 16, 12
END = 1  # never the likeliest token of this model, so that every completion has NEW tokens


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=32, num_attention_heads=4
    )
    base = LlamaForCausalLM(config).requires_grad_(False).eval()
    base.lm_head.weight[END] = 0
    return models.attach_adapter(base, load_profile("llama2-7b"))


def prompts() -> list[list[int]]:
    return torch.randint(2, 256, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()


def generate(model, **options) -> list[list[int]]:
    ids = torch.tensor(prompts())
    fixed = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": END, "pad_token_id": 0}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **fixed, **options)[
            :, PROMPT:
        ].tolist()


def ways_to_write(model) -> dict[str, Callable[[], list[list[int]]]]:
    """Completions, equal whatever the way."""
    return {
        "completions, ours": lambda: complete(model, prompts(), ends=[END], max_new_tokens=NEW),
        "completions, generate": lambda: generate(model),
        "completions, generate with a static cache": lambda: generate(model, cache_implementation="static"),
    }


def ways_to_learn(model) -> dict[str, Callable[[], object]]:
    phi = importance.lora_parameters(model)
    examples = [{"input_ids": row + row[:ANSWER], "labels": [-100] * PROMPT + row[:ANSWER]} for row in prompts()]
    masks = {name: torch.rand(p.shape) < 0.4 for name, p in phi.items()}
    active, dense = ActiveAdamW(phi.items(), masks), torch.optim.AdamW(phi.values(), fused=True)
    active.release()

    def backward():
        ids, labels = (torch.tensor([e[key] for e in examples]) for key in ("input_ids", "labels"))
        model(input_ids=ids, labels=labels).loss.backward()

    backward()  # both optimizers need gradients
    return {
        "a forward and backward pass": backward,
        "importance of as many examples": lambda: importance.score_importance(model, examples, batch_size=ROWS),
        "a step of ActiveAdamW": active.step,
        "a step of AdamW, fused": dense.step,
    }


def measured(run: Callable, times: int = 1) -> tuple[float, float]:
    """Operators and median milliseconds, for one of `times`."""
    run()
    with Operators() as operators:
        run()
    seconds = [timed(run) for _ in range(REPEATS)]
    return operators.names.total() / times, 1e3 * statistics.median(seconds) / times


def main() -> None:
    model = make_model()
    written = {}
    for name, run in ways_to_write(model).items():
        written[name] = run()
        operators, milliseconds = measured(run, NEW)
        print(f"{name}: {operators:.0f} operators and {milliseconds:.2f} ms a token of {ROWS} rows", flush=True)
    if len({str(tokens) for tokens in written.values()}) > 1:
        sys.exit("benchmarks/waits.py: the ways to write gave different tokens")
    for name, run in ways_to_learn(model).items():
        operators, milliseconds = measured(run)
        print(f"{name}: {operators:.0f} operators, {milliseconds:.2f} ms", flush=True)


if __name__ == "__main__":
    main()
