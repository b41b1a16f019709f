"""LoRA-PAR in a training script of one's own: page, notebook, and the adapter that comes out."""

import json
import re
from pathlib import Path

import jupytext
import papermill
import pytest
import requests
import torch
from api_server import transformers_serve
from conftest import ROOT
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

NOTEBOOK = ROOT / "notebooks" / "use.ipynb"


def script():
    cells = [cell for cell in jupytext.read(NOTEBOOK).cells if "script" in cell.metadata.get("tags", [])]
    return "\n\n".join(cell.source.strip() for cell in cells)


def lines(code):
    return [line for line in code.splitlines() if line.strip()]


def test_page_and_notebook_show_one_script_of_at_most_25_lines():
    [shown, *_] = re.findall(r"```python\n(.*?)```", (ROOT / "book" / "use.md").read_text(), re.S)
    assert lines(shown) == lines(script())
    assert len(lines(shown)) <= 25


@pytest.fixture
def trained(saved_model, tmp_path):
    """The folder that the notebook fills, from a model and files of one's own."""
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("fast", "slow")}
    for first, file in enumerate(data.values()):
        rows = [{"prompt": f"t{first} t{i}", "completion": f" t{i} t3", "answer": f"t{i}"} for i in range(10)]
        Path(file).write_text("\n".join(map(json.dumps, rows)))
    sft = {"max_steps": 2, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none"}
    given = {
        "base": str(saved_model),
        "data": data,
        "out": str(tmp_path / "mine"),
        "sft": sft,
        "grpo": sft | {"num_generations": 4, "max_completion_length": 4},
    }
    done = papermill.execute_notebook(NOTEBOOK, tmp_path / "out.ipynb", given, progress_bar=False, cwd=str(ROOT))
    moved = re.fullmatch(r"([\d,]+) elements have moved, 0 of them outside the masks\n", done.cells[-1].outputs[0].text)
    assert int(moved[1].replace(",", "")) > 0
    return tmp_path / "mine"


def test_the_adapter_loads_merges_and_is_served(trained, saved_model, tmp_path):
    model, tokenizer = (
        AutoPeftModelForCausalLM.from_pretrained(trained / "adapter"),
        AutoTokenizer.from_pretrained(saved_model),
    )
    ids = tokenizer("t0 t5", return_tensors="pt").input_ids
    before = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids).logits, before)
    merged.save_pretrained(trained / "merged")
    tokenizer.save_pretrained(trained / "merged")
    asked = {"model": str(trained / "merged"), "messages": [{"role": "user", "content": "t5"}], "max_tokens": 4}
    with transformers_serve(trained / "merged", tmp_path / "serve.log") as address:
        answer = requests.post(f"{address}/chat/completions", json=asked, timeout=60).json()
    assert answer["choices"][0]["message"]["role"] == "assistant"
