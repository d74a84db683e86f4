"""What the figures must show, and what they must never do to a verdict."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from hypothesis import given, strategies as st
from matplotlib import cbook
from matplotlib.colors import to_rgb

from pytest_qsa.captures.capture import Capture
from pytest_qsa.captures.sites import SiteNumbers
from pytest_qsa.metrics import Bounds, Query, Series
from pytest_qsa.report.plots import style
from pytest_qsa.report.plots.curves import curves_of
from pytest_qsa.report.plots.depth import depth_of
from pytest_qsa.report.plots.figures import draw, judged_layers, value_figure
from pytest_qsa.report.plots.magnitudes import magnitude_figure, outlier_figure
from pytest_qsa.report.plots.style import GROUP_STYLES, safe_text
from pytest_qsa.verdicts.verdict import Kind, Row, Verdict
from support.captures import statistics
from support.judged import judge_bounds

BLOCKS = r"layers\.\d+$"


def numbers_of(tokens):
    """Return the numbers of a site whose token-wise maxima are [samples, positions]."""
    samples, positions = tokens.shape
    peaks = np.argsort(-tokens, axis=1)[:, :4].astype(np.int32)
    return SiteNumbers(
        "float32", (positions, 8), True, statistics("tokens", "sinks"), np.arange(samples, dtype=np.int32),
        np.zeros(samples, np.int32), np.full(samples, positions),
        {"token_max": tokens.astype(np.float32).ravel(), "peaks": peaks, "peak_channels": np.full_like(peaks, 5)},
    )  # fmt: skip


def capture_of(maxima, name="model.layers.{}", pieces=None):
    """Return a capture of block outputs whose token-wise maxima are [layers, samples, positions]."""
    layers = [name.format(index) for index in range(len(maxima))]
    sites = {(layer, "output"): numbers_of(tokens) for layer, tokens in zip(layers, maxima, strict=True)}
    ids = np.arange(maxima.shape[2], dtype=np.int32)
    return Capture(sites, tuple(layers), tuple(layers), (ids,) * maxima.shape[1], pieces or {})


def maxima_of(layers, outliers=(), samples=2, positions=20):
    """Return maxima between 1 and 2, and at each (layer, sample, position) of `outliers` 500."""
    maxima = np.random.default_rng(0).uniform(1, 2, (layers, samples, positions))
    for place in outliers:
        maxima[place] = 500.0
    return maxima


def by_gid(figure, gid):
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def texts_of(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def drifted(layers, moved):
    """Return the verdict on `layers` values around a baseline of 10 ± 1, those in `moved` at their own values."""
    values = {index: moved.get(index, 10.0) for index in range(layers)}
    rows = [
        Row(f"model.layers.{i}", value, 9.0, 11.0, 10.0, value - 11 if value > 11 else min(value - 9, 0.0))
        for i, value in values.items()
    ]
    query = {
        "metric": "magnitude",
        "parameters": {"stat": "median"},
        "site": "output",
        "layers": BLOCKS,
        "reduce": "mean",
    }
    return Verdict("drift", "m", Kind.REGRESSION, "", query, sorted(rows, key=lambda row: -abs(row.excess)))


def test_the_bound_is_drawn_and_exactly_the_layers_out_of_bounds_are_marked_at_their_depth():
    capture = capture_of(maxima_of(30, [(7, 0, 3), (12, 1, 4), (12, 1, 5)]))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=0))

    figure = value_figure(verdict, capture)

    (bound,) = by_gid(figure, "bound-max")
    (marks,) = by_gid(figure, "out-of-bounds")
    assert set(bound.get_ydata()) == {0}
    assert marks.get_xydata().tolist() == [[7, 1], [12, 2]]
    assert any("out of bounds: 2 of 30 (7, 12)" in text for text in texts_of(figure))
    assert "layer 12: 2" in texts_of(figure)
    assert figure.axes[0].get_xlabel() == "model.layers.*"


@pytest.mark.parametrize(
    ("bounds", "drawn"),
    [(Bounds(min=1, max=9), ["max 9", "min 1"]), (Bounds(equals=2), ["equals 2"]), (Bounds(max=30000), ["max 30000"])],
)
def test_every_bound_is_drawn_within_the_axes_and_named(bounds, drawn):
    capture = capture_of(maxima_of(4))
    figure = value_figure(judge_bounds(capture.output(BLOCKS).outlier_ratio(), bounds), capture)
    figure.canvas.draw()

    low, high = figure.axes[0].get_ylim()
    lines = by_gid(figure, "bound-max") + by_gid(figure, "bound-min")
    assert all(low < line.get_ydata()[0] < high for line in lines)
    assert [text for text in texts_of(figure) if text in drawn] == drawn


def test_a_baseline_is_drawn_with_its_band_and_how_much_of_it_each_layer_has_used():
    capture = capture_of(maxima_of(6))

    figure = value_figure(drifted(6, {2: 8.5, 4: 12.0}), capture)

    (baseline,), (band,), (marks,) = (by_gid(figure, gid) for gid in ("baseline", "band", "out-of-bounds"))
    assert baseline.get_ydata().tolist() == [10.0] * 6
    assert {9.0, 11.0} <= set(band.get_paths()[0].vertices[:, 1])
    assert marks.get_xdata().tolist() == [2, 4]
    assert [bar.get_height() for bar in by_gid(figure, "used")] == pytest.approx([0, 0, -150, 0, 200, 0])
    assert "layer 4: 12, baseline 10" in texts_of(figure)


def test_a_verdict_over_all_layers_shows_the_layers_that_it_was_folded_from():
    capture = capture_of(maxima_of(5, [(1, 0, 2), (3, 0, 2)]))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens().folded("sum"), Bounds(max=1))

    figure = value_figure(verdict, capture)

    assert [bar.get_height() for bar in by_gid(figure, "values")] == [0, 1, 0, 1, 0]
    assert any("sum over them 2, bound: max 1" in text for text in texts_of(figure))
    assert not by_gid(figure, "bound-max")


@pytest.mark.parametrize("name", ["model.layers.{}", "block{}.an_unusually_long_name_of_a_projection"])
def test_no_tick_label_touches_another_at_100_layers(name):
    capture = capture_of(maxima_of(100, samples=1), name)
    figure = value_figure(judge_bounds(capture.output(".").outlier_ratio(), Bounds(max=1)), capture)
    figure.canvas.draw()

    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    assert 8 <= len(labels) <= 25
    if not labels[0].get_rotation():
        assert all(a.get_window_extent().x1 < b.get_window_extent().x0 for a, b in pairwise(labels))
    else:
        assert all(
            b.get_window_extent().x1 - a.get_window_extent().x1 > labels[0].get_fontsize() for a, b in pairwise(labels)
        )


def test_several_kinds_of_layers_get_lines_that_differ_without_colour_and_equal_ones_share_one():
    capture = capture_of(maxima_of(8))
    kinds = ("q_proj", "k_proj", "down_proj")
    sites = {
        (f"{layer}.{kind}", "input"): numbers if kind != "down_proj" else numbers_of(maxima_of(1)[0] + index)
        for index, ((layer, _), numbers) in enumerate(capture.sites.items())
        for kind in kinds
    }
    capture = replace(capture, sites=sites, modules=tuple(layer for layer, _ in sites))
    figure = value_figure(judge_bounds(capture.input("proj$").outlier_ratio(), Bounds(max=9)), capture)

    lines = by_gid(figure, "values")
    assert [line.get_label() for line in lines] == ["q_proj = k_proj", "down_proj"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 2


def test_experts_and_names_without_numbers_have_a_place_on_the_axis():
    experts = depth_of([f"layers.{block}.experts.{expert}.down" for block in range(3) for expert in range(40)])
    assert (experts.label, set(experts.x)) == ("layers.*.experts.*.down", {0, 1, 2})
    assert depth_of(["encoder.embed", "encoder.norm", "head"]).x == (0, 1, 2)
    assert depth_of(["model.layers.3.mlp", "model.layers.17.mlp"]).short(1) == "17"


def test_the_styles_of_kinds_can_be_told_apart_in_greyscale():
    assert len({marker for _, marker, _ in GROUP_STYLES}) == len({str(dash) for *_, dash in GROUP_STYLES}) == 6
    greys = sorted(float(np.dot(to_rgb(colour), (0.3, 0.59, 0.11))) for colour, *_ in GROUP_STYLES)
    assert greys[-1] < 0.6
    assert min(np.diff(greys)) > 0.07


def test_the_outliers_drawn_are_those_that_the_metric_counts():
    places = [(2, 0, 4), (2, 1, 4), (3, 0, 9)]
    capture = capture_of(maxima_of(8, places), pieces={4: "four", 9: "nine"})
    series = capture.output(BLOCKS).outlier_tokens(reduce="sum")

    figure = outlier_figure(judge_bounds(series, Bounds(max=9)), capture)

    layer, position, token = figure.axes
    assert {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in layer.patches} == {
        index: count for index, count in enumerate(series.values) if count
    }
    assert sorted(position.lines[0].get_xydata().tolist()) == [[4, 2], [9, 1]]
    assert [label.get_text() for label in token.get_yticklabels()] == ["“four”", "“nine”"]
    assert {text.get_text() for text in token.texts} == {"2", "1"}


def test_the_page_draws_the_same_outliers_and_magnitudes_as_the_pictures():
    capture = capture_of(maxima_of(4, [(1, 0, 0), (2, 0, 0), (2, 1, 7)]), pieces={0: "<s>", 7: "cat"})
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=9))
    curves = curves_of(verdict, capture)
    outliers = curves["outliers"]
    assert outliers["title"].startswith("3 outlier tokens above 64 × the median")
    assert outliers["lines"]["outlier tokens"] == [0, 1, 2, 0]
    assert [(bar["name"], bar["count"]) for bar in outliers["bars"][0]["bars"]] == [("“<s>”", 2), ("“cat”", 1)]
    magnitude = capture.output(BLOCKS).magnitude("top1")
    assert curves["magnitude"]["lines"]["top1"] == pytest.approx(magnitude.values, rel=1e-4)
    assert "value" not in curves  # its rows are on the page
    folded = judge_bounds(capture.output(BLOCKS).outlier_tokens().folded("sum"), Bounds(max=9))
    assert curves_of(folded, capture)["value"]["lines"] == {"outlier_tokens": [0.0, 1.0, 1.0, 0.0]}


def test_sinks_are_told_from_other_outliers_and_left_out_where_they_do_not_count():
    sinks = [(layer, sample, 0) for layer in range(2, 8) for sample in range(2)]
    capture = capture_of(maxima_of(8, [*sinks, (5, 0, 7)]))

    figure = outlier_figure(judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=1)), capture)
    without = outlier_figure(
        judge_bounds(capture.output(BLOCKS).outlier_tokens(positions="no_sink"), Bounds(max=1)), capture
    )

    assert {"other tokens: 1", "sinks: 12"} <= set(texts_of(figure))
    assert "other tokens: 1" in texts_of(without)
    assert any("positions without the sinks" in text for text in texts_of(without))
    assert not any(text.startswith("sinks:") for text in texts_of(without))


def test_token_texts_are_drawn_as_they_are_whatever_they_hold(tmp_path, monkeypatch):
    own = style.fonts()[:1]
    monkeypatch.setattr(style, "fonts", lambda: own)  # some machines have a font of CJK
    odd = ["$x^2$", "\x1b[0m", "\u202eabc", "日本", "a\u0301", "\n", "👍", "</script>", "a\\$b", "_" * 80]
    capture = capture_of(maxima_of(2, [(0, 0, i) for i in range(9)]), pieces=dict(enumerate(odd)))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=1))

    figure = outlier_figure(verdict, capture)
    draw(capture, verdict, tmp_path)  # warnings are errors: no glyph may be missing, no mathtext may fail

    labels = {label.get_text() for label in figure.axes[2].get_yticklabels()}
    assert {r"“\$x^2\$”", r"“\x1b[0m”", "“U+202Eabc”", "“U+65E5U+672C”", "“aU+0301”", r"“\n”", "“</script>”"} <= labels


@given(st.text())
def test_no_text_can_become_mathtext_or_hold_what_can_not_be_drawn(text):
    drawn = safe_text(text)
    assert not cbook.is_math_text(drawn)
    assert drawn.isprintable() or not drawn
    assert len(safe_text(text, 12).replace("\\$", "$")) <= 12


def test_the_magnitudes_are_those_of_the_capture_with_the_judged_one_in_front():
    capture = capture_of(maxima_of(6, [(2, 0, 3)]))
    series = capture.output(BLOCKS).magnitude("median")

    figure = magnitude_figure(judge_bounds(series, Bounds(max=1.9)), capture)

    lines = {stat: by_gid(figure, stat)[0] for stat in ("top1", "median", "min")}
    np.testing.assert_array_equal(lines["median"].get_ydata(), series.values)
    np.testing.assert_array_equal(lines["top1"].get_ydata(), capture.output(BLOCKS).magnitude("top1").values)
    assert max(lines, key=lambda stat: lines[stat].get_linewidth()) == "median"
    assert set(by_gid(figure, "bound")[0].get_ydata()) == {1.9}
    assert figure.axes[0].get_yscale() == "log"
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines.values()}) == 3
    (band,), top3 = by_gid(figure, "tops"), capture.output(BLOCKS).magnitude("top3").values
    assert {*top3.tolist()} <= {*band.get_paths()[0].vertices[:, 1].tolist()}
    (peak,) = by_gid(figure, "peak")
    top1 = capture.output(BLOCKS).magnitude("top1").values
    assert peak.get_text() == f"layer {top1.argmax()}: {top1.max():.4g}"


def test_layers_that_are_not_finite_are_marked_and_named_instead_of_vanishing(tmp_path):
    capture = capture_of(maxima_of(4))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_ratio(), Bounds(max=30))
    values = dict(zip(["model.layers.1", "model.layers.3"], [math.nan, math.inf], strict=True))
    rows = [replace(row, value=values.get(row.layer, row.value)) for row in verdict.rows]

    figure = value_figure(replace(verdict, rows=rows), capture)

    assert list(by_gid(figure, "not-finite")[0].get_xdata()) == [1, 3]
    assert any("not finite: 2 of 4 (1, 3)" in text for text in texts_of(figure))
    assert draw(capture, replace(verdict, rows=[replace(row, value=math.nan) for row in rows]), tmp_path)


def test_layers_at_infinity_within_their_bound_are_marked_as_such(tmp_path):
    capture = capture_of(maxima_of(4))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_ratio(), Bounds(min=0.1))
    query = {**verdict.query, "unit": "dB"}
    alike = [replace(row, value=math.inf if row.layer in ("model.layers.1", "model.layers.3") else row.value)
             for row in verdict.rows]  # fmt: skip

    figure = value_figure(replace(verdict, rows=alike, query=query), capture)

    assert list(by_gid(figure, "∞")[0].get_xdata()) == [1, 3]
    assert any("∞: 2 of 4 (1, 3)" in text for text in texts_of(figure))
    assert not by_gid(figure, "not-finite")
    every = replace(verdict, rows=[replace(row, value=math.inf) for row in verdict.rows], query=query)
    assert "value" in draw(capture, every, tmp_path)


def test_what_the_reference_has_is_drawn_beside_the_value():
    capture = capture_of(maxima_of(4))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_ratio(), Bounds(max=30))
    rows = [replace(row, reference=row.value * 50 if row.depth else None) for row in verdict.rows]

    figure = value_figure(replace(verdict, rows=rows), capture)
    figure.canvas.draw()

    (reference,) = by_gid(figure, "reference")
    theirs = {row.depth: row.reference for row in rows if row.depth}
    drawn = dict(zip(reference.get_xdata(), reference.get_ydata(), strict=True))
    assert {x: y for x, y in drawn.items() if not math.isnan(y)} == theirs
    assert reference.get_label() == "reference"
    assert figure.axes[0].get_ylim()[1] > max(theirs.values())


def test_a_verdict_without_anything_to_draw_draws_nothing(tmp_path):
    assert draw(capture_of(maxima_of(4)), Verdict("a", "m", Kind.ANOMALOUS, "no layer matches"), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


def test_the_figures_are_files_in_the_order_of_interest(tmp_path):
    capture = capture_of(maxima_of(4, [(1, 0, 2)]))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=0))

    drawn = draw(capture, verdict, tmp_path / "new" / "folder")

    assert list(drawn) == ["value", "outliers", "magnitude"]
    for path in drawn.values():
        assert path.startswith(str(tmp_path))
        with open(path, "rb") as file:
            assert file.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_users_matplotlib_settings_neither_change_nor_matter(tmp_path):
    capture = capture_of(maxima_of(4, [(1, 0, 2)]))
    verdict = judge_bounds(capture.output(BLOCKS).outlier_tokens(), Bounds(max=0))
    plain = draw(capture, verdict, tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "axes.grid": True}):
        mine = dict(matplotlib.rcParams)
        theirs = draw(capture, verdict, tmp_path / "theirs")
        assert dict(matplotlib.rcParams) == mine
    for title, path in plain.items():
        with open(path, "rb") as a, open(theirs[title], "rb") as b:
            assert a.read() == b.read(), title


@pytest.mark.process
def test_drawing_needs_neither_pyplot_nor_torch_nor_pytest():
    code = (
        "import sys, pytest_qsa.report.plots.figures; "
        "print(*{'matplotlib.pyplot', 'torch', 'pytest'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


def test_experts_are_drawn_in_their_own_order_whichever_is_worst():
    names = [f"model.layers.0.mlp.experts[{index}]" for index in range(3)]
    series = Series(names, np.array([5.0, 1.0, 3.0]), Query("expert_tokens", "expert_tokens/1", "input", "experts"))
    verdict = judge_bounds(series, Bounds(min=4))
    assert verdict.rows[0].layer == names[1]
    judged = judged_layers(verdict, Capture({}, ("model.layers.0.mlp.experts",)))
    assert [row.layer for row in judged.rows] == names
