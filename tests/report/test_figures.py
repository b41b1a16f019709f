"""What figures show, read back from what was drawn and held against the records: data, not pixels."""

import itertools
import re
import shutil
from copy import deepcopy
from dataclasses import replace

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.colors import to_hex, to_rgb

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, study
from lorapar_utils.report import drawing, figures, tables

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def published():
    return figures.published()


@pytest.fixture(autouse=True)
def style():
    drawing.use_style()
    yield
    drawing.use_style()  # not a column's, for other tests
    plt.close("all")


def lines(axes):
    """Label -> (x, y) of every line with a label."""
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def error_bars(axes):
    """(x, y) of every point with an error bar."""
    return {tuple(np.round(xy, 6)) for bars in axes.containers for xy in bars.lines[0].get_xydata()}


def colours(figure):
    """Label -> colour of every line with a label, also of those with error bars."""
    handles = {label: handle for axes in figure.axes for label, handle in drawing.handles_of(axes).items()}
    handles = {label: handle[0] if isinstance(handle, tuple) else handle for label, handle in handles.items()}
    return {label: to_hex(handle.get_color()) for label, handle in handles.items() if hasattr(handle, "get_color")}


def box(text):
    """Where the words of a drawn text are; its own method counts the line to an annotation's point too."""
    return matplotlib.text.Text.get_window_extent(text)


def nothing_is_cut_off(figure):
    left, bottom, right, top = figure.get_tightbbox().extents
    return left >= 0 and bottom >= 0 and right <= figure.get_figwidth() and top <= figure.get_figheight()


def covering(texts):
    """Pairs of texts of which one covers a part of the other."""
    boxes = {text.get_text(): box(text) for text in texts if text.get_text()}
    return [pair for pair in itertools.combinations(boxes, 2) if boxes[pair[0]].overlaps(boxes[pair[1]])]


def arm(title, seed, losses, **parameters):
    """A record of one block of an arm, with these losses of steps 1, 2, …"""
    usual = {"title": title, "method": "lorapar", "selection": "importance", "measured_on": "test", "stages": ["sft"]}
    log = [{"step": step, "loss": float(loss)} for step, loss in enumerate(losses, 1)]
    run = {"seed": seed, "parameters": usual | parameters}
    return Record(run=run, result={"metrics": {}, "tables": {"history_stage1": log}}, environment={})


def test_votes_by_steps_draws_every_teacher_and_the_majority(published):
    rows = pd.DataFrame(published["voting"].result["tables"]["by_steps"])
    axes = figures.votes_by_steps(published["voting"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == rows.query("teacher == 'majority'")["system2_share"].tolist()
    drawn = lines(axes)
    assert drawn.keys() == set(rows["teacher"]) - {"majority"}
    for teacher, points in drawn.items():
        assert points[:, 1].tolist() == rows[rows["teacher"] == teacher]["system2_share"].tolist()


def test_votes_by_steps_leaves_a_gap_where_the_majority_decided_nothing(published):
    voting = published["voting"]
    rows = pd.DataFrame(voting.result["tables"]["by_steps"])
    most = rows["steps"].max()
    left = rows[(rows["teacher"] != "majority") | (rows["steps"] != most)].to_dict("records")
    record = replace(voting, result={**voting.result, "tables": {**voting.result["tables"], "by_steps": left}})
    axes = figures.votes_by_steps(record).axes[0]
    assert len(axes.patches) == len(rows["steps"].unique()) - 1
    assert all(points[-1, 0] == len(rows["steps"].unique()) - 1 for points in lines(axes).values())


def test_the_partition_of_one_module_is_one_panel(published):
    record = published["importance"]
    rows = [row for row in record.result["tables"]["map"] if row["module"] == "q_proj"]
    one = replace(record, result={**record.result, "tables": {**record.result["tables"], "map": rows}})
    assert [axes.get_title() for axes in figures.partition_map(one).axes] == ["q"]


def test_importance_map_is_the_mean_of_a_and_b_and_their_difference(published):
    rows = pd.DataFrame(published["importance"].result["tables"]["map"])
    first, second, gap = (
        axes.collections[0].get_array() for axes in figures.importance_map(published["importance"]).axes[:3]
    )
    order = [module for module in figures.MODULES if module in set(rows["module"])]
    means = rows.groupby(["layer", "module"])["system1"].mean().unstack()[order]
    np.testing.assert_allclose(first, means)
    np.testing.assert_allclose(np.ravel(gap), np.ravel(second) - np.ravel(first))


def test_a_second_record_is_drawn_under_the_first_with_both_runs_named(published):
    record = published["importance"]
    run = record.run | {"profile": "mine", "name": "importance-theta_0.8", "parameters": {"theta": 0.8}}
    other = Record(run=run, result=record.result, environment=record.environment)
    figure = figures.importance_map(record, other)
    assert len(figure.subfigs) == 2 and len(figure.axes) == 2 * len(figures.importance_map(record).axes)
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert titles == ["profile study", "profile mine, theta 0.8"]


def test_partition_map_stacks_what_each_layer_selects_up_to_one(published):
    rows = pd.DataFrame(published["importance"].result["tables"]["map"])
    figure = figures.partition_map(published["importance"])
    assert [axes.get_title() for axes in figure.axes] == ["q", "k", "v", "gate", "up", "down"]
    regions = ("system1_only", "shared", "system2_only", "inactive")
    total = dict.fromkeys(regions, 0.0)
    for axes in figure.axes:
        outlines = [outline.get_data() for outline in axes.patches]
        assert [to_hex(outline.get_facecolor()).upper() for outline in axes.patches] == [
            figures.REGION_COLOURS[region] for region in regions
        ]
        widths = np.array([outline.values - outline.baseline for outline in outlines])
        np.testing.assert_allclose(widths.sum(axis=0), 1)
        np.testing.assert_allclose(outlines[0].baseline, 0)
        for before, after in itertools.pairwise(outlines):
            np.testing.assert_allclose(before.values, after.baseline)
        for layer, bar in enumerate(widths.T):
            a, b = rows[(rows["module"] == f"{axes.get_title()}_proj") & (rows["layer"] == layer)].to_dict("records")
            elements = a["elements"] + b["elements"]
            expected = [(a["elements"] * a[key] + b["elements"] * b[key]) / elements for key in regions]
            np.testing.assert_allclose(bar, expected, atol=1e-6)  # the record's shares are rounded
            for key, share in zip(regions, expected, strict=True):
                total[key] += elements * share / rows["elements"].sum()
    (legend,) = figure.subfigs[0].legends
    names = ("System 1 only", "both", "System 2 only", "neither")
    words = [f"{name} {100 * total[key]:.0f} %" for name, key in zip(names, regions, strict=True)]
    assert [text.get_text() for text in legend.get_texts()] == words


def test_arm_curves_are_the_mean_over_blocks_of_running_means_between_the_extremes():
    losses = np.random.default_rng(0).uniform(0.1, 2, (3, 20))
    records = [arm("LoRA-PAR", seed, losses[seed]) for seed in range(3)]
    records += [arm("one block", 0, losses[0], method="lora"), arm("tuned", 100, losses[1], measured_on="validation")]
    axes = figures.arm_curves(records).axes[0]
    drawn = lines(axes)
    assert drawn.keys() == {"LoRA-PAR (3 blocks)", "one block (1 block)"} and axes.get_yscale() == "log"
    smooth = [[block[end - 8 : end].mean() for end in range(8, 21)] for block in losses]
    assert drawn["LoRA-PAR (3 blocks)"][:, 0].tolist() == list(range(8, 21))
    np.testing.assert_allclose(drawn["LoRA-PAR (3 blocks)"][:, 1], np.mean(smooth, axis=0))
    np.testing.assert_allclose(drawn["one block (1 block)"][:, 1], smooth[0])
    band = axes.collections[0].get_paths()[0].vertices
    for step, low, high in zip(range(8, 21), np.min(smooth, axis=0), np.max(smooth, axis=0), strict=True):
        ends = band[band[:, 0] == step][:, 1]
        np.testing.assert_allclose([ends.min(), ends.max()], [low, high])
    assert "no arm of the study" in figures.arm_curves([records[-1]]).axes[0].texts[0].get_text()


def test_an_arm_has_the_same_colour_in_every_figure(published):
    found = colours(figures.tuning(figures.tuned_records(study(), "sft")))
    found |= {
        label.partition(" (")[0]: colour for label, colour in colours(figures.arm_curves(study().values())).items()
    }
    found |= colours(figures.theta_curve(figures.stage1_records(published)))
    same = {
        "#0072b2": ("importance", "LoRA-PAR, theta 0.9"),
        "#d55e00": ("System 2's elements, theta 0.9",),
        "#cc79a7": ("random within each matrix, size of theta 0.9",),
        "#e69f00": ("random, size of theta 0.9",),
        "#222222": ("all elements", "LoRA, r = 8"),
        "#888888": ("all elements, r = 3", "LoRA, r = 3"),
        "#56b4e9": ("LoRA, PEFT's initialisation",),
    }
    assert {label: found[label] for labels in same.values() for label in labels} == {
        label: colour for colour, labels in same.items() for label in labels
    }
    # No other score or method takes a colour of theirs, and no two methods look alike.
    named = {
        "importance",
        "all elements",
        "LoRA",
        "LoRA + RL",
        "LoRA-PAR over LoRA",
        "magnitude",
        *tables.CONTROLS.values(),
    }
    others = {
        colour.lower() for label, colour in figures.ARM_COLOURS.items() if label not in named and "," not in label
    }
    assert others and not others & same.keys()


def test_rates_of_stage_2_are_drawn_with_the_best_circled_and_those_without_kl_as_crosses():
    def tried(rate, accuracy, kl=0.04):
        title = f"LoRA, r = 8, {f'rate of stage 2 {rate}' if kl else 'KL 0'}"
        values = {"title": title, "method": "lora", "stages": ["sft", "grpo"], "grpo_learning_rate": rate, "kl": kl}
        metrics = {"stage2/accuracy": {"value": accuracy, "n": 400}}
        return Record(
            run={"seed": 100, "parameters": values}, result={"metrics": metrics, "tables": {}}, environment={}
        )

    records = [tried(1e-4, 0.25), tried(2e-4, 0.5), tried(4e-4, 0.125), tried(2e-4, 0.375, kl=0.0)]
    line, circle, cross = figures.tuning_of_stage2(records).axes[0].lines
    assert line.get_xydata().tolist() == [[1e-4, 25], [2e-4, 50], [4e-4, 12.5]] and line.get_label() == "LoRA, r = 8"
    assert circle.get_xydata().tolist() == [[2e-4, 50]] and cross.get_xydata().tolist() == [[2e-4, 37.5]]
    assert "no learning rate" in figures.tuning_of_stage2([]).axes[0].texts[0].get_text()


def test_two_thetas_of_one_selection_differ_in_their_dashes():
    axes = figures.arm_curves([arm("theta 0.9", 0, [1.0] * 9), arm("theta 0.5", 0, [2.0] * 9)]).axes[0]
    first, second = axes.lines
    assert first.get_color() == second.get_color() and first.get_linestyle() != second.get_linestyle()


@pytest.mark.parametrize("column", [None, "double"])
@pytest.mark.parametrize(
    "name",
    ["votes_by_steps", "tuning", "theta_curve", "arm_curves"],
)
def test_each_line_has_its_label_beside_its_end(name, column, published):
    drawing.use_style(column)
    figure = figures.FIGURES[name](published)
    figure.draw_without_rendering()
    axes = figure.axes[-1]
    labels = {text.get_text().replace("\n", " "): text for text in axes.texts if hasattr(text, "arrow_patch")}
    assert labels.keys() == drawing.handles_of(axes).keys() and len(labels) >= 2
    for label, colour in colours(figure).items():
        text = labels[label].get_color()
        assert text == drawing._readable(colour) and 1.05 / (drawing._luminance(np.array(text)) + 0.05) >= 4.5
        np.testing.assert_allclose(np.outer(text, to_rgb(colour)), np.outer(to_rgb(colour), text))  # one hue
    assert covering(labels.values()) == []
    assert min(box(text).x0 for text in labels.values()) >= axes.get_window_extent().x1


@pytest.mark.parametrize("column", [None, "double"])
@pytest.mark.parametrize("count", [9, 16])
def test_labels_of_lines_that_end_in_one_point_are_moved_apart(count, column):
    drawing.use_style(column)
    records = [arm(f"arm {'of a long name ' * (number % 4)}{number}", 0, [1, *[0.5] * 8]) for number in range(count)]
    figure = figures.arm_curves(records)
    figure.draw_without_rendering()
    labels = figure.axes[0].texts
    assert len(labels) == count and covering(labels) == [] and nothing_is_cut_off(figure)


def test_theta_curve_has_one_point_for_each_setting(published):
    records = figures.stage1_records(published)
    points = tables.theta_points(records)
    drawn = set.union(*(error_bars(axes) for axes in figures.theta_curve(records).axes))
    assert drawn == {(round(p["active"], 6), round(p["metric"].value, 6)) for p in points} and len(points) >= 5


def test_learning_curves_are_the_logs(published):
    record = published["lorapar-seed0"]
    axes = {panel.get_title(): panel for panel in figures.learning_curves(record).axes}
    for title, stage, key in (("SFT loss\n(nats a token)", "stage1", "loss"), ("GRPO reward", "stage2", "reward")):
        log = record.result["tables"][f"history_{stage}"]
        expected = [(row["step"], float(row[key])) for row in log if key in row]
        assert [tuple(xy) for xy in axes[title].lines[0].get_xydata()] == expected and len(expected) >= 20
    assert "validation accuracy" not in axes
    watched = deepcopy(record)
    for row in watched.result["tables"]["history_stage2"][:4]:
        row |= {"validation/system1": 0.5, "validation/system2": 0.25}
    panel = {axes.get_title(): axes for axes in figures.learning_curves(watched).axes}["validation accuracy"]
    assert lines(panel)["System 2"][:, 1].tolist() == [0.25] * 4 and len(lines(panel)["System 1"]) == 4


def test_learning_curves_have_a_panel_for_what_was_logged_alone(published):
    assert not figures.learning_curves(published["base-seed0"]).axes
    titles = [panel.get_title() for panel in figures.learning_curves(study()["lora_sft-seed0"]).axes]
    assert titles == ["SFT loss\n(nats a token)"]


def test_stage_accuracy_has_a_tick_for_each_seed_and_their_mean(published):
    records = figures.main_records(published)
    axes = figures.stage_accuracy(records).axes[0]
    ticks = [line.get_xdata() for line in axes.lines if line.get_marker() == "|"]
    metrics = [record.metrics for record in records]
    keys = [f"{stage}/system{k}" for stage in tables.STAGES for k in (1, 2)]
    values = [metric[key].value for metric in metrics for key in keys if key in metric]
    np.testing.assert_allclose(sorted(np.concatenate(ticks)), sorted(values), atol=1e-6)
    means = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in figures.MARKERS[:2]]
    np.testing.assert_allclose(sorted(means), sorted(tick.mean() for tick in ticks), atol=1e-6)


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_labelled_and_readable(name, published):
    figure = figures.FIGURES[name](published)
    figure.canvas.draw()
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 8
    assert nothing_is_cut_off(figure)
    for axes in figure.axes:
        assert not axes.axison or axes.get_xlabel() or axes.get_title() or axes.get_ylabel()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_a_pdf_is_as_wide_as_its_column_and_nothing_is_cut_off(name, published, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    paths = figures.save_all(published, tmp_path, [name], ["pdf"])
    assert [path.name for path in paths] == [f"{name}-single.pdf", f"{name}-double.pdf"]
    for path, figure, width in zip(paths, drawn, (3.25, 6.75), strict=True):
        page = path.read_bytes()
        (box,) = re.findall(rb"/MediaBox \[([^]]*)\]", page)
        assert [float(number) for number in box.split()] == [
            0,
            0,
            72 * width,
            pytest.approx(72 * figure.get_figheight()),
        ]
        assert b"/FontFile2" in page and b"/Type3" not in page
        assert nothing_is_cut_off(figure) and figure.get_figheight() < 10
        texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in texts) >= 5.5
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            assert covering([tick.label1 for tick in ticks if tick.label1.get_visible()]) == []


def test_the_same_records_give_the_same_bytes(published, tmp_path):
    first, second = (figures.save_all(published, tmp_path / run, ["importance_scatter"]) for run in ("first", "second"))
    assert [path.suffix for path in first] == [".svg", ".png", ".pdf", ".pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_one_style_whatever_was_set_before():
    plt.rcParams.update({"font.size": 3, "axes.facecolor": "black", "font.family": "serif"})
    drawing.use_style()
    assert plt.rcParams["font.size"] == 11 and plt.rcParams["axes.facecolor"] == "white"
    assert plt.rcParams["font.family"] == ["DejaVu Sans"]
    assert [(drawing.use_style(column), plt.rcParams["font.size"])[1] for column in ("single", "double", None)] == [
        7,
        8,
        11,
    ]
    # Okabe and Ito's colours are told apart by every common kind of colour vision; systems and regions use them too.
    safe = {colour["color"].upper().lstrip("#") for colour in plt.rcParams["axes.prop_cycle"]} | {"BBBBBB"}
    used = {*figures.SYSTEM_COLOURS.values(), *figures.REGION_COLOURS.values()}
    assert {to_hex(colour).upper().lstrip("#") for colour in used} <= safe


def test_pipeline_fills_the_boxes_that_it_is_told_and_no_others():
    figure = figures.pipeline("stage1", "theta")
    filled = [box for box in figure.axes[0].patches if to_hex(box.get_facecolor()) != "#ffffff"]
    assert len(filled) == 2
    with pytest.raises(InputError, match="no box votes; use data, voting"):
        figures.pipeline("votes")


def test_one_figure_in_another_format(tmp_path, capsys):
    command = [str(tmp_path), "--only", "theta_curve", "--formats", "eps", "jpg"]
    assert figures.main(command) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theta_curve.eps", "theta_curve.jpg"]
    with pytest.raises(SystemExit):
        figures.main([*command[:2], "theta_curv"])
    assert "invalid choice: 'theta_curv'" in capsys.readouterr().err


def test_a_command_that_draws_nothing_fails_and_says_which_record_is_missing(tmp_path, capsys):
    records = tmp_path / "records"
    records.mkdir()
    shutil.copy(ROOT / "results" / "laptop" / "base-seed0.json", records)
    command = [str(tmp_path / "figures"), "--records", str(records), "--only", "importance_map"]
    assert figures.main(command) == 1
    assert "importance_map: skipped, there is no record 'importance'" in capsys.readouterr().out
    assert not list((tmp_path / "figures").iterdir())
