"""The theta explorer shows what `build_partition` gives, and needs no network."""

import base64
import gzip
import html
import re

import pandas as pd
import pytest
import torch

from lorapar_utils.partition import build_partition
from lorapar_utils.records import from_scores, new_record, null_model
from lorapar_utils.records.intervals import Metric
from lorapar_utils.report import explorer, figures
from lorapar_utils.settings import load_profile


@pytest.fixture(scope="module")
def scores():
    generator = torch.Generator().manual_seed(0)
    names = [
        f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{matrix}.default.weight"
        for layer in range(3)
        for module in ("q_proj", "v_proj")
        for matrix in "AB"
    ]
    return [{name: torch.rand(4, 6, generator=generator) ** 4 for name in names} for _ in range(2)]


@pytest.fixture(scope="module")
def record(scores):
    return from_scores.importance_record(scores, build_partition(*scores, theta=0.9), load_profile("smoke"))


def test_counts_are_those_of_the_partition_at_each_setting(scores, record):
    counts = pd.DataFrame(record.result["tables"]["explorer"])
    for theta, i, share in ((0.9, 4, 1.0), (0.5, 1, 0.25), (1.0, 0, 0.0)):
        partition = build_partition(*scores, theta=theta, alpha=share, beta=share)
        rows = counts[counts["theta"] == theta]
        assert rows["elements"].sum() == 12 * 24
        for k in (1, 2):
            assert rows[f"stage{k}_{i}"].sum() == partition.active[k - 1].sum()
        for region, mask in partition.regions().items():
            if region != "inactive":
                assert rows[region].sum() == mask.sum()
        first = [name for name in partition.shapes if ".1.self_attn.v_proj" in name]
        wanted = sum(int(partition.stage_mask(1)[name].sum()) for name in first)
        assert rows[(rows["layer"] == 1) & (rows["module"] == "v_proj")][f"stage1_{i}"].item() == wanted


def test_beside_the_partition_stand_the_null_model_and_what_training_found(record):
    def arm(seed, right, **more):
        asked = explorer.PLAIN_ARM | {"theta": 0.9} | more
        metrics = {"stage1/system1": Metric(right, 40), "stage1/loss1": Metric(0.1, 40)}
        return new_record(f"a-seed{seed}", load_profile("smoke"), metrics=metrics, parameters=asked)

    arms = [arm(0, 0.5), arm(1, 0.7), arm(0, 0.1, selection="swapped"), arm(0, 0.2, theta=0.5)]
    arms += [arm(0, 0.1, stages=["sft", "grpo"]), arm(0, 0.1, flipped=0.5), arm(0, 0.1, alpha=0.5)]
    texts = explorer._beside(record, arms, [0.3, 0.5, 0.9]).set_index("theta")["text"]
    null = null_model.without_systems(record, [0.9])
    assert f"without two systems: {null['active'].min():.0%} to {null['active'].max():.0%} a system" in texts[0.9]
    assert texts[0.9].endswith("System 1 after stage 1: 60.0%,\nloss 0.100 (2 blocks)")
    assert texts[0.5].endswith("20.0%,\nloss 0.100 (1 block)") and texts[0.3].endswith("not trained at this theta")


def test_the_chart_is_one_block_of_html_that_fetches_nothing_and_has_a_picture_for_readers_without_scripts(record):
    figures.plt.close("all")  # other tests' figures
    shown = explorer.Page(explorer.theta_explorer(record), figures.importance_map(record), 'A "map"')._repr_html_()
    packed = re.findall(r"'(H4sI[\w+/=]+)'", html.unescape(shown))
    library, chart = (gzip.decompress(base64.b64decode(script)).decode() for script in packed)
    assert "window.vegaEmbed" in library and "vegaEmbed('#vis'" in chart and len(shown) < len(library)
    for text in (shown, library, chart):
        assert not re.search(r'(src|href)="https?:', text) and "cdn." not in text.replace("cdn.jsdelivr.net/npm", "")
    assert shown.startswith('<iframe title="A &quot;map&quot;"') and len(shown) < 2_000_000
    assert '<noscript><img alt="A &quot;map&quot;"' in html.unescape(shown)
    assert not figures.plt.get_fignums()
