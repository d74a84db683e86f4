"""The data by which a page draws a picture: the numbers of the capture, in the picture's own units."""

import base64
import io

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from pytest_qsa.report.plots.chart import chart_of
from pytest_qsa.report.plots.elements import map_figure
from pytest_qsa.report.plots.magnitudes import Outliers, outlier_picture
from pytest_qsa.report.plots.style import new_figure

LAYERS = [f"model.layers.{index}" for index in range(6)]


def marks(panel, kind, label=None):
    return [mark for mark in panel["marks"] if mark["kind"] == kind and label in (None, mark.get("label"))]


def test_a_gap_in_a_band_stays_a_gap_and_the_edges_are_the_numbers():
    figure = new_figure(3.0)
    axes = figure.subplots()
    low, high = np.array([1.0, 2.0, np.nan, 3.0, 4.0]), np.array([5.0, 6.0, 7.0, 8.0, 9.0])
    axes.fill_between(range(5), low, high, label="band")
    ((band,),) = (marks(panel, "area") for panel in chart_of(figure)["panels"])
    assert band["label"] == "band"
    assert band["x"] == [0.0, 1.0, None, 3.0, 4.0]
    assert band["low"] == [1.0, 2.0, None, 3.0, 4.0]
    assert band["high"] == [5.0, 6.0, None, 8.0, 9.0]


@pytest.mark.parametrize(("scale", "width"), [("linear", 1.0), ("log", 1.0), ("asinh", 0.25), ("symlog", 3.0)])
def test_an_axis_says_its_scale_its_ends_and_the_ticks_within_them(scale, width):
    figure = new_figure(3.0)
    axes = figure.subplots()
    axes.set_yscale(scale, **{"asinh": {"linear_width": width}, "symlog": {"linthresh": width}}.get(scale, {}))
    axes.set_ylim(0.5, 200.0)
    axes.set_ylabel("cost, \\$")
    axis = chart_of(figure)["panels"][0]["y"]
    assert (axis["scale"], axis["width"], axis["ends"], axis["label"]) == (scale, width, [0.5, 200.0], "cost, $")
    assert axis["ticks"]
    assert all(0.5 <= place <= 200.0 for place, _ in axis["ticks"])


def test_outliers_are_bars_whose_ends_are_the_counts():
    layer = np.array([1, 1, 1, 4])
    sink = np.array([False, False, True, True])
    found = Outliers(LAYERS, layer, np.zeros(4, int), np.arange(4), sink)
    (panel,) = chart_of(outlier_picture("layer_wise", found, [], "title", "note"))["panels"]
    counts = {mark["label"]: [(sum(ends[:2]) / 2, *ends[2:]) for ends in mark["ends"]] for mark in marks(panel, "bars")}
    assert counts == {"other tokens: 2": [(1.0, 0.0, 2.0)], "sinks: 2": [(1.0, 2.0, 3.0), (4.0, 0.0, 1.0)]}
    (words,) = chart_of(outlier_picture("token", found, [("a$b", 3, 1)], "title", "note"))["panels"]
    assert words["horizontal"]
    assert words["y"]["ticks"] == [(0.0, "\u201ca$b\u201d")]
    nothing = Outliers(LAYERS, *(np.zeros(0, int) for _ in range(3)), np.zeros(0, bool))
    (empty,) = chart_of(outlier_picture("layer_wise", nothing, [], "title", "note"))["panels"]
    assert empty["message"] == "no token is above the threshold"


def test_a_map_keeps_the_colour_of_every_point():
    values = np.geomspace(0.1, 1000, 12).reshape(3, 4).astype(np.float32)
    chart = chart_of(map_figure({"layer": values}, (3, 4), "title", "note"))
    ((mark,),) = (marks(panel, "image") for panel in chart["panels"])
    pixels = Image.open(io.BytesIO(base64.b64decode(mark["source"].partition(",")[2]))).convert("RGB")
    table, colours = np.array([to_rgb(each) for each in chart["colours"]["table"]]) * 255, np.asarray(pixels, float)
    nearest = np.abs(table[None, None] - colours[:, :, None]).sum(-1).argmin(-1)
    low, high = chart["colours"]["low"], chart["colours"]["high"]
    assert (tuple(mark["size"]), mark["ends"], chart["colours"]["log"]) == ((4, 3), [0, 4, 3, 0], True)
    read = low * (high / low) ** (nearest / 255)
    np.testing.assert_allclose(read, np.clip(values, low, high), rtol=0.06)  # a step of the scale is 4 %
