"""What figures show, read back from what was drawn and held against the records: data, not pixels."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from lorapar_utils.errors import InputError
from lorapar_utils.records import Record, evidence, pooled
from lorapar_utils.report import figures, tables

matplotlib.use("Agg")


@pytest.fixture(scope="module")
def published():
    return pooled(evidence())


@pytest.fixture(autouse=True)
def style():
    figures.use_style()
    yield
    plt.close("all")


def lines(axes):
    """Label -> (x, y) of every line with a label."""
    return {line.get_label(): line.get_xydata() for line in axes.lines if not line.get_label().startswith("_")}


def error_bars(axes):
    """(x, y) of every point with an error bar."""
    return {tuple(np.round(xy, 6)) for bars in axes.containers for xy in bars.lines[0].get_xydata()}


def test_votes_by_steps_draws_every_teacher_and_the_majority(published):
    rows = pd.DataFrame(published["voting"].result["tables"]["by_steps"])
    axes = figures.votes_by_steps(published["voting"]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == rows.query("teacher == 'majority'")["system2_share"].tolist()
    drawn = lines(axes)
    assert drawn.keys() == set(rows["teacher"]) - {"majority"}
    for teacher, points in drawn.items():
        assert points[:, 1].tolist() == rows[rows["teacher"] == teacher]["system2_share"].tolist()


def test_importance_map_is_the_mean_of_a_and_b_and_their_difference(published):
    rows = pd.DataFrame(published["importance"].result["tables"]["map"])
    first, second, gap = (
        axes.collections[0].get_array() for axes in figures.importance_map(published["importance"]).axes[:3]
    )
    means = rows.groupby(["layer", "module"], sort=False)[["system1", "system2"]].mean()
    assert first.size == len(means)
    np.testing.assert_allclose(np.ravel(first), means["system1"])
    np.testing.assert_allclose(np.ravel(gap), np.ravel(second) - np.ravel(first))


def test_a_second_record_is_drawn_under_the_first_with_both_profiles_named(published):
    record = published["importance"]
    other = Record(run={**record.run, "profile": "mine"}, result=record.result, environment=record.environment)
    figure = figures.importance_map(record, other)
    assert len(figure.subfigs) == 2 and len(figure.axes) == 2 * len(figures.importance_map(record).axes)
    titles = [part._suptitle.get_text() for part in figure.subfigs]
    assert titles == ["profile cpu", "profile mine"]


def test_theta_curve_has_one_point_for_each_setting(published):
    records = figures.stage1_records(published)
    points = tables.theta_points(records)
    drawn = set.union(*(error_bars(axes) for axes in figures.theta_curve(records).axes))
    assert drawn == {(round(p["active"], 6), round(p["metric"].value, 6)) for p in points} and len(points) >= 8


def test_learning_curves_are_the_logs(published):
    record = published["lorapar-seed0"]
    axes = {panel.get_title(): panel for panel in figures.learning_curves(record).axes}
    for title, stage, key in (("SFT loss", "stage1", "loss"), ("GRPO reward", "stage2", "reward")):
        log = record.result["tables"][f"history_{stage}"]
        expected = [(row["step"], float(row[key])) for row in log if key in row]
        assert [tuple(xy) for xy in axes[title].lines[0].get_xydata()] == expected and len(expected) >= 20
    watched = [row for rows in record.result["tables"].values() for row in rows if "validation/system2" in row]
    assert len(lines(axes["validation accuracy"])["System 2"]) == len(watched) >= 4


def test_stage_accuracy_shows_every_system_of_every_stage(published):
    records = figures.main_records(published)
    x = sorted(x for x, _ in error_bars(figures.stage_accuracy(records).axes[0]))
    metrics = [record.result["metrics"] for record in records]
    values = [
        m[f"{s}/system{k}"]["value"] for m in metrics for s in figures.STAGES for k in (1, 2) if f"{s}/system{k}" in m
    ]
    np.testing.assert_allclose(x, sorted(values), atol=1e-6)


def test_pareto_front_is_what_nothing_beats(published):
    records = list(published.values())
    points = tables.cost_points(records)
    axes = figures.pareto(records).axes[0]
    assert error_bars(axes) == {(round(p.active, 6), round(p.value, 6)) for p in points.itertuples()}
    front = next(line for line in axes.lines if line.get_drawstyle() == "steps-post").get_xydata()
    for active, value in front:
        assert not ((points["active"] <= active) & (points["value"] > value)).any()


@pytest.mark.parametrize("name", figures.FIGURES)
def test_every_figure_is_labelled_and_readable(name, published):
    figure = figures.FIGURES[name](published)
    figure.canvas.draw()
    texts = [t for t in figure.findobj(matplotlib.text.Text) if t.get_text().strip() and t.get_visible()]
    assert texts and min(t.get_fontsize() for t in texts) >= 8
    for axes in figure.axes:
        assert not axes.axison or axes.get_xlabel() or axes.get_title() or axes.get_ylabel()


def test_one_style_whatever_was_set_before():
    plt.rcParams.update({"font.size": 3, "axes.facecolor": "black", "font.family": "serif"})
    figures.use_style()
    assert plt.rcParams["font.size"] == 11 and plt.rcParams["axes.facecolor"] == "white"
    assert plt.rcParams["font.family"] == ["DejaVu Sans"]
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
