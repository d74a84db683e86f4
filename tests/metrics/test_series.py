"""A series, a capture and a verdict as a notebook or a script meets them: read, sorted, drawn and printed shortly."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from torch import nn

from pytest_qsa import AnomalyError, capture
from pytest_qsa.metrics import Query, Series
from pytest_qsa.verdicts import Kind, Row, Verdict


def series_of(*values, metric="absmax", unit=""):
    layers = [f"layers.{index}.<mlp>" for index in range(len(values))]
    return Series(layers, np.array(values), Query(metric, f"{metric}/1", "output", "mlp", unit=unit))


@pytest.fixture(scope="module")
def measured():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return capture(model, [torch.ones(3, 8)], sites=[(r"\d$", "output"), ("0", "weight")], statistics=["absmax"])


class Cells(HTMLParser):
    """Collects the texts of a table, a row each."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.caption, self.inside = [], "", ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.inside == "caption":
            self.caption += data
        else:
            self.rows[-1].append(data)


def test_a_series_is_read_as_one_of_pandas():
    series = series_of(1.0, 5.0, 3.0)
    assert len(series) == 3
    assert list(series) == [1.0, 5.0, 3.0]
    assert max(series) == 5.0
    assert series["layers.1.<mlp>"] == series[1] == series[-2] == 5.0
    assert "layers.1.<mlp>" in series
    assert "layers.9" not in series
    assert dict(series.items()) == series.to_dict() == dict(zip(series.layers, [1.0, 5.0, 3.0], strict=True))
    assert series[1:].layers == series.layers[1:]
    pandas = series.to_pandas()
    assert pandas.name == "absmax"
    assert dict(pandas) == series.to_dict()


def test_a_name_that_a_series_lacks_is_told_with_the_nearest():
    with pytest.raises(KeyError, match=r"no layer 'layers\.1\.<mpl>'.*did you mean"):
        series_of(1.0, 2.0)["layers.1.<mpl>"]


def test_the_worst_layers_are_the_largest_or_of_a_metric_like_sqnr_the_smallest():
    assert list(series_of(1.0, 5.0, 3.0).worst(2)) == [5.0, 3.0]
    assert list(series_of(30.0, 5.0, 50.0, metric="sqnr", unit="dB").worst(2)) == [5.0, 30.0]
    assert list(series_of(0.9, 0.5, metric="same_top").worst()) == [0.5]
    assert np.isnan(series_of(1.0, np.nan, 9.0).worst()[0])
    assert series_of(4.0, 4.0).worst().layers == ["layers.0.<mlp>"]


def test_a_bound_that_is_a_scalar_of_numpy_judges_the_whole_series():
    series = series_of(1.0, 5.0)
    assert (np.float64(5) >= series) is True
    assert (series <= np.float32(4)) is False


def test_require_says_outside_pytest_what_is_out_of_bounds():
    series = series_of(1.0, 5.0, 3.0)
    assert series.require(max=5) is series
    with pytest.raises(AssertionError, match=r"2 of 3 layers out of bounds \(max 2\); worst layers\.1\.<mlp>: 5"):
        series.require(max=2)
    with pytest.raises(AnomalyError, match="not finite"):
        series_of(np.nan).require(max=2)
    with pytest.raises(TypeError, match="needs a bound"):
        series.require()


def test_a_notebook_shows_a_series_as_a_table_and_the_worst_of_many_layers():
    table = Cells(series_of(1.0, 5.0)._repr_html_())
    assert table.rows == [["layer", "value"], ["layers.0.<mlp>", "1"], ["layers.1.<mlp>", "5"]]
    many = Cells(series_of(*range(50))._repr_html_())
    assert many.rows[1] == ["layers.49.<mlp>", "49"]
    assert len(many.rows) == 21
    assert "20 worst of 50" in many.caption


def test_a_plot_names_the_worst_layer():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    assert series_of(1.0, 5.0).plot(axes) is axes
    assert "worst layers.1.<mlp>, 5" in axes.get_title()
    assert axes.get_lines()[0].get_ydata().tolist() == [1.0, 5.0]


def test_a_capture_and_a_selection_print_one_line(measured):
    assert repr(measured) == "<Capture: output of 3 layers, weight of 1 layer; no tokens kept>"
    assert repr(measured.output("0", exclude="1")) == f"<Selection: output of '0' without '1', of {measured!r}>"


def test_a_notebook_shows_the_sites_of_a_capture(measured):
    assert [row[:2] for row in Cells(measured._repr_html_()).rows] == [
        ["site", "layers"],
        ["output", "3"],
        ["weight", "1"],
    ]


def test_a_notebook_shows_the_headline_and_the_layers_of_a_verdict():
    rows = [Row("layers.1", 9.0, None, 4.0, None, 5.0), Row("layers.0", 1.0, None, 4.0, None, 0.0)]
    table = Cells(Verdict("budget", "model", Kind.REGRESSION, "1 of 2 <b>layers</b>", rows=rows)._repr_html_())
    assert table.caption == "REGRESSION budget: 1 of 2 <b>layers</b>"
    assert table.rows[1:] == [["layers.1", "9", "+5"]]
