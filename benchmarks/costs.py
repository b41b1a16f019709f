"""The plan against what happens: memory and time of random LLaMAs from 1M to 135M parameters, on this CPU.

    python benchmarks/costs.py

Each size runs in a process of its own, scored, trained and sampled by the functions that the book uses. Goals: memory
within 15 %, time within 25 %. Paired: operations are timed anew for the plan beside each measurement, and the median of
the ratios counts. Memory is measured with a fixed `MALLOC_MMAP_THRESHOLD_`: by default glibc keeps up to
twice of what tensors need, which is the allocator's and not the plan's (the last column).
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from measure import peak_resident
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lorapar_utils import models, plans, training
from lorapar_utils.costs import timed_here
from lorapar_utils.encoding import encode_examples
from lorapar_utils.importance import score_importance
from lorapar_utils.settings import load_profile

# hidden size, intermediate size, layers, heads, vocabulary
SIZES = {
    "1M": (96, 256, 6, 4, 4096),
    "5M": (192, 512, 8, 4, 8192),
    "20M": (320, 896, 12, 5, 16384),
    "60M": (448, 1216, 18, 7, 32768),
    "135M": (576, 1536, 30, 9, 49152),
}
REPEATS = 3
SHARED, PROMPT, SOLUTION, COMPLETION = 30, 60, 20, 24
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def settings(folder: Path):
    return load_profile(
        "smoke",
        threads=1,
        model={"source": str(folder), "dtype": "float32", "system_prompt": words(0, SHARED)},
        importance={"batch_size": 16},
        sft={"batch_size": 16, "epochs": 1},
        grpo={"prompts_per_step": 4, "completions": 8, "micro_batch": 32, "max_completion_length": COMPLETION},
    )


def words(start: int, count: int) -> str:
    return " ".join(f"w{(start + i) % 4000}" for i in range(count))


def examples(count: int, prompt: int = PROMPT, solution: int = SOLUTION) -> list[dict]:
    return [
        {
            "id": str(i),
            "prompt": words(31 * i + 100, prompt - SHARED),
            "answer": "1",
            "solution": words(17 * i, solution - 1),
        }
        for i in range(count)
    ]


def alternating(completions, **_) -> list[float]:
    """A reward that leaves no group without advantage."""
    return [float(i % 2) for i in range(len(completions))]


def make_model(folder: Path, size: str) -> None:
    hidden, intermediate, layers, heads, vocabulary = SIZES[size]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=3 if heads == 9 else heads,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokens = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1} | {f"w{i}": i + 2 for i in range(4000)}, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def measure(folder: str, phase: str, steps: str) -> None:
    """Run one step of a phase, then `steps`; print what a further step takes, and the most memory that was resident."""
    chosen, many = settings(Path(folder)), int(steps)
    # A random model earns nothing, and what has no advantage is not differentiated: as the plan, count with all of it.
    training.correct = alternating
    base, tokenizer = models.load_base(chosen)
    model = models.attach_adapter(base, chosen)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in models.lora_parameters(model).items()}

    def seconds(count: int) -> float:
        encoded = encode_examples(examples(16 * count), tokenizer, chosen)
        began = time.perf_counter()
        if phase == "importance":
            score_importance(model, encoded, batch_size=16)
        elif phase == "sft":
            training.run_sft(model, tokenizer, examples(16 * count), masks, chosen)
        else:
            training.run_grpo(model, tokenizer, examples(64), masks, chosen.changed(grpo={"steps": count}))
        return time.perf_counter() - began

    one = min(seconds(1) for _ in range(2))  # the first also pays for warming up
    print(json.dumps({"seconds": (seconds(many) - one) / (many - 1), "bytes": peak_resident()}))


def measured(folder: Path, phase: str, steps: int, **environment: str) -> dict:
    command = [sys.executable, __file__, "measure", str(folder), phase, str(steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def planned(folder: Path, phase: str) -> tuple[float, float]:
    """Seconds of a step and bytes, as the plan has them; each operation is timed now."""
    timed_here.cache_clear()
    chosen = settings(folder)
    machine = plans.machine_named("here", chosen)
    passes = plans.Passes(chosen, bundles=True, lengths=(PROMPT, SOLUTION, SHARED))
    update = passes.update(passes.elements).seconds(machine)
    optimizer = 21 * passes.elements
    if phase == "importance":
        works, update, optimizer = [passes.work("score", 16)], 0.0, 8 * passes.elements
    elif phase == "sft":
        works = [passes.work("train_sft")]
    else:
        works = [passes.work("complete", 4, COMPLETION, 8), passes.work("train_grpo")]
    fullest = max(works, key=lambda work: work.peak)
    seconds = sum(work.seconds(machine) for work in works) + update
    return seconds, sum(passes.memory(machine, fullest, optimizer).values())


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for size in sys.argv[1:] or SIZES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / size
            make_model(folder, size)
            for phase in ("importance", "sft", "grpo"):
                steps = 3 if size in ("60M", "135M") else 9
                pairs = []
                for _ in range(REPEATS):
                    seconds, size_planned = planned(folder, phase)
                    found = measured(folder, phase, steps)
                    pairs.append((seconds / found["seconds"], found))
                ratios = sorted(ratio for ratio, _ in pairs)
                fixed = measured(folder, phase, 2, MALLOC_MMAP_THRESHOLD_="262144")["bytes"]
                rows.append(
                    {
                        "size": size,
                        "phase": phase,
                        "s a step": median(found["seconds"] for _, found in pairs),
                        "planned / measured": median(ratios),
                        "of": [round(ratio, 2) for ratio in ratios],
                        "GB": fixed / 1e9,
                        "planned / measured GB": size_planned / fixed,
                        "by default / fixed": pairs[-1][1]["bytes"] / fixed,
                    }
                )
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["measure"] else main()
