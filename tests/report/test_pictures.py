"""The pictures of an analysis: what they show, and that each looks as it did, in thumbnails compared with a tolerance.

`QSA_UPDATE_IMAGES=1 pytest tests/report/test_pictures.py` draws the thumbnails anew: look at them before a commit.
"""

from __future__ import annotations

import io
import os
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.container import Container
from matplotlib.lines import Line2D
from matplotlib.text import Text
from PIL import Image

from pytest_qsa.captures.distributions import channel_bands
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.report.plots.chart import chart_of
from pytest_qsa.report.plots.elements import box_figure, histogram_figure, map_figure, percentile_figure, surface_figure
from pytest_qsa.report.plots.magnitudes import Outliers, outlier_picture
from pytest_qsa.suite import Visualization
from pytest_qsa.tools.analyze import draw_picture
from pytest_qsa.tools.pictures import plan_pictures
from support import models

IMAGES = Path(__file__).parent / "images"
SIZE = (120, 80)
TOKENS, CHANNELS = 24, 40
KINDS = {
    "magnitude_input": {"magnitude": {"combined_plot": True}},
    "magnitude_output": {"magnitude": {"reduce_dim": None}},
    "outlier_layer_wise": {},
    "outlier_position": {},
    "outlier_token": {"outlier": {"top_n": 6}},
    "heatmap_3d": {"heatmap_3d": {"view_angle": [40, -50], "sample_idx": 1}},
    "distribution": {},
    "percentile_range": {},
}


class Deep(torch.nn.Module):
    """A model whose block i adds seeded noise, the wider the deeper, and at token 3 a channel that stands out."""

    def __init__(self, depth):
        super().__init__()
        self.layers = torch.nn.ModuleList(models.Says(self.values(index, depth)) for index in range(depth))

    @staticmethod
    def values(index, depth):
        noise = torch.randn(2, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(index))
        values = noise * (1 + 4 * index / depth)
        if index % 3 == 1:
            values[0, 3, 7] = 900.0 * (1 + index / depth)
            values[1, 17, 7] = -700.0
        return values

    def forward(self, input_ids):
        for layer in self.layers:
            out = layer(input_ids[:, 0])
        return out


def analysed(depth, **visualization):
    """Return the capture of a deep model and the pictures of a configuration for it."""
    model = Deep(depth)
    settings = {
        "enabled": dict.fromkeys([*KINDS, "magnitude_weight"], False),
        "magnitude": {"patterns": [r"layers\.\d+$"]},
        "dpi": 60,
        "outlier": {"pattern": r"layers\.\d+$"},
        "heatmap_3d": {"pattern": r"layers\.\d+$"},
        "distribution": {"is_input": False},
        "percentile_range": {"is_input": False},
    }
    for key, value in visualization.items():
        settings[key] = {**settings[key], **value} if isinstance(settings.get(key), dict) else value
    settings = Visualization(**settings)
    names = [f"layers.{index}" for index in range(depth)]
    analysis = plan_pictures(settings, names)
    batch = torch.arange(2)[:, None].expand(-1, TOKENS) * 1
    capture = run_pass(model, [batch], analysis.requests, decode=lambda ids: {i: f"token {i}" for i in ids})
    return settings, analysis, capture


def thumbnail(png):
    return Image.open(io.BytesIO(png)).convert("L").resize(SIZE, Image.Resampling.BOX)


def compare(png, name):
    """Hold a picture against its thumbnail: the mean difference below 3 of 255 grey levels, none above 60."""
    new = thumbnail(png)
    path = IMAGES / f"{name}.png"
    if os.environ.get("QSA_UPDATE_IMAGES"):
        IMAGES.mkdir(exist_ok=True)
        new.save(path)
    known = np.asarray(Image.open(path), dtype=float)
    difference = np.abs(np.asarray(new, dtype=float) - known)
    assert (difference.mean() < 3, difference.max() < 60) == (True, True), f"{path.name}: {difference.mean():.2f} mean"


@pytest.mark.parametrize("depth", [4, 100])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "magnitude_input"])
def test_a_picture_looks_as_it_did(tmp_path, kind, depth):
    settings, analysis, capture = analysed(depth, enabled={kind: True}, **KINDS[kind])
    for picture in analysis.pictures:
        drawn, warnings = draw_picture(picture, capture, settings, tmp_path, "deep, float32, 2 × 24 tokens")
        assert (drawn.problem, warnings) == ("", [])
        compare(drawn.files[0].read_bytes(), f"{picture.name}_{depth}")


def test_the_page_draws_the_numbers_of_the_model(tmp_path):
    kinds = dict.fromkeys(["magnitude_output", "distribution", "percentile_range"], True)
    settings, analysis, capture = analysed(4, enabled=kinds, output={"formats": ["html"]})
    charts = {each.name: draw_picture(each, capture, settings, tmp_path, "")[0].chart for each in analysis.pictures}
    x = np.stack([Deep.values(index, 4).double().numpy() for index in range(4)])  # [layer, sample, token, channel]

    (magnitudes,) = charts["magnitude_output"]["panels"]
    (top,) = (mark for mark in magnitudes["marks"] if mark["label"] == "top1")
    assert top["x"] == [0, 1, 2, 3]
    np.testing.assert_allclose(top["y"], np.abs(x).max((2, 3)).mean(1), rtol=1e-3)

    boxes = charts["distribution_boxplot"]["panels"][0]["marks"]
    ends = {mark["label"]: mark for mark in boxes}
    np.testing.assert_allclose(ends["largest"]["y"], x.max((1, 2, 3)), rtol=1e-3)
    whiskers = np.quantile(x.reshape(4, -1), [0.01, 0.99], axis=1, method="inverted_cdf").T
    np.testing.assert_allclose([end[2:] for end in ends["1 to 99 %"]["ends"]], whiskers, rtol=1e-2)

    curves = [mark for panel in charts["distribution_histogram"]["panels"] for mark in panel["marks"]]
    assert [sum(value or 0 for value in curve["values"]) for curve in curves] == pytest.approx([1.0] * 4, rel=1e-3)

    (name,) = (name for name in charts if name.startswith("percentile"))
    wide = charts[name]["panels"][::2]
    for panel, layer in zip(wide, x, strict=True):
        (band,) = (mark for mark in panel["marks"] if mark["label"] == "all tokens")
        np.testing.assert_allclose(band["high"][:-1:2], layer.max((0, 1)), rtol=1e-3)
        np.testing.assert_allclose(band["low"][:-1:2], layer.min((0, 1)), rtol=1e-3)


@pytest.mark.parametrize("style", ["fill", "line"])
def test_percentiles_look_as_they_did_in_each_style(style):
    _, analysis, capture = analysed(8, enabled={"percentile_range": True})
    layers = {layer: channel_bands(capture.sites[layer, "output"]) for layer in analysis.pictures[0].layers[:2]}
    figure = percentile_figure(layers, "Percentiles", "of |x|", style=style)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=60)
    compare(stream.getvalue(), f"percentile_{style}")


def test_without_a_legend_none_is_drawn(tmp_path):
    for kind in ("magnitude_output", "distribution", "percentile_range"):
        settings, analysis, capture = analysed(4, enabled={kind: True})
        quiet = settings.model_copy(update={"show_legend": False})
        for picture in analysis.pictures:
            with_legend, _ = draw_picture(picture, capture, settings, tmp_path / "with", "")
            without, _ = draw_picture(picture, capture, quiet, tmp_path / "without", "")
            assert with_legend.files[0].read_bytes() != without.files[0].read_bytes()


def test_the_resolution_is_what_the_configuration_says(tmp_path):
    settings, analysis, capture = analysed(4, enabled={"outlier_position": True}, dpi=100)
    drawn, _ = draw_picture(analysis.pictures[0], capture, settings, tmp_path, "")
    assert Image.open(io.BytesIO(drawn.files[0].read_bytes())).width == 900


def test_the_same_capture_draws_the_same_bytes(tmp_path):
    settings, analysis, capture = analysed(4, enabled={"outlier_token": True}, output={"formats": ["png", "svg"]})
    first, _ = draw_picture(analysis.pictures[0], capture, settings, tmp_path / "a", "")
    second, _ = draw_picture(analysis.pictures[0], capture, settings, tmp_path / "b", "")
    assert [path.suffix for path in first.files] == [".png", ".svg"]
    assert [path.read_bytes() for path in first.files] == [path.read_bytes() for path in second.files]


def look_of(handle):
    """Return how a grey print tells a series: the sort of its mark, the mark itself, and its grey from 0 to 1."""
    artist = handle[0] if isinstance(handle, Container) else handle
    dash = artist.get_linestyle()
    mark = (artist.get_marker(), artist.get_markerfacecolor()) if isinstance(artist, Line2D) else artist.get_hatch()
    colour = artist.get_color() if isinstance(artist, Line2D) else artist.get_facecolor()
    colour = np.atleast_2d(to_rgba(colour) if isinstance(artist, Line2D) else colour)
    if not len(colour) or not colour[0, 3]:
        colour = np.atleast_2d(artist.get_edgecolor())
    return type(artist).__name__, str((mark, dash)), float(np.dot(colour[0, :3], (0.299, 0.587, 0.114)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *[(kind, KINDS[kind]) for kind in KINDS if kind not in ("magnitude_input", "heatmap_3d")],
        ("percentile_range", {"percentile_range": {"style": "line"}}),
    ],
)
def test_the_series_of_a_picture_can_be_told_apart_in_greyscale(tmp_path, monkeypatch, kind, settings):
    settings, analysis, capture = analysed(8, enabled={kind: True}, **settings)
    figures = []
    monkeypatch.setattr("pytest_qsa.report.encode_figure", lambda figure, *_, **__: figures.append(figure) or b"")
    for picture in analysis.pictures:
        draw_picture(picture, capture, settings, tmp_path, "")
    for figure in figures:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        assert labels
        for (one, label), (other, other_label) in combinations(zip(map(look_of, handles), labels, strict=True), 2):
            assert one[:2] != other[:2] or abs(one[2] - other[2]) > 0.07, (label, other_label)


# What they show.


def by_gid(figure, gid):
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def test_a_box_shows_the_quartiles_the_median_and_the_extremes_of_all_elements():
    _, analysis, capture = analysed(4, enabled={"distribution": True})
    figure = box_figure({layer: capture.sites[layer, "output"] for layer in analysis.pictures[0].layers}, "", "")
    values = [Deep.values(index, 4).double().numpy().ravel() for index in range(4)]
    (boxes,) = by_gid(figure, "box")
    for ends, x in zip(boxes.ends, values, strict=True):
        assert ends[2:] == pytest.approx(np.percentile(x, [25, 75]), rel=0.02)
    (largest,), (smallest,) = by_gid(figure, "largest"), by_gid(figure, "smallest")
    assert largest.get_ydata() == pytest.approx([x.max() for x in values], rel=1e-6)
    assert smallest.get_ydata() == pytest.approx([x.min() for x in values], rel=1e-6)


def test_a_histogram_shows_the_share_of_the_elements_in_each_bin():
    _, analysis, capture = analysed(4, enabled={"distribution": True})
    figure = histogram_figure({layer: capture.sites[layer, "output"] for layer in analysis.pictures[0].layers}, "", "")
    curves = by_gid(figure, "curve")
    assert len(curves) == 4
    for index, curve in enumerate(curves):
        raw, shown = Deep.values(index, 4).double().numpy().ravel(), curve.get_data()
        counts, _ = np.histogram(raw, shown.edges)
        assert np.nan_to_num(shown.values) == pytest.approx(counts / raw.size, abs=0.004)
        assert np.nansum(shown.values) == pytest.approx(1.0)


def test_the_histograms_of_all_kinds_of_layers_have_the_same_bins_and_axis():
    _, analysis, capture = analysed(4, enabled={"distribution": True})
    sites = {layer: capture.sites[layer, "output"] for layer in analysis.pictures[0].layers}
    names = {"layers.0.q": "layers.0", "layers.1.q": "layers.2", "layers.0.k": "layers.1", "layers.1.k": "layers.3"}
    figure = histogram_figure({name: sites[layer] for name, layer in names.items()}, "", "")
    assert len({tuple(curve.get_data().edges) for curve in by_gid(figure, "curve")}) == 1
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert len(figure.axes) == 2


def test_the_channels_that_reach_furthest_stand_beside_the_others_with_their_numbers():
    _, _, capture = analysed(4, enabled={"percentile_range": True})
    layer = "layers.1"  # in which channel 7 stands out
    bands = channel_bands(capture.sites[layer, "output"], signed=True)
    figure = percentile_figure({layer: bands}, "", "")
    (drawn,) = by_gid(figure, "numbers")
    beside = chart_of(figure)["panels"][1]
    assert ([*drawn.places], []) == (beside["x"]["ticks"], beside["texts"])  # the page's are the same
    numbers = [int(number) for _, number in drawn.places]
    reach = np.abs(Deep.values(1, 4).numpy()).max(axis=(0, 1))
    assert numbers == np.argsort(-reach)[:20].tolist()
    assert numbers[0] == 7
    ends = [float(end) for end in Deep.values(1, 4)[..., 7].aminmax()]
    assert by_gid(figure, "widest")[0].ends[0, 2:] == pytest.approx(ends)


@pytest.mark.parametrize(("sign", "reach"), [(1, "1125"), (-1, "-1125")])
def test_a_title_names_the_channel_that_reaches_furthest_on_either_side_of_zero(sign, reach, tmp_path, monkeypatch):
    values = Deep.values
    monkeypatch.setattr(Deep, "values", staticmethod(lambda index, depth: sign * values(index, depth)))
    settings, analysis, capture = analysed(4, enabled={"percentile_range": True}, output={"formats": ["html"]})
    drawn, _ = draw_picture(analysis.pictures[0], capture, settings, tmp_path, "")
    assert drawn.picture.title.endswith(f": channel 7 reaches {reach} at layers.1")


def test_a_map_shows_its_values_by_token_and_channel():
    picture = np.ones((4, 6), dtype=np.float32)
    picture[2, 5] = 500
    figure = map_figure({"layers.0": picture}, (4, 6), "", "")
    (image,) = by_gid(figure, "map")
    colours = np.asarray(image.get_array()).sum(axis=2)
    assert np.unravel_index(colours.argmax(), colours.shape) == (2, 5)
    assert image.get_extent() == [0, 6, 4, 0]
    assert image.origin == "upper"


def test_a_surface_keeps_the_peak_and_is_seen_from_the_angle_asked_for():
    picture = np.ones((128, 128), dtype=np.float32)
    picture[77, 33] = 500
    figure = surface_figure({"layers.0": picture}, (512, 512), [20, 70], "", "")
    (axes,) = figure.axes
    assert (axes.elev, axes.azim) == (20, 70)
    assert len(by_gid(figure, "surface")) == 1
    assert axes.get_zlim()[1] >= np.log10(500)  # logarithmic: one peak would leave all else a plane
    assert axes.get_xlim() == (0, 512)


def test_many_channels_share_columns_that_keep_their_extremes():
    width = 1000
    bands = {name: np.full(width, value) for name, value in
             [("min", -4.0), ("p0.01", -3.0), ("p1", -2.0), ("p25", -1.0), ("p75", 1.0), ("p99", 2.0),
              ("p99.99", 3.0), ("max", 4.0)]}  # fmt: skip
    bands["max"][501] = 90.0
    figure = percentile_figure({"layers.0": bands}, "", "", style="line")
    lines = [line.get_ydata() for line in by_gid(figure, "line")]
    assert max(line.max() for line in lines) == 90
    assert all(len(line) <= 400 for line in lines)
    assert any("a column holds up to 3" in text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("text", ["模型", "\u202egnp", "a\nb\x07", "$x$", "\ud800", "שלום", "👩‍👩‍👧"])
@pytest.mark.filterwarnings("error")
def test_a_token_of_any_script_is_drawn_safely(text):
    one = np.array([0])
    outliers = Outliers(["layers.0"], one, one, one, np.array([False]))
    figure = outlier_picture("token", outliers, [(text, 1, 0)], "", "")
    figure.canvas.draw()
    (label,) = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert all(ord(c) >= 32 and c not in "\u202e\n" for c in label)


def test_a_glyph_that_only_another_font_has_is_drawn_by_it(monkeypatch):
    from matplotlib import get_data_path

    from pytest_qsa.report.plots import style

    own, other = "fonts/ttf/DejaVuSans.ttf", "fonts/ttf/STIXGeneral.ttf"
    assert style.safe_text("\u1d81x") == "U+1D81x"
    monkeypatch.setattr(style, "fonts", lambda: tuple((file, f"{get_data_path()}/{file}") for file in (own, other)))
    assert style._drawable(0x1D81)
    assert not style._drawable(0x4F60)


def test_where_no_token_stands_out_the_picture_says_so():
    none = np.zeros(0, dtype=np.int64)
    for kind in ("layer_wise", "position", "token"):
        figure = outlier_picture(kind, Outliers(["layers.0"], none, none, none, none.astype(bool)), [], "Title", "note")
        assert "no token is above the threshold" in [text.get_text() for text in figure.findobj(Text)]


def test_non_finite_values_do_not_stop_a_distribution():
    values = torch.randn(1, 6, 8)
    values[0, 2, 3], values[0, 4, 4] = float("inf"), float("nan")
    model = models.Scripted(values)
    visualization = Visualization(
        enabled=dict.fromkeys([*KINDS, "magnitude_weight"], False) | {"distribution": True},
        distribution={"patterns": ["layers"], "is_input": False},
    )
    analysis = plan_pictures(visualization, ["layers.0"])
    capture = run_pass(model, [models.numbered(model)], analysis.requests)
    sites = {"layers.0": capture.sites["layers.0", "output"]}
    for draw in (box_figure, histogram_figure):
        draw(sites, "", "").canvas.draw()
