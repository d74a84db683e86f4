"""The surface that turns: its data keep every peak, and it is drawn, turned and read in a real browser."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from pytest_qsa.report.html import Gallery, GallerySurface, render_gallery, surface_data

HOSTILE = "</script><script>alert(1)</script>\u202e"


def test_the_grid_keeps_every_peak():
    values = np.random.default_rng(0).random((100, 130)).astype(np.float32)
    values[57, 99] = 1234.5
    data = surface_data({"a": values}, (100, 130), (30, 45))

    (layer,) = data["layers"]
    grid = np.array(layer["values"]).reshape(layer["rows"], -1)
    expected = [
        [values[row : row + 4, column : column + 5].max() for column in range(0, 130, 5)] for row in range(0, 100, 4)
    ]
    np.testing.assert_allclose(grid, expected, rtol=5e-3)
    assert grid[57 // 4, 99 // 5] == 1230.0  # three digits
    assert max(grid.shape) <= 48
    assert (data["tokens"], data["channels"], data["elevation"], data["azimuth"]) == (100, 130, 30.0, 45.0)


def test_what_is_not_finite_is_counted_and_a_small_map_stays_as_it_is():
    values = np.array([[1.0, np.nan], [np.inf, 4.0]], dtype=np.float32)
    (layer,) = surface_data({"a": values}, (2, 2), (0, 0))["layers"]
    assert (layer["rows"], layer["values"], layer["holes"]) == (2, [1.0, 0.0, 0.0, 4.0], 2)


def test_of_very_many_layers_some_are_left_out_never_the_last_and_it_is_said():
    data = surface_data({str(i): np.ones((2, 2), dtype=np.float32) for i in range(100)}, (2, 2), (0, 0))
    assert len(data["layers"]) <= 32
    assert data["layers"][-1]["layer"] == "99"
    assert data["left_out"] == 100 - len(data["layers"])


def test_a_surface_opens_at_the_layer_whose_peak_stands_out_most():
    maps = {str(i): np.ones((4, 4), dtype=np.float32) * (i + 1) for i in range(5)}
    maps["1"][2, 2] = 900.0
    maps["4"][0, 0] = np.inf
    data = surface_data(maps, (4, 4), (0, 0))
    assert data["layers"][data["start"]]["layer"] == "1"


@pytest.fixture
def page(tmp_path, opened_page):
    """Return the page of an analysis with two surfaces, opened."""
    values = np.full((20, 30), 1.0, dtype=np.float32)
    values[4, 21] = 500.0
    maps = {f"model.layers.0 {HOSTILE}": values, "model.layers.1": values[::-1].copy()}
    surfaces = [GallerySurface("Heat maps", "heatmap_3d", surface_data(maps, (20, 30), (30, 45)))]
    html = render_gallery(Gallery("Analysis of x", {}, {"Heat maps": []}, surfaces=surfaces))
    assert html.count("<script") == html.count("</script>") == 5
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    return opened_page(tmp_path / "page.html")


def picture(page):
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.evaluate("document.querySelector('.surface canvas').toDataURL()")


@pytest.mark.process
@pytest.mark.browser
def test_a_surface_turns_by_keyboard_and_by_hand_and_says_where_its_peak_is(page):
    canvas = page.locator(".surface canvas")
    first = picture(page)
    assert "largest: |x| 500 at token 4, channel 21" in page.locator(".surface").inner_text()

    canvas.press("ArrowLeft")
    turned = picture(page)
    assert turned != first
    canvas.press("ArrowRight")
    assert picture(page) == first

    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 180, box["y"] + 120)
    page.mouse.up()
    assert picture(page) != first


@pytest.mark.process
@pytest.mark.browser
def test_a_surface_changes_with_the_layer_the_scale_and_the_theme(page):
    first = picture(page)
    assert page.get_by_label("logarithmic height").is_checked()  # a peak alone would leave the rest flat
    page.get_by_label("logarithmic height").uncheck()
    linear = picture(page)
    assert linear != first
    page.get_by_role("button", name="Switch between light and dark").click()
    assert picture(page) != linear
    page.locator(".surface select").select_option("model.layers.1")
    page.get_by_text("largest: |x| 500 at token 15, channel 21").wait_for()
    assert page.locator("canvas").get_attribute("aria-label").startswith("|x| of model.layers.1 over 20 tokens")


WRITTEN = """() => new Promise((done) => {
  const written = [], paper = CanvasRenderingContext2D.prototype, plain = paper.fillText;
  paper.fillText = function (text, x, y) {
    const width = this.measureText(text).width;
    const left = { left: x, center: x - width / 2, right: x - width }[this.textAlign];
    written.push([left, left + width, y]);
    plain.call(this, text, x, y);
  };
  for (const key of ["ArrowLeft", "ArrowRight"])
    document.querySelector(".surface canvas").dispatchEvent(new KeyboardEvent("keydown", { key }));
  requestAnimationFrame(() => requestAnimationFrame(() => done(written)));
})"""
"""Draws a surface again as it is; returns left, right and baseline of each text on it [px]."""


@pytest.mark.process
@pytest.mark.browser
def test_no_two_numbers_on_a_surface_meet_on_a_phone(tmp_path, opened_page):
    maps = {"model.layers.0": np.ones((512, 576), dtype=np.float32)}
    surfaces = [GallerySurface("Heat maps", "heatmap_3d", surface_data(maps, (512, 576), (30, 45)))]
    html = render_gallery(Gallery("Analysis of x", {}, {"Heat maps": []}, surfaces=surfaces))
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    written = opened_page(tmp_path / "page.html", width=390).evaluate(WRITTEN)

    assert len(written) == 7  # two ends and a name of each axis, and the peak
    assert not [
        (one, other) for one, other in combinations(written, 2)
        if one[0] < other[1] + 2 and other[0] < one[1] + 2 and abs(one[2] - other[2]) < 11
    ]  # fmt: skip
