"""`qsa analyze`: a configuration goes in; pictures, tables and a page come out of one pass, or one line says why."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
import yaml

from pytest_qsa import Capture
from pytest_qsa.captures import HeatMap
from pytest_qsa.captures.kinds import with_kinds
from pytest_qsa.cli import main
from pytest_qsa.report.html import Gallery, PagePicture, render_gallery
from pytest_qsa.suite import Visualization
from pytest_qsa.tools.analyze import Export, draw_picture
from pytest_qsa.tools.pictures import PatternError, plan_pictures
from support import models, oracle

PARTS = ("", ".mlp.down_proj", ".mlp.up_proj", ".self_attn.q_proj", ".self_attn.o_proj")
NAMES = [f"model.layers.{n}{part}" for n in range(4) for part in PARTS]
ALL = dict.fromkeys(
    ["magnitude_input", "magnitude_output", "magnitude_weight", "outlier_layer_wise", "outlier_position",
     "outlier_token", "heatmap_3d", "distribution", "percentile_range"], True,
)  # fmt: skip


def enabled(*names):
    return dict.fromkeys(ALL, False) | dict.fromkeys(names, True)


def configured(folder, model, visualization, **data):
    """Write a configuration of a small model and return the program's arguments."""
    suite = {
        "model": {"path": str(model), "name": "llama"},
        "data": {"num_samples": 3, "seq_len": 24, **data},
        "visualization": {"dpi": 50, **visualization},
    }
    (folder / "seed.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    return ["analyze", "--config", str(folder / "seed.yaml"), "--qsa-no-cache"]


def read_csv(path):
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


@pytest.fixture(scope="module")
def everything(tmp_path_factory, llama):
    """Return the folder of an analysis with all pictures and all formats."""
    folder = tmp_path_factory.mktemp("everything")
    output = {"formats": ["png", "svg", "html", "csv", "json", "parquet"], "include_raw_data": True}
    code = main(configured(folder, llama, {"enabled": ALL, "output": output}))
    assert code == 0
    return folder / "figures"


def test_everything_enabled_leaves_a_picture_of_each_kind_in_both_formats(everything):
    stems = [
        "magnitude_input", "magnitude_output", "magnitude_weight", "outlier_layer_wise", "outlier_position",
        "outlier_token", "distribution_boxplot", "distribution_histogram", "heatmap_3d", "heatmap_2d",
        "percentile_range_mlp_down_proj", "percentile_range_mlp_up_proj", "percentile_range_self_attn_q_proj",
        "percentile_range_self_attn_o_proj",
    ]  # fmt: skip
    assert {path.stem for path in everything.glob("*.png")} == set(stems)
    assert {path.stem for path in everything.glob("*.svg")} == set(stems)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in everything.glob("*.png"))


def test_the_page_holds_every_picture_and_fetches_nothing(everything):
    page = (everything / "analysis_report.html").read_text(encoding="utf-8")
    # All but the surfaces, for which the page has one that turns.
    assert page.count('<figure class="picture chart">') == len(list(everything.glob("*.png"))) - 1
    assert len(page) < 1_000_000
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    (surface,) = re.findall(r'<div class="surface".*?</div>\s*</div>|<div class="surface".*?</script>', page, re.DOTALL)
    assert re.findall(r"<option[^>]*>(.*?)</option>", surface) == [f"model.layers.{index}" for index in range(4)]


@pytest.mark.process
@pytest.mark.browser
def test_the_pictures_of_the_page_fit_every_width_with_text_of_one_size_and_say_their_values(everything):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"file://{everything / 'analysis_report.html'}")
        for width in (390, 768, 1440):
            page.set_viewport_size({"width": width, "height": 800})
            page.locator(".chart svg.depth-plot").last.wait_for()
            page.wait_for_function(
                "[...document.querySelectorAll('.panel svg')].every(svg => svg.getBoundingClientRect().width"
                " === svg.viewBox.baseVal.width)"  # drawn for this width, and not shrunk to it
            )
            assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 21, 27)"
        said_by = {}
        for chart in page.locator("figure.chart").all():
            plot = chart.locator(".panel svg").last
            if plot.count():
                plot.scroll_into_view_if_needed()
                plot.hover()
                said_by[chart.locator("code").inner_text()] = chart.locator(".readout").inner_text()
        browser.close()
    assert said == []
    assert re.match(
        r"mlp\.down_proj, block \d: top1 to top3 .+ · top1 [\d.]+ · median [\d.]+", said_by["magnitude_input"]
    )
    assert re.match(r"channel \d+: all tokens .+ … .+ · 0.01 to 99.99 % ", said_by["percentile_range_mlp_up_proj"])
    assert re.match(r"model\.layers\.3, token \d+, channel \d+: about [\d.]+", said_by["heatmap_2d"])
    assert all(re.search(r": .*\d", text) for text in said_by.values())


def test_the_tables_are_tidy_and_agree_with_one_another(everything):
    import pyarrow.parquet

    rows = read_csv(everything / "analysis.csv")
    assert list(rows[0]) == ["layer", "site", "metric", "statistic", "sample", "value"]
    report = json.loads((everything / "analysis.json").read_text(encoding="utf-8"))
    assert report["schema"] == "qsa-analysis/1"
    written = [tuple("" if cell is None else str(cell) for cell in row.values()) for row in report["rows"]]
    assert written == [tuple(row.values()) for row in rows]
    table = pyarrow.parquet.read_table(everything / "analysis.parquet").to_pylist()
    assert [row["value"] for row in table] == [float(row["value"]) for row in rows]
    assert [row["sample"] for row in table] == [int(row["sample"]) if row["sample"] else None for row in rows]


def test_the_numbers_of_the_tables_are_those_of_the_activations(everything, llama):
    import torch
    import transformers

    cap = Capture.load(everything / "capture.qsa")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    batches = [torch.tensor(ids)[None].long() for ids in cap.tokens]
    layer = "model.layers.2.mlp.down_proj"
    populations = models.record(model, batches, layer, "input")
    rows = [row for row in read_csv(everything / "analysis.csv") if (row["layer"], row["site"]) == (layer, "input")]
    values = {(row["metric"], row["statistic"], row["sample"]): float(row["value"]) for row in rows}
    for stat in ("top1", "top2", "top3", "median", "min"):
        alone = [oracle.magnitude(x, stat) for x in populations]
        assert [values["magnitude", stat, str(n)] for n in range(3)] == pytest.approx(alone, rel=1e-5)
        assert values["magnitude", stat, ""] == pytest.approx(np.mean(alone), rel=1e-5)
    elements = np.concatenate([x.ravel() for x in populations])
    for share in (1, 25, 75, 99):
        assert values["quantile", f"p{share}", ""] == pytest.approx(np.percentile(elements, share), rel=0.02, abs=1e-4)
    tokens = np.concatenate(populations)
    assert values["channel_band", "max", ""] == pytest.approx(tokens.max(), rel=1e-5)
    assert values["channel_band", "p75", ""] == pytest.approx(np.percentile(tokens, 75, axis=0).max(), rel=0.07)
    assert values["channel_band", "min", ""] == pytest.approx(tokens.min(), rel=1e-5)
    assert values["channel_band", "p25", ""] == pytest.approx(np.percentile(tokens, 25, axis=0).min(), rel=0.07)


def test_one_row_a_layer_and_statistic_without_raw_data(tmp_path, llama):
    assert (
        main(configured(tmp_path, llama, {"enabled": enabled("magnitude_input"), "output": {"formats": ["csv"]}})) == 0
    )
    rows = read_csv(tmp_path / "figures" / "analysis.csv")
    assert len(rows) == 4 * 4 * 5
    assert {row["sample"] for row in rows} == {""}
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["analysis.csv"]


def test_one_forward_a_sample_answers_everything(tmp_path, llama, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaModel

    calls, forward = [], LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    kinds = enabled("magnitude_input", "magnitude_output", "outlier_token", "distribution", "heatmap_3d")
    assert main(configured(tmp_path, llama, {"enabled": kinds, "output": {"formats": ["json"]}})) == 0
    assert len(calls) == 3


@pytest.mark.parametrize("options", [[], ["--redact"]])
def test_a_redacted_analysis_writes_no_token_anywhere(tmp_path, llama, monkeypatch, options):
    figures = []
    keep = lambda figure, *_, **__: figures.append(figure) or b""  # noqa: E731
    monkeypatch.setattr("pytest_qsa.report.encode_figure", keep)
    output = {"formats": ["png", "html", "csv", "json"], "include_raw_data": True}
    kinds = {"enabled": enabled("outlier_token"), "outlier": {"threshold": 1.01}, "output": output}
    assert main([*configured(tmp_path, llama, kinds), *options]) == 0
    redacted = bool(options)
    capture = Capture.load(tmp_path / "figures/capture.qsa")
    assert (len(capture.tokens), bool(capture.pieces)) == ((0, False) if redacted else (3, True))
    (figure,) = set(figures)  # as a file and for the page
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    said = [text.get_text() for text in figure.axes[0].texts]
    assert any(label.startswith("“") for label in labels) != redacted
    assert any("redacted" in text for text in said) == redacted


def test_the_first_layers_and_the_pictures_are_listed(tmp_path, llama, capsys):
    arguments = configured(tmp_path, llama, {"enabled": enabled("outlier_layer_wise")})
    assert main([*arguments, "--dry-run", "--verbose"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Total layers found: 57"
    assert lines[1] == "Showing first 20 layers:"
    assert sum(line.startswith("  model") for line in lines) == 20
    assert any(line.split() == ["outlier_layer_wise", "output", "of", "4", "layers"] for line in lines)
    assert lines[-2].strip() == "model.layers.3"


def test_an_analysis_says_what_it_found_and_where_the_page_is(tmp_path, llama, capsys):
    drawn = {"enabled": enabled("magnitude_input", "outlier_layer_wise"), "output": {"include_raw_data": True}}
    assert main(configured(tmp_path, llama, drawn)) == 0
    out = capsys.readouterr().out
    assert "Total layers found" not in out
    lines = out.splitlines()
    cap = Capture.load(tmp_path / "figures" / "capture.qsa")
    largest = max(
        (float(numbers.token_max.max()), layer, site)
        for (layer, site), numbers in cap.sites.items()
        if site != "weight" and "token_max" in numbers
    )
    assert f"at the {largest[2]} of {largest[1]} (" in lines[0]
    assert lines[1].startswith("Attention sinks: ")
    for scheme, name in (("int8", "int8"), ("fp8_e4m3", "fp8 (E4M3)")):
        series = cap.input(r"(q|o|up|down)_proj$").quantization_sqnr(scheme=scheme, by="token")
        worst = series.layers[int(np.argmin(series.values))]
        assert any(line.startswith(f"Least fit for {name}") and f": {worst} " in line for line in lines)
    assert lines[-1].endswith("analysis_report.html")
    page = (tmp_path / "figures" / "analysis_report.html").read_text(encoding="utf-8")
    assert page.index("The largest activation") < page.index("What was analyzed")


@pytest.fixture
def weightless(tmp_path, llama):
    """Return a checkpoint's folder without its weights: what succeeds or is told there, read none."""
    folder = tmp_path / "weightless"
    shutil.copytree(llama, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_a_dry_run_reads_no_weight_and_writes_nothing(tmp_path, weightless, capsys):
    assert main([*configured(tmp_path, weightless, {"enabled": ALL}), "--dry-run"]) == 0
    assert not (tmp_path / "figures").exists()
    assert "nothing was loaded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("visualization", "said"),
    [
        ({"magnitude": {"patterns": ["q_proj", "qq_proj"]}}, "seed.yaml:12: no layer matches 'qq_proj'; the nearest"),
        ({"magnitude": {"weight": {"patterns": ["nope"]}}, "enabled": enabled("magnitude_weight")},
         "no layer matches 'nope'"),
        ({"outlier": {"pattern": "blocks"}}, "seed.yaml:10: no layer matches 'blocks'"),
        ({"layer_selection": {"patterns": ["nope"]}}, "no layer matches 'nope'"),
        ({"enabled": enabled()}, "nothing is enabled"),
        ({"enabled": enabled("heatmap_3d"), "heatmap_3d": {"sample_idx": 3}}, "the 3 samples begin with 0"),
    ],
)  # fmt: skip
def test_what_can_not_be_drawn_is_told_with_its_line_before_any_weight_is_read(
    tmp_path, monkeypatch, weightless, capsys, visualization, said
):
    monkeypatch.chdir(tmp_path)
    assert main(configured(tmp_path, weightless, visualization)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("qsa: seed.yaml:")
    assert len(error.splitlines()) == 1


def test_a_pattern_of_a_picture_that_is_off_is_not_looked_at(tmp_path, weightless):
    visualization = {"enabled": enabled("outlier_token"), "magnitude": {"patterns": ["nope"]}}
    assert main([*configured(tmp_path, weightless, visualization), "--dry-run"]) == 0


def test_a_folder_that_can_not_be_written_is_told_before_the_pass(tmp_path, weightless, capsys):
    (tmp_path / "file").write_text("")
    assert main([*configured(tmp_path, weightless, {}), "--save_dir", str(tmp_path / "file" / "figures")]) == 1
    assert "save_dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--outlier.treshold", "3"], 2, "no key 'visualization.outlier.treshold' (did you mean 'threshold'?)"),
        (["--data.num_samples", "x"], 2, "--data.num_samples=x: num_samples: should be a valid integer"),
        (["--fast"], 4, "unrecognized arguments: --fast"),
    ],
)
def test_a_wrong_option_is_told_before_anything_else(tmp_path, weightless, capsys, arguments, code, said):
    assert main([*configured(tmp_path, weightless, {}), *arguments]) == code
    assert said in capsys.readouterr().err


def test_options_override_the_file(tmp_path, llama):
    arguments = configured(tmp_path, llama, {"enabled": enabled("outlier_layer_wise")})
    more = ["--data.num_samples", "2", "--outlier.threshold", "1.5", "--save_dir", str(tmp_path / "out"),
            "--output.formats", "[json]", "--output.include_raw_data", "true"]  # fmt: skip
    assert main([*arguments, *more]) == 0
    report = json.loads((tmp_path / "out" / "analysis.json").read_text(encoding="utf-8"))
    assert report["visualization"]["outlier"]["threshold"] == 1.5
    assert {row["sample"] for row in report["rows"]} == {None, 0, 1}
    assert sum(row["value"] for row in report["rows"] if row["statistic"] == "count") > 0


def test_a_picture_that_can_not_be_drawn_is_named_and_the_others_are_drawn(tmp_path, llama, capsys):
    visualization = {
        "enabled": enabled("magnitude_weight", "outlier_token"), "magnitude": {"weight": {"patterns": ["act_fn"]}},
    }  # fmt: skip
    assert main(configured(tmp_path, llama, visualization)) == 1
    assert "magnitude_weight was not drawn: the weight of model.layers.0.mlp.act_fn" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "figures").glob("*.png")) == ["outlier_token.png"]
    assert "magnitude_weight was not drawn" in (tmp_path / "figures" / "analysis_report.html").read_text()


def test_a_layer_that_the_forward_pass_skips_is_left_out_with_a_warning(tmp_path, llama, capsys):
    patterns = {"patterns": [r"0\.mlp\.(act_fn|down_proj)$", "embed_tokens"]}
    assert main(configured(tmp_path, llama, {"enabled": enabled("magnitude_input"), "magnitude": patterns})) == 0
    assert "warning: magnitude_input: the input of model.embed_tokens was never seen" in capsys.readouterr().err


def test_a_layer_that_is_left_out_takes_nothing_else_out_of_the_tables_and_the_page(tmp_path, llama, capsys):
    heat = {"pattern": r"0\.mlp\.down_proj$|embed_tokens|rotary_emb", "is_input": True}
    drawn = {
        "enabled": enabled("heatmap_3d", "magnitude_input"),
        "heatmap_3d": heat,
        "magnitude": {"patterns": [heat["pattern"]]},
    }
    assert main(configured(tmp_path, llama, drawn | {"output": {"formats": ["html", "csv", "json"]}})) == 0
    rows = read_csv(tmp_path / "figures" / "analysis.csv")
    assert {row["layer"] for row in rows} == {"model.layers.0.mlp.down_proj", "model.rotary_emb"}
    pictures = json.loads((tmp_path / "figures" / "analysis.json").read_text(encoding="utf-8"))["pictures"]
    assert all("model.embed_tokens" not in picture["layers"] for picture in pictures)
    assert ">model.layers.0.mlp.down_proj</option>" in (tmp_path / "figures" / "analysis_report.html").read_text()


SEED = r"""
model:
  path: "/path/to/your/model"
  name: "my-model"
data:
  source: "pile"
  num_samples: 64
  seq_len: 1024
  seed: 0
visualization:
  save_dir: "./figures"
  dpi: 200
  enabled:
    magnitude_input: true
    magnitude_output: true
    magnitude_weight: false
    outlier_layer_wise: true
    outlier_position: true
    outlier_token: true
    heatmap_3d: false
    distribution: false
  magnitude:
    patterns:
      - "mlp\\.down_proj"
      - "mlp\\.up_proj"
      - "self_attn\\.q_proj"
      - "self_attn\\.o_proj"
    reduce_dim: null
  outlier:
    threshold: 64
    pattern: "layers\\.\\d+$"
    decode_tokens: true
  layer_selection:
    patterns:
      - "layers\\.\\d+\\.mlp\\.down_proj"
      - "layers\\.\\d+\\.self_attn\\.q_proj"
memory:
  device: "cuda"
  offload_device: "cpu"
  auto_offload: true
"""
"""The configuration of the seed's README, but for its comments."""


def test_the_configuration_of_the_seeds_readme_runs(tmp_path, llama, capsys):
    (tmp_path / "seed.yaml").write_text(SEED)
    here = ["--model.path", str(llama), "--memory.device", "cpu", "--data.source", "sample", "--dpi", "50"]
    small = ["--data.num_samples", "2", "--data.seq_len", "24", "--qsa-no-cache"]
    assert main(["analyze", "--config", str(tmp_path / "seed.yaml"), *here, *small]) == 0
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        "magnitude_input.png", "magnitude_output.png", "outlier_layer_wise.png", "outlier_position.png",
        "outlier_token.png", "analysis_report.html",
    }  # fmt: skip
    assert "layer_selection has none of the layers of outlier.pattern" in capsys.readouterr().err


# The plan.


BLOCKS = {"outlier": {"pattern": r"layers\.\d+$"}, "heatmap_3d": {"pattern": r"layers\.\d+$"}}
"""For plain names: what `kind:blocks` stands for is known of a model's own layers alone."""


def test_a_selection_narrows_magnitudes_distributions_and_percentiles():
    visualization = Visualization(
        enabled={**ALL, "magnitude_weight": False}, layer_selection={"patterns": [r"layers\.[12]\."]}, **BLOCKS
    )
    for picture in plan_pictures(visualization, NAMES).pictures:
        narrowed = all(layer.split(".")[2] in "12" for layer in picture.layers)
        assert narrowed == (not picture.section.startswith(("outlier", "heatmap")))


def test_a_pattern_that_the_selection_would_empty_stays_as_it_is_with_a_warning():
    visualization = Visualization(layer_selection={"patterns": [r"layers\.\d+\.mlp\.down_proj"]}, **BLOCKS)
    analysis = plan_pictures(visualization, NAMES)
    by_name = {picture.name: picture.layers for picture in analysis.pictures}
    assert list(by_name["outlier_token"]) == [f"model.layers.{n}" for n in range(4)]
    assert {layer.rpartition(".")[2] for layer in by_name["magnitude_input"]} == {
        "down_proj", "up_proj", "q_proj", "o_proj",
    }  # fmt: skip
    assert any("outlier.pattern" in warning for warning in analysis.warnings)
    assert any(r"self_attn\.q_proj" in warning for warning in analysis.warnings)
    assert len(analysis.warnings) == len(set(analysis.warnings))


def test_patterns_that_are_absent_are_those_of_the_magnitudes():
    visualization = Visualization(
        enabled=enabled("distribution", "percentile_range", "magnitude_weight"),
        magnitude={"patterns": [r"up_proj"]},
        distribution={"is_input": False},
    )
    pictures = plan_pictures(visualization, NAMES).pictures
    assert {layer.rpartition(".")[2] for picture in pictures for layer in picture.layers} == {"up_proj"}
    assert {(picture.section, picture.site) for picture in pictures} == {
        ("distribution", "output"), ("percentile_range", "input"), ("magnitude_weight", "weight"),
    }  # fmt: skip


def test_a_picture_for_each_pattern_where_they_are_not_combined():
    visualization = Visualization(enabled=enabled("magnitude_input"), magnitude={"combined_plot": False})
    assert [picture.name for picture in plan_pictures(visualization, NAMES).pictures] == [
        "magnitude_input_mlp_down_proj", "magnitude_input_mlp_up_proj", "magnitude_input_self_attn_q_proj",
        "magnitude_input_self_attn_o_proj",
    ]  # fmt: skip


def test_a_kind_of_layer_that_is_never_called_is_left_out_unless_the_user_named_it(tmp_path):
    names = [f"layers.{i}.mixer.dt_proj" for i in range(2)]  # Mamba reads its weight without calling it
    for patterns, optional in (None, True), (["dt_proj"], False):
        chosen = {} if patterns is None else {"magnitude": {"patterns": patterns}}
        visualization = Visualization(enabled=enabled("percentile_range"), **chosen)
        named = with_kinds(names, {"linears": [0, 1]})
        (picture,) = plan_pictures(visualization, named).pictures
        drawn, warnings = draw_picture(picture, Capture({}), visualization, tmp_path, "")
        export = Export(visualization, None, None, Capture({}), tmp_path, drawn=[drawn])
        assert (bool(export.problems), bool(warnings)) == (not optional, optional)


def test_two_patterns_of_the_same_words_do_not_overwrite_each_other():
    patterns = [r"mlp\.up_proj", r"mlp.up_proj$"]
    visualization = Visualization(
        enabled=enabled("magnitude_input"), magnitude={"combined_plot": False, "patterns": patterns}
    )
    names = [picture.name for picture in plan_pictures(visualization, NAMES).pictures]
    assert names == ["magnitude_input_mlp_up_proj", "magnitude_input_mlp_up_proj_2"]


def test_the_layers_of_heat_maps_are_spread_over_the_depth():
    names = [f"layers.{n}" for n in range(100)]
    visualization = Visualization(
        enabled=enabled("heatmap_3d"), heatmap_3d={"num_2d_layers": 4, "sample_idx": 2} | BLOCKS["heatmap_3d"]
    )
    surfaces, maps = plan_pictures(visualization, names).pictures
    assert [layer.partition(".")[2] for layer in maps.layers] == ["0", "33", "66", "99"]
    assert [layer.partition(".")[2] for layer in surfaces.layers] == ["0", "50", "99"]
    assert maps.statistics == {HeatMap(2)}


def test_an_unmatched_pattern_knows_its_place():
    with pytest.raises(PatternError) as caught:
        plan_pictures(Visualization(magnitude={"patterns": ["q_proj", "nope"]}), NAMES)
    assert caught.value.location == ("visualization", "magnitude", "patterns", 1)


def test_no_text_can_break_the_page():
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(1)">\u202e'
    page = render_gallery(
        Gallery(evil, {evil: evil}, {evil: [PagePicture(evil, evil, problem=evil)]}, [evil], [evil], [evil], evil)
    )
    assert page.count("<script") == page.count("</script>") == 4  # the page's own
    assert "<img src=x" not in page
