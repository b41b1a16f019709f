"""What the guide and the launch files tell a reader to do, done."""

import json
import re

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from lorapar_utils.pipeline.experiment import experiment
from lorapar_utils.settings import load_profile
from lorapar_utils.voting import split

GUIDE = (ROOT / "book" / "reuse.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE, re.S)


@pytest.mark.parametrize("text", blocks("yaml"), ids=lambda text: text.split("\n")[1].strip(":"))
def test_every_profile_that_the_guide_shows_is_valid(project, text):
    (project / "profiles" / "mine.yaml").write_text(text)
    assert load_profile("mine").profile == "mine"


def gsm8k_like(folder):
    folder.mkdir()
    for name, count in (("train", 60), ("test", 12)):
        rows = [
            {"question": f"{name}: t{i} and t{i % 7}?", "answer": "\n".join(["t1 t2"] * (1 + i % 4)) + f"\n#### {i}"}
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_the_worked_example_runs(project, saved_model):
    """A model folder, data in GSM8K's layout and recorded votes, as the guide says, through both stages of training."""
    example = blocks("yaml")[0]
    for shown, real in (
        ("/path/to/model", saved_model),
        ("/path/to/gsm8k", gsm8k_like(project / "gsm8k")),
        ("votes.csv", project / "votes.csv"),
    ):
        assert shown in example
        example = example.replace(shown, str(real))
    (project / "profiles" / "mine.yaml").write_text(example)
    exec(blocks("python")[0], {})
    to_sort = pd.read_csv("to_sort.csv")
    assert len(to_sort) == 48
    to_sort.assign(system=[1 + i % 2 for i in range(48)])[["id", "system"]].to_csv("votes.csv", index=False)
    assert split.main(["mine"]) == 0
    settings = load_profile("mine", model={"dtype": "float32"})
    assert {system: len(rows) for system, rows in split.systems(settings).items()} == {1: 24, 2: 24}
    record = experiment(settings, "lorapar", 0)
    assert {"stage1/accuracy", "stage2/accuracy"} <= record.result["metrics"].keys()
    assert (settings.runs / "experiments" / "lorapar-seed0" / "stage2" / "adapter").is_dir()


def test_launch_files_install_the_lock_and_nothing_else():
    binder = (ROOT / ".binder" / "requirements.txt").read_text()
    colab = "".join("".join(c["source"]) for c in json.loads((ROOT / ".binder" / "colab.ipynb").read_text())["cells"])
    for text in (binder, colab, (ROOT / ".github" / "workflows" / "book.yml").read_text()):
        assert "requirements.lock" in text and not re.search(r"==\d", text)
    assert (ROOT / ".binder" / "runtime.txt").read_text().strip() == "python-3.11"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "book.yml").read_text())
    assert workflow["jobs"].keys() == {"build", "publish"}
