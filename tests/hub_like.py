"""Model and data folders in the hub's layout: tokenizers with the habits of real families, and each data set's real form.

The tokenizers are trained on the spot on a few sentences; their special tokens, templates and what they put around a text
are those of the family. Folders hold no weights: a rehearsal needs none.
"""

import json
from pathlib import Path

from conftest import ROOT
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Natalia sold 48 clips in April, and then she sold half as many in May. How many clips did she sell altogether?",
    "What is 12 + 7 - 3? Answer the question in short steps, one a line. Reply yes or no: fast or slow thinking.",
    "Write a function that returns the sum of a list.\n\ndef total(values):\n    return sum(values)\n#### 72",
    "Why do stars twinkle? Because light is bent by moving air. System 1 is fast; System 2 is slow.",
]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# special tokens (the first two are BOS and EOS, None for none), whether the tokenizer adds BOS, end tokens of the generation
# config, spaces written as ▁ (SentencePiece) or bytes, and the chat template
FAMILIES = {
    "llama-2": (["<s>", "</s>"], True, ["</s>"], "spaces", None),
    "llama-2-chat": (
        ["<s>", "</s>"],
        True,
        ["</s>"],
        "spaces",
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set system = '<<SYS>>\n' + messages[0].content"
        " + '\n<</SYS>>\n\n' %}{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}{% for m in rest %}"
        "{% if m.role == 'user' %}{{ bos_token }}[INST] {{ (system if loop.first else '') + m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}",
    ),
    "llama-3": (
        [
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<|eom_id|>",
        ],
        True,
        ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        "bytes",
        "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>"
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
    ),
    "qwen-2.5": (
        [None, "<|im_end|>", "<|endoftext|>", "<|im_start|>"],
        False,
        ["<|im_end|>", "<|endoftext|>"],
        "bytes",
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML,
    ),
    "gemma-2": (
        ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"],
        True,
        ["<eos>", "<end_of_turn>"],
        "spaces",
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    ),
    "mistral-v0.2": (["<s>", "</s>"], True, ["</s>"], "spaces", INST),
    # Passes over a system turn in silence.
    "phi-3": (
        ["<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        True,
        ["<|endoftext|>", "<|end|>"],
        "spaces",
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
        "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}",
    ),
    "chatml": (["<s>", "<|im_end|>", "<|im_start|>"], True, ["<|im_end|>"], "bytes", CHATML),
    # Left so by fine-tunes: it also ends every text.
    "ends-every-text": (["<s>", "</s>"], True, ["</s>"], "spaces", None),
}


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few hundred tokens with the habits of `family`."""
    special, adds_bos, _, kind, template = FAMILIES[family]
    bos, eos = special[:2]
    raw = Tokenizer(BPE(unk_token="<unk>"))
    if kind == "bytes":
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        raw.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
        alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    own = ["<unk>", *(token for token in special if token)]
    raw.train_from_iterator(
        TEXT, BpeTrainer(vocab_size=600, special_tokens=own, initial_alphabet=alphabet, show_progress=False)
    )
    if adds_bos:
        around = f"{bos} $A {eos}" if family == "ends-every-text" else f"{bos} $A"
        ids = [(token, raw.token_to_id(token)) for token in (bos, eos)]
        raw.post_processor = TemplateProcessing(single=around, special_tokens=ids)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token=bos, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


def end_ids(family: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    return tokenizer.convert_tokens_to_ids(FAMILIES[family][2])


def make_model_folder(folder: Path, architecture: str, family: str) -> Path:
    """`config.json` of a profile's model at full width, tokenizer and generation config; no weights."""
    tokenizer = make_tokenizer(family)
    tokenizer.save_pretrained(folder)
    config = json.loads((ROOT / "profiles" / "architectures" / f"{architecture}.json").read_text())
    config |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    (folder / "config.json").write_text(json.dumps(config))
    # Qwen and Llama publish sampling settings, which must change nothing.
    generation = {"eos_token_id": end_ids(family, tokenizer), "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation | {"repetition_penalty": 1.1}))
    return folder


def make_data_folder(folder: Path, source: str, rows: int = 60) -> Path:
    """Files as the hub has them for one of the paper's training sets."""
    folder.mkdir(parents=True)
    made = {
        "gsm8k": lambda i: {
            "question": f"Tom has {i} pens and buys {i % 7}. How many has he?",
            "answer": "\n".join([f"{i} + {i % 7} = <<{i}+{i % 7}={i + i % 7}>>{i + i % 7}"] * (1 + i % 4))
            + f"\n#### {i + i % 7}",
        },
        "dolly-15k": lambda i: {
            "instruction": f"Why is {i} a number?",
            "context": "Numbers count things. [2]" if i % 3 else "",
            "response": f"Because you can count to {i}.\n\nThat is all.",
            "category": "open_qa",
        },
        "open-platypus": lambda i: {
            "input": "",
            "output": f"The answer is $\\frac{{{i}}}{{2}}$.",
            "instruction": f"Halve {i}.",
            "data_source": "MATH/PRM-800K",
        },
        "codealpaca-20k": lambda i: {
            "instruction": f"Print {i} in HTML.",
            "input": "Use <s> and </s>." if i % 2 else "",
            "output": f"<s>{i}</s>",
        },
    }[source]
    if source == "gsm8k":
        import pandas as pd

        (folder / "main").mkdir()
        for split, first in (("train", 0), ("test", rows)):
            table = pd.DataFrame([made(i) for i in range(first, first + rows)])
            table.to_parquet(folder / "main" / f"{split}-00000-of-00001.parquet")
        return folder
    name = {
        "dolly-15k": "databricks-dolly-15k.jsonl",
        "open-platypus": "data/train-00000-of-00001-4fe2df04669d1669.parquet",
        "codealpaca-20k": "code_alpaca_20k.json",
    }[source]
    content = [made(i) for i in range(2 * rows)]
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        import pandas as pd

        pd.DataFrame(content).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(content, indent=4))
    else:
        path.write_text("\n".join(map(json.dumps, content)))
    (folder / "README.md").write_text("---\nlicense: cc\n---\n")
    return folder


def make_mmlu_folder(folder: Path) -> Path:
    """Two of MMLU's subjects, five worked examples and three questions each."""
    folder.mkdir(parents=True)
    for split, count in (("dev", 5), ("test", 3)):
        rows = [
            {
                "question": f"What is {i} + 1?",
                "subject": subject,
                "choices": [str(i + k) for k in range(4)],
                "answer": 1,
            }
            for subject in ("abstract_algebra", "anatomy")
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder
