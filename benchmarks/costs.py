"""The plan against what happens: memory and time of random LLaMAs from 1M to 60M parameters, on this CPU.

    python benchmarks/costs.py [SIZE …]

Scored, trained and sampled by the functions that the book uses, each in a process of its own. Goals: memory within
15 %, time within 30 %. Paired: the plan's layers are run anew beside each measurement, and the median of three ratios
counts. Seconds are those of one core at work (`time.process_time`), so that other processes' do not count. Memory is
measured apart, with a fixed `MALLOC_MMAP_THRESHOLD_`: by default glibc keeps up to twice of what tensors need.
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

from lorapar_utils import importance, models, training
from lorapar_utils.data.encoding import encode_examples
from lorapar_utils.importance import score_importance
from lorapar_utils.planning import plan
from lorapar_utils.settings import load_profile
from lorapar_utils.training.rewards import REWARDS

WIDTHS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
SIZES = {
    "1M": (96, 256, 6, 4, 4096),
    "5M": (192, 512, 8, 4, 8192),
    "20M": (320, 896, 12, 5, 16384),
    "60M": (448, 1216, 18, 7, 32768),
}
SHARED, PROMPT, SOLUTION, COMPLETION = 30, 60, 20, 24


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
    prompts = [words(31 * i + 100, prompt - SHARED) for i in range(count)]
    solutions = [words(17 * i, solution - 1) for i in range(count)]
    rows = enumerate(zip(prompts, solutions, strict=True))
    return [{"id": str(i), "prompt": asked, "answer": "1", "solution": solved} for i, (asked, solved) in rows]


def alternating(completions, **_) -> list[float]:
    """A reward that leaves no group without advantage."""
    return [float(i % 2) for i in range(len(completions))]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    tokens = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1} | {f"w{i}": i + 2 for i in range(4000)}, unk_token="<pad>"))
    tokens.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return tokenizer


def measure(folder: str, phase: str, steps: str) -> None:
    """Run one step of a phase, then `steps`; print what a further step takes, and the most memory that was resident."""
    chosen, many = settings(Path(folder)), int(steps)
    # A random model earns nothing, and what has no advantage is not differentiated: as the plan, count with all of it.
    REWARDS["answer"] = [alternating]
    base, tokenizer = models.load_base(chosen)
    model = models.attach_adapter(base, chosen)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in importance.lora_parameters(model).items()}

    def seconds(count: int) -> float:
        encoded = encode_examples(examples(16 * count), tokenizer, chosen)
        began = time.process_time()
        if phase == "importance":
            score_importance(model, encoded, batch_size=16)
        elif phase == "sft":
            training.run_sft(model, tokenizer, examples(16 * count), masks, chosen)
        else:
            training.run_grpo(model, tokenizer, examples(64), masks, chosen.changed(grpo={"steps": count}))
        return time.process_time() - began

    one = min(seconds(1) for _ in range(2))  # the first also pays for warming up
    print(json.dumps({"seconds": (seconds(many) - one) / (many - 1), "GB": peak_resident() / 1e9}))


def measured(folder: str, phase: str, steps: int, what: str, **environment: str) -> float:
    command = [sys.executable, __file__, "measure", folder, phase, str(steps)]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])[what]


def planned(folder: str, phase: str) -> tuple[float, float]:
    """Seconds of a step and GB, as the plan has them; layers are run now."""
    machine, model = plan.machine_named("here"), plan.Model(settings(Path(folder)), (PROMPT, SOLUTION, SHARED))
    needs = model.batches(machine)[phase]
    memory = model.memory(machine, needs, (8 if phase == "importance" else 21) * model.elements)
    return sum(need.seconds for need in needs), sum(memory.values()) / 1e9


def compared(folder: str, size: str, phase: str) -> dict:
    seconds, steps = [], 3 if size == "60M" else 9
    for _ in range(3):
        plan, gigabytes = planned(folder, phase)
        seconds.append((plan, measured(folder, phase, steps, "seconds")))
    ratios = sorted(plan / truth for plan, truth in seconds)
    resident = measured(folder, phase, 2, "GB", MALLOC_MMAP_THRESHOLD_="262144")
    row = {"size": size, "phase": phase, "seconds": median(truth for _, truth in seconds), "planned": ratios[1]}
    return row | {"lowest": ratios[0], "highest": ratios[2], "GB": resident, "planned GB": gigabytes / resident}


def main() -> None:
    plan.clock = time.process_time
    rows = []
    for size in sys.argv[1:] or SIZES:
        with tempfile.TemporaryDirectory() as folder:
            config = LlamaConfig(**dict(zip(WIDTHS, SIZES[size], strict=True)), tie_word_embeddings=True)
            config.eos_token_id, config.pad_token_id = 1, 0
            LlamaForCausalLM(config).save_pretrained(folder)
            make_tokenizer().save_pretrained(folder)
            for phase in ("importance", "sft", "grpo"):
                rows.append(compared(folder, size, phase))
                print(rows[-1], flush=True)
    print(pd.DataFrame(rows).round(3).to_string(index=False))


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["measure"] else main()
