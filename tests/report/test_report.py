"""What the report must say, and that nothing in it can break the page or lie to its reader."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import execnet
import numpy as np
import pytest

from pytest_qsa.captures.distributions import histogram
from pytest_qsa.captures.pictures import Patch
from pytest_qsa.captures.provenance import DataProvenance, ModelProvenance, Provenance
from pytest_qsa.report import html, page as report_page
from pytest_qsa.report.page import MOST_LISTED, MOST_ROWS, shortened
from pytest_qsa.report.report import MARKER, MOST_RUNS, to_plain, write_report, write_run
from pytest_qsa.verdicts.verdict import Kind, Row, TokenEvidence, Verdict
from support.projects import peaks, suite

SESSION = {
    "command": "pytest gate.qsa.yaml --qsa-report always", "started": "2026-01-02T03:04:05+00:00", "duration_s": 4.2,
    "counts": {"passed": 1, "failed": 2}, "version": "0.1.0",
}  # fmt: skip
RUN = Provenance.of({
    "model": {
        "path": "checkpoints/tiny-int8",
        "weights": f"sha256:{'ab12' * 16}",
        "dtype": "bfloat16",
        "device": "cpu",
    },
    "data": {"source": "wikitext2", "num_samples": 8, "an_unknown_key": {"of": ["the", "future"]}},
})  # fmt: skip
HOSTILE = "</script><script>alert(1)</script>\"'\u202e\u200f\x1b[0m\x00<mark>&amp;"
LAYERS = 30


def verdict_of(kind=Kind.REGRESSION, worst=9.0, **fields):
    """Return a verdict over 30 layers with `max 4`; layer 11 has the value `worst`, the others 1 and their index."""
    values = [worst if layer == 11 else 1 + layer / 100 for layer in range(LAYERS)]
    rows = [Row(f"model.layers.{i}", v, None, 4.0, None, max(v - 4, 0.0), i) for i, v in enumerate(values)]
    rows.sort(key=lambda row: -row.value)
    made = {
        "id": kind.lower(), "subject": "tiny-int8", "kind": kind, "headline": f"{kind}: 1 of 30 layers",
        "query": {"text": "outlier_tokens(threshold=64) at the output of 'layers'", "unit": "tokens"}, "rows": rows,
        "bound": "max 4", "where": "gate.qsa.yaml:7", "positions": "no_sink", "sinks": "none", "run": RUN,
        "command": f"pytest gate.qsa.yaml::{kind.lower()}",
    }  # fmt: skip
    return Verdict(**(made | fields))


def token_of(text, **fields):
    made = {
        "layer": "model.layers.11", "sample": 2, "position": 5, "text": text, "before": "before ", "after": " after",
        "magnitude": 812.0, "ratio": 99.5, "channel": 507, "sink": False,
    }  # fmt: skip
    return TokenEvidence(**(made | fields))


def tokens_of(maxima):
    return histogram("tokens", np.array(maxima, dtype=np.float64), np.ones(len(maxima), dtype=np.int64))


def page_of(tmp_path, *verdicts, session=SESSION):
    return write_report([to_plain(verdict) for verdict in verdicts], tmp_path / "out", session).read_text("utf-8")


def test_each_run_is_kept_beside_the_latest_and_only_marked_ones_are_removed(tmp_path):
    for number in range(MOST_RUNS + 2):
        run = tmp_path / f"runs/20260101T0000{number:02}Z-1"
        latest = write_run([to_plain(verdict_of(id=f"run{number}"))], run, SESSION)
        if number == 1:
            (run / MARKER).unlink()  # now a user's own folder
    kept = sorted(int(path.name[13:15]) for path in (tmp_path / "runs").iterdir())
    assert kept == [1, *range(2, MOST_RUNS + 2)]
    assert latest == tmp_path / "report.html"
    assert latest.read_bytes() == (run / "report.html").read_bytes()
    assert f"run{MOST_RUNS + 1}" in (tmp_path / "report.json").read_text()


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.marks, self.scripts, self._open, self.text = [], [], [], [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "mark":
            self.marks.append("")

    def handle_endtag(self, tag):
        while tag in self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data):
        if "mark" in self._open:
            self.marks[-1] += data
        if "script" in self._open:
            self.scripts.append(data.strip())
        if not {"script", "style"} & set(self._open):
            self.text += data


def test_the_json_is_versioned_and_every_parser_reads_it(tmp_path):
    rows = [Row("a", math.nan, None, math.inf, None, -math.inf), Row("b", 1.0, None, 2.0, None, 0.0)]
    page_of(tmp_path, verdict_of(rows=rows))

    content = json.loads((tmp_path / "out/report.json").read_text("utf-8"), parse_constant=pytest.fail)

    assert content["schema"] == "qsa-report/1"
    assert content["session"] == SESSION
    (result,) = content["results"]
    assert (result["kind"], result["failed"]) == ("REGRESSION", True)
    assert [result["rows"][0][key] for key in ("value", "high", "excess")] == ["NaN", "Infinity", "-Infinity"]
    assert result["rows"][1]["used"] == 0.5


def test_a_lower_bound_has_a_share_that_is_used_and_infinity_uses_none(tmp_path):
    rows = [Row("a", 20.0, 15.0, None, None, 0.0), Row("b", math.inf, 15.0, None, None, 0.0, 1),
            Row("c", -3.0, 15.0, None, None, -18.0, 2)]  # fmt: skip
    assert [row.used for row in rows] == [0.75, 0.0, math.inf]
    text = Page(page_of(tmp_path, verdict_of(rows=rows))).text
    for part in ("∞", "75 %", "At least"):
        assert part in text, part
    content = json.loads((tmp_path / "out/report.json").read_text("utf-8"), parse_constant=pytest.fail)
    assert content["results"][0]["rows"][1]["value"] == "Infinity"


def test_the_reference_is_named_and_its_numbers_stand_beside_the_models(tmp_path):
    run = replace(RUN, reference=ModelProvenance("checkpoints/tiny", weights=f"sha256:{'cd34' * 16}"))
    rows = [Row(name, 3.0, None, 4.0, None, 0.0, reference=2.25) for name in "ab"]
    page = Page(page_of(tmp_path, verdict_of(rows=rows, run=run)))
    for part in ("checkpoints/tiny-int8", "checkpoints/tiny", "cd34cd34cd34", "Reference", "2.25"):
        assert part in page.text, part
    (table,) = (json.loads(script) for script in page.scripts if script.startswith('{"columns"'))
    assert [row["cells"][0]["reference"] for row in table["rows"]] == [2.25, 2.25]


def test_a_plain_verdict_crosses_to_the_controller_of_xdist_unchanged():
    odd = {"path": Path("a/b"), "count": np.int64(3), "share": np.float32(0.5), 7: (1, 2), "kinds": {Kind.INFRA}}
    run = Provenance(data=DataProvenance("wikitext2", odd))
    plain = to_plain(
        verdict_of(
            run=run,
            evidence=[token_of("lone \ud800 surrogate", patch=Patch(1, 2, 4, 4))],
            artefacts={"value": Path("v.png")},
        )
    )

    assert execnet.loads(execnet.dumps(plain)) == plain
    assert plain["run"]["data"] == {
        "source": "wikitext2", "path": "a/b", "count": 3, "share": 0.5, "7": [1, 2], "kinds": ["INFRA"],
    }  # fmt: skip
    assert type(plain["kind"]) is str
    assert plain["evidence"][0]["patch"] == [1, 2, 4, 4]
    assert plain["evidence"][0]["text"] == r"lone \ud800 surrogate"
    assert json.loads(json.dumps(plain)) == plain


def test_the_worst_comes_first_and_what_passed_is_collapsed(tmp_path):
    page = Page(page_of(
        tmp_path, verdict_of(Kind.PASSED, 2.0), verdict_of(Kind.WARNED), verdict_of(Kind.INFRA, rows=[]),
        verdict_of(Kind.REGRESSION, 5.0, id="mild"), verdict_of(Kind.REGRESSION, 50.0, id="severe"),
    ))  # fmt: skip

    cards = [attrs for tag, attrs in page.tags if tag == "details" and "card" in attrs.get("class", "").split()]
    assert [card["data-kind"] for card in cards] == ["REGRESSION", "REGRESSION", "INFRA", "WARNED", "PASSED"]
    assert page.text.index("severe") < page.text.index("mild")
    assert ["open" in card for card in cards] == [True, True, True, True, False]
    assert "3 of 5 assertions failed" in page.text


@pytest.mark.parametrize(
    ("verdicts", "kind", "text"),
    [
        ([], "ANOMALOUS", "No assertion was judged"),
        ([verdict_of(Kind.PASSED, 2.0)], "PASSED", "The assertion holds"),
        ([verdict_of(Kind.PASSED, 2.0), verdict_of(Kind.WARNED)], "WARNED", "All 2 assertions hold, 1 with a warning"),
    ],
)
def test_the_top_of_the_page_tells_green_from_warned_and_from_nothing_at_all(tmp_path, verdicts, kind, text):
    page = Page(page_of(tmp_path, *verdicts, session={}))
    assert ("div", {"class": f"verdict {kind.lower()}"}) in page.tags
    assert text in page.text


def scripts_of(page):
    """Return how many scripts a page has: its own, and one for each set of data."""
    return sum(tag == "script" for tag, _ in page.tags)


def test_hostile_text_anywhere_is_shown_and_breaks_nothing(tmp_path):
    hostile = dict.fromkeys(
        ("id", "subject", "headline", "bound", "where", "reason", "sinks", "command", "accept"), HOSTILE
    )
    html = page_of(tmp_path, verdict_of(
        **hostile, hints=[HOSTILE], evidence=[token_of(HOSTILE, before=HOSTILE, after=HOSTILE, layer=HOSTILE)],
        run=Provenance(evals={HOSTILE: HOSTILE}, data=DataProvenance(HOSTILE, {HOSTILE: HOSTILE})),
        rows=[Row(HOSTILE, 9.0, None, 4.0, None, 5.0)], artefacts={HOSTILE: "gone.png"},
    ), session={HOSTILE: HOSTILE})  # fmt: skip

    page = Page(html)
    plain = page_of(tmp_path, verdict_of(rows=[Row("x", 9.0, None, 4.0, None, 5.0)]))
    assert scripts_of(page) == scripts_of(Page(plain))
    assert page.marks == ["</script><script>alert(1)</script>\"'U+202EU+200F\\x1b[0m\\x00<mark>&amp;"]
    tokens = html[html.index('<p class="context"') : html.index("</mark>")]
    assert not set(tokens) & set("\u202e\u200f\x1b\x00")
    assert tokens.count("<bdi>") == 2


def test_hostile_text_in_the_data_of_the_layers_ends_no_script(tmp_path):
    rows, plain = (
        [Row(f"{name}{i}", 9.0, None, 4.0, None, 5.0, i) for i in range(2)] for name in (f"{HOSTILE}<!--<script>", "x")
    )
    page = Page(page_of(tmp_path, verdict_of(rows=rows, histograms={HOSTILE: [tokens_of([1.0, 2.0])]})))

    assert scripts_of(page) == scripts_of(Page(page_of(tmp_path, verdict_of(rows=plain))))
    (data,) = (text for text in page.scripts if text.startswith("{"))
    assert json.loads(data)["rows"][0]["layer"].startswith("</script><script>")
    assert not set(data) & set("<>&\u202e\x00")


def test_the_page_of_a_model_of_30_layers_stays_below_3_megabytes(tmp_path):
    kinds = ["mlp.down_proj", "mlp.up_proj", "mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj", ""]
    layers = [f"model.layers.{i}.{kind}".rstrip(".") for i in range(LAYERS) for kind in kinds]
    values = np.exp(np.random.default_rng(0).normal(size=4000) * 4)
    histograms = {layer: [tokens_of(values), tokens_of(values) | {"of": "elements"}] for layer in layers}
    rows = [Row(layer, i / 7, None, 4.0, i / 9, 0.0, i) for i, layer in enumerate(layers)]
    picture = tmp_path / "value.png"
    picture.write_bytes(np.random.default_rng(0).bytes(60_000))  # larger than any figure of ours
    artefacts = {title: str(picture) for title in ("value", "outliers", "magnitude")}
    verdicts = [verdict_of(id=f"a{i}", rows=rows, histograms=histograms, artefacts=artefacts) for i in range(6)]

    assert len(page_of(tmp_path, *verdicts).encode()) < 3_000_000
    assert (tmp_path / "out/report.json").stat().st_size < 1_500_000


def rows_of(kind, values, high=4.0):
    return [Row(f"model.layers.{i}.{kind}", v, None, high, None, max(v - high, 0.0), i) for i, v in enumerate(values)]


def test_of_very_many_layers_and_problems_the_page_has_the_worst_and_says_so():
    rows = [{"layer": f"layers.{index}"} for index in range(MOST_ROWS + 1)]
    findings = [{"tensor": str(index)} for index in range(MOST_LISTED + 1)]
    result = {"rows": rows, "findings": findings, "hints": ["one"]}
    page = shortened(result)
    assert (page["rows"], page["findings"]) == (rows[:-1], findings[:-1])
    assert page["hints"][1] == (
        "this page has the 10,000 worst of 10,001 layers and the first 1,000 of 1,001 problems; report.json has all"
    )
    assert shortened({**result, "rows": rows[1:], "findings": findings[1:]})["hints"] == ["one"]


def test_layers_out_of_bounds_are_counted_by_kind_whole_kinds_first(tmp_path):
    q_proj, down_proj = rows_of("self_attn.q_proj", [7, 8, 6]), rows_of("mlp.down_proj", [1, 9, 1])
    rows = [*down_proj, *q_proj, *rows_of("mlp.up_proj", [1, 1])]
    page = page_of(tmp_path, verdict_of(rows=rows, id="drift"), verdict_of(rows=q_proj[:1], id="single"))
    section = page.partition('id="kinds"')[2].partition("</section>")[0]
    cells = [re.sub("<[^>]*>", "", cell) for cell in re.findall("<t[hd][ >].*?</t[hd]>", section)]
    assert cells[4:] == [
        "model.layers.*.self_attn.q_proj", "3 of 3", "drift", f"8 at {q_proj[1].layer}",
        "model.layers.*.mlp.down_proj", "1 of 3", "drift", f"9 at {down_proj[1].layer}",
    ]  # fmt: skip


def test_the_kinds_are_left_out_where_no_layer_is_out_of_bounds(tmp_path):
    waived = [replace(row, waived=True) if row.excess else row for row in rows_of("mlp.down_proj", [1, 9, 1])]
    page = page_of(tmp_path, verdict_of(Kind.PASSED, worst=2.0), verdict_of(Kind.WARNED, rows=waived))
    assert "by kind of layer" not in page


def test_every_layer_stands_once_with_the_numbers_of_all_its_assertions(tmp_path):
    rows = [Row(f"model.layers.{i}", i / 10, None, 1.0, 0.5, 0.0, i) for i in (9, 10)]
    page = Page(page_of(tmp_path, verdict_of(), verdict_of(id="second", rows=rows)))
    (data,) = (json.loads(text) for text in page.scripts if text.startswith("{"))

    assert [row["layer"] for row in data["rows"]] == [f"model.layers.{i}" for i in range(LAYERS)]
    assert [column["id"] for column in data["columns"]] == ["regression", "second"]
    nine, eleven = data["rows"][9], data["rows"][11]
    assert [cell["value"] for cell in nine["cells"]] == [1.09, 0.9]
    assert nine["used"] == 0.8  # |0.9 − 0.5| of the allowed 0.5, against 1.09 of 4
    assert (eleven["out"], eleven["used"], eleven["cells"][1]) == (True, 2.25, None)
    assert [(strip["name"], len(strip["cells"]), strip["out"]) for strip in data["strips"]] == [
        ("model.layers.*", LAYERS, 1)
    ]
    assert data["order"][:2] == [11, 10]  # the worst first


def test_experts_have_the_table_of_their_card_and_none_among_the_layers(tmp_path):
    query = {"text": "expert_tokens()", "unit": "tokens", "of": "experts"}
    rows = [Row(f"model.layers.0.mlp.experts[{index}]", 3.0, 1.0, None, None, 0.0, index) for index in range(40)]
    page = Page(page_of(tmp_path, verdict_of(rows=rows, query=query), verdict_of(id="blocks")))
    assert "All 40 experts" in page.text
    (table,) = (json.loads(script) for script in page.scripts if script.startswith('{"columns"'))
    assert len(table["rows"]) == LAYERS


def test_a_waived_layer_is_not_counted_as_out_of_bounds_anywhere(tmp_path):
    rows = [Row(f"model.layers.{i}", 9.0, None, 4.0, None, 5.0, i, waived=i == 1) for i in range(3)]
    page = Page(page_of(tmp_path, verdict_of(rows=rows)))
    (data,) = (json.loads(text) for text in page.scripts if text.startswith("{"))

    assert [row["out"] for row in data["rows"]] == [True, False, True]
    assert "2 of 3" in page.text
    assert sum(tag == "tr" and attrs.get("class") == "out" for tag, attrs in page.tags) == 2 * 2  # in both tables


def test_what_must_equal_a_number_is_not_near_its_limit_where_it_does(tmp_path):
    rows = [Row(f"model.layers.{i}", 507.0, 507.0, 507.0, None, 0.0, i) for i in range(3)]
    assert 'class="near"' not in page_of(tmp_path, verdict_of(Kind.PASSED, rows=rows))


def test_a_curve_is_drawn_by_the_page_instead_of_its_picture_and_is_not_in_the_json(tmp_path):
    picture = tmp_path / "magnitude.png"
    picture.write_bytes(bytes(40))
    curve = {
        "title": f"Magnitude {HOSTILE}",
        "layers": ["model.layers.3", "model.layers.4"],
        "lines": {"top1": [3.0, math.inf]},
        "bars": [{"title": "By text", "bars": [{"name": HOSTILE, "count": 3, "share": 1.0}], "more": 2}],
    }
    page = Page(page_of(tmp_path, verdict_of(artefacts={"magnitude": str(picture)}, curves={"magnitude": curve})))
    assert not any(tag == "img" for tag, _ in page.tags)
    (data,) = (json.loads(text) for text in page.scripts if text.startswith('{"title"'))
    assert data["lines"]["top1"] == [3.0, "Infinity"]
    assert "and 2 more" in page.text
    assert "curves" not in json.loads((tmp_path / "out/report.json").read_text())["results"][0]


def test_the_page_needs_nothing_but_itself(tmp_path):
    picture = tmp_path / "value.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    artefacts = {"outliers": str(picture), "magnitude": str(tmp_path / "gone.png"), "report": "out/report.html"}

    html = page_of(tmp_path, verdict_of(artefacts=artefacts))
    page = Page(html)

    links = [
        value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "action", "data")
    ]
    assert all(link.startswith(("data:", "#")) for link in links)
    assert sum(tag == "img" for tag, _ in page.tags) == 1
    named = html.replace("http://www.w3.org/2000/svg", "")  # the name of a namespace, never fetched
    assert not re.search(r"https?://|@import|url\((?!#)|fetch\(|XMLHttpRequest", named)
    assert any("default-src 'none'" in (attrs.get("content") or "") for tag, attrs in page.tags if tag == "meta")
    assert "The picture is missing" in page.text
    assert "gone.png" in page.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.html", "report.json"]


def test_a_card_says_all_that_is_needed_to_act(tmp_path):
    text = Page(page_of(tmp_path, verdict_of(
        reason="it cost us accuracy", hints=["look at layer 11"], accept="pytest gate.qsa.yaml --snapshot-update",
        since="made with tiny-fp16", evidence=[token_of("tok"), token_of("tok", layer="model.layers.12", ratio=80.0)],
    ))).text  # fmt: skip

    for part in (
        "REGRESSION", "1 of 30 layers", "it cost us accuracy", "max 4", "225 %", "gate.qsa.yaml:7", "look at layer 11",
        "positions without the attention sinks", "pytest gate.qsa.yaml::regression", "--snapshot-update",
        "made with tiny-fp16", "99.5 × median", "sample 2, position 5", "also at model.layers.12",
    ):  # fmt: skip
        assert part in text, part


def test_the_provenance_is_shown_whatever_its_keys(tmp_path):
    text = Page(page_of(tmp_path, verdict_of(), session={**SESSION, "new": "fact"})).text
    for part in (
        "ab12ab12ab12",
        f"sha256:{'ab12' * 16}",
        "data.an_unknown_key.of",
        "the, future",
        "counts.failed",
        "fact",
    ):
        assert part in text, part


@pytest.mark.process
def test_a_report_names_its_tokenizer_by_content_whatever_it_was_called_with(own_project, llama):
    from transformers import AutoTokenizer

    from pytest_qsa.engine.load.tokenizer import tokenizer_identity

    tokenizer = AutoTokenizer.from_pretrained(llama)
    own_project.write("gate.qsa.yaml", suite(llama, peaks("max: 1")))
    own_project.pytest("gate.qsa.yaml")
    (told,) = {result["run"]["model"]["tokenizer"] for result in own_project.json("qsa-results/report.json")["results"]}

    tokenizer("some text", truncation=True, max_length=2)
    assert told == tokenizer_identity(tokenizer)
    assert f", {len(tokenizer)} entries, sha256 " in told
    assert told in own_project.read("qsa-results/report.html")
    tokenizer.add_tokens(["another"])
    assert tokenizer_identity(tokenizer) != told


@pytest.mark.process
def test_a_report_can_be_made_where_there_is_no_torch_and_no_pytest():
    code = "import sys, pytest_qsa.report.page; print(*{'torch', 'pytest', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""


@pytest.fixture
def opened(tmp_path, opened_page):
    """Return a function that makes a report and opens it."""

    def open_report(*verdicts, **options):
        page_of(tmp_path, *verdicts)
        return opened_page(tmp_path / "out/report.html", **options)

    return open_report


def column(page, number):
    return page.locator(".card .layers tbody tr:visible").evaluate_all(
        f"rows => rows.map(row => row.cells[{number}].innerText)"
    )


@pytest.mark.process
@pytest.mark.browser
def test_the_table_of_layers_sorts_by_number_and_by_depth_with_the_keyboard(opened):
    page = opened(verdict_of())
    page.locator(".card .layers > summary").click()
    assert column(page, 0)[:3] == ["model.layers.0", "model.layers.1", "model.layers.2"]

    page.locator(".card").get_by_role("button", name="Value").press("Enter")
    assert column(page, 0)[:2] == ["model.layers.11", "model.layers.29"]
    assert page.locator(".card th[aria-sort]").all_inner_texts() == ["Value"]
    assert page.locator(".card th[aria-sort]").get_attribute("aria-sort") == "descending"

    page.locator(".card").get_by_role("button", name="Value").press("Enter")
    assert column(page, 0)[0] == "model.layers.0"
    page.locator(".card").get_by_role("button", name="Layer", exact=True).press("Space")
    assert column(page, 0)[9:11] == ["model.layers.9", "model.layers.10"]


@pytest.mark.process
@pytest.mark.browser
def test_the_table_of_layers_filters_by_name_and_by_what_is_out_of_bounds(opened):
    page = opened(verdict_of())
    page.locator(".card .layers > summary").click()
    page.locator(".card .filter").fill("layers.2")
    assert len(column(page, 0)) == 11
    assert page.locator(".card .shown").inner_text() == "11 of 30"
    page.locator(".card .filter").fill("")
    page.locator(".card .only-out").check()
    assert column(page, 0) == ["model.layers.11"]


@pytest.mark.process
@pytest.mark.browser
def test_a_layer_opens_its_distributions_with_the_keyboard_and_takes_them_along_when_sorted(opened):
    page = opened(verdict_of(histograms={"model.layers.11": [tokens_of([1.0, 1.0, 1.5, 90.0])]}))
    layers = page.locator("#layers")
    layers.get_by_role("button", name="model.layers.11", exact=True).press("Enter")

    opened_row = layers.locator("tr.detail")
    assert "regression 9 tokens ◆ ≤ 4 · 225 % used" in " ".join(opened_row.inner_text().split())
    bars = opened_row.locator("rect")
    assert bars.evaluate_all("bars => bars.map(bar => bar.textContent)") == [
        "1 to 1.189: 2", "1.414 to 1.682: 1", "76.11 to 90.51: 1",
    ]  # fmt: skip
    assert opened_row.locator("svg").get_attribute("aria-label").endswith("4 tokens, median 1, largest 90")

    layers.get_by_role("button", name="Used").press("Enter")  # the worst were first: now they are last
    assert layers.locator("tbody tr").last.get_attribute("class") == "detail"
    layers.get_by_role("button", name="Used").press("Enter")
    assert layers.locator("tbody tr").nth(1).get_attribute("class") == "detail"
    layers.locator(".filter").fill("layers.3")
    assert opened_row.is_hidden()
    layers.locator(".filter").fill("")
    layers.get_by_role("button", name="model.layers.11", exact=True).press("Space")
    assert opened_row.is_hidden()
    layers.get_by_role("button", name="model.layers.3", exact=True).click()
    assert "--qsa-report=always" in layers.locator("tr.detail:visible").inner_text()


@pytest.mark.process
@pytest.mark.browser
def test_a_distribution_is_drawn_over_the_reference_s_and_else_beside_the_baseline(opened):
    ours, theirs = tokens_of([1.0, 1.0, 1.5, 90.0]), {**tokens_of([1.0, 2.0]), "whose": "reference"}
    rows = [Row(f"model.layers.{i}", 3.0, 1.0, 4.0, 2.0, 0.0, i) for i in (11, 12)]
    query = {"metric": "magnitude", "site": "output"}
    histograms = {"model.layers.11": [ours, theirs], "model.layers.12": [ours]}
    page = opened(verdict_of(Kind.PASSED, rows=rows, query=query, histograms=histograms))
    layers = page.locator("#layers")
    layers.get_by_role("button", name="model.layers.11", exact=True).click()
    assert layers.locator("tr.detail path.other title").text_content() == "reference: median 1, largest 2"
    assert layers.locator("tr.detail .histogram").count() == 1
    assert layers.locator("tr.detail line.baseline").count() == 0
    layers.get_by_role("button", name="model.layers.12", exact=True).click()
    assert layers.locator("tr.detail line.baseline").count() == 1
    assert "dashed: baseline 2" in layers.locator("tr.detail").last.inner_text()


@pytest.mark.process
@pytest.mark.browser
def test_a_curve_says_the_numbers_of_a_layer_and_a_click_opens_it(opened):
    lines = {"top1": [3.0, 900.0], "median": [1.0, 2.0]}
    curve = {"title": "Magnitudes", "layers": ["model.layers.3", "model.layers.4"], "lines": lines}
    page = opened(verdict_of(curves={"magnitude": curve}))
    plot = page.locator(".plot.lines")
    plot.locator("svg").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert plot.locator(".readout").inner_text() == "model.layers.4: top1 900 · median 2"
    assert plot.locator(".keys span").all_inner_texts() == ["top1", "median"]
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#layer=model.layers.4"


@pytest.mark.process
@pytest.mark.browser
def test_a_cell_of_the_heat_strip_opens_its_layer_even_if_it_was_filtered_away(opened):
    page = opened(verdict_of())
    page.locator("#layers .filter").fill("layers.3")
    page.locator("#layers .strip i").nth(11).click()
    assert page.locator("#layers tr.detail:visible").count() == 1
    assert page.evaluate("document.activeElement.textContent") == "model.layers.11"


@pytest.mark.process
@pytest.mark.browser
def test_assertions_are_found_by_kind_and_by_word(opened):
    page = opened(verdict_of(evidence=[token_of(HOSTILE)]), verdict_of(Kind.WARNED), verdict_of(Kind.PASSED, 2.0))
    assert page.locator("mark").inner_text().startswith("</script><script>alert(1)</script>")
    page.get_by_role("button", name="Warned 1").click()
    assert page.locator(".card:visible .id").all_inner_texts() == ["warned"]
    page.get_by_role("button", name="All 3").click()
    page.get_by_label("Find an assertion").fill("passed")
    assert page.locator(".card:visible .id").all_inner_texts() == ["passed"]
    page.get_by_label("Find an assertion").fill("nothing like it")
    assert page.get_by_text("No assertion matches.").is_visible()


@pytest.mark.process
@pytest.mark.browser
def test_the_page_follows_the_systems_theme_until_told_otherwise(opened):
    page = opened(verdict_of(), color_scheme="dark")

    def brightness():
        return sum(map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))))

    assert brightness() < 150
    page.get_by_role("button", name="Switch between light and dark").press("Enter")
    assert brightness() > 600
    page.reload()
    assert brightness() > 600
    page.emulate_media(media="print")
    assert page.locator("#theme").is_hidden()


@pytest.mark.process
@pytest.mark.browser
def test_a_command_is_copied_as_it_is(opened):
    page = opened(
        verdict_of(command="pytest 'gate.qsa.yaml::a \"b\"' --qsa-set 'x=<1>'"), permissions=["clipboard-read"]
    )
    page.locator(".card .copy").click()
    page.get_by_role("button", name="Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == "pytest 'gate.qsa.yaml::a \"b\"' --qsa-set 'x=<1>'"


def of_subjects(*subjects):
    """Return verdicts of a bound and of a drift for each subject: hundreds of layers of many kinds."""
    kinds = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm"]
    names = [f"model.layers.{layer}.{kind}" for layer in range(60) for kind in kinds]
    rows = [Row(name, 1.0 + index / 400, None, 4.0, None, 0.0, index) for index, name in enumerate(names)]
    return [verdict_of(Kind.PASSED, subject=subject, id="bound", rows=rows) for subject in subjects]


@pytest.mark.process
@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 768, 1440])
def test_no_width_scrolls_the_page_sideways(opened, tmp_path, width):
    from pytest_qsa.report.plots.style import new_figure, save_png

    picture = save_png(new_figure(4.0), tmp_path / "magnitude.png")
    long = "model." + "a_module_with_a_name_beyond_all_measure." * 6 + "proj"
    odd = verdict_of(
        id="an-id." * 30, evidence=[token_of("x" * 400, layer=long)], artefacts={"magnitude": picture},
        command="c" * 300,
        rows=[Row(long, 9.0, 1.0, 4.0, 2.0, 5.0), Row(long + "2", 9.0, 1.0, 4.0, 2.0, 5.0)],
    )  # fmt: skip
    page = opened(odd, *of_subjects("w8a8", "w4a16", "a-name-that-is-long" * 4), width=width)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    page.locator(".plot svg").last.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".picture img").evaluate("image => image.naturalWidth") == 1080
    # The text of a plot is as large on a phone as anywhere.
    assert page.locator(".plot svg").first.evaluate(
        "svg => svg.getBoundingClientRect().width <= svg.viewBox.baseVal.width"
    )


def test_the_finding_stands_first_with_all_failures_that_are_about_it(tmp_path):
    rows = [Row("model.layers.11", 12.8, 5.8, 7.0, 6.4, 5.8, 11), Row("model.layers.12", 1.0, None, 4.0, 1.0, 0.0, 12)]
    drift = verdict_of(id="drift", rows=rows, headline="model.layers.11: × 2", origin={"files": "its scale is × 2"})
    text = Page(page_of(tmp_path, verdict_of(id="bound"), drift, verdict_of(Kind.PASSED, 2.0))).text
    first = " ".join(text[: text.index("All 3")].split())
    assert "model.layers.11: × 2 its scale is × 2 2 failures: drift, bound" in first
    assert "model.layers.*1 of 30 out of bounds Run it again pytest gate.qsa.yaml::regression" in first
    assert text.index("What was tested", len(first)) > text.index("All layers", len(first))


def test_a_page_without_a_failure_says_what_is_nearest_to_its_limit(tmp_path):
    html = page_of(tmp_path, verdict_of(Kind.PASSED, 3.4), verdict_of(Kind.PASSED, 2.0, id="far"))
    text = " ".join(Page(html).text.split())
    assert "Closest to its limit: passed on tiny-int8, which uses 85 % of what is allowed." in text
    assert html.count('<i class="near"') == 1
    assert 'class="meter near"' in html


def test_several_subjects_have_one_row_a_layer_and_a_strip_each(tmp_path):
    page = Page(page_of(tmp_path, verdict_of(subject="w8a8"), verdict_of(Kind.PASSED, 2.0, subject="w4a16")))
    (data,) = (json.loads(text) for text in page.scripts if text.startswith("{"))
    assert len(data["rows"]) == LAYERS
    assert [cell["value"] for cell in data["rows"][11]["cells"]] == [9.0, 2.0]
    assert [(strip["subject"], strip["out"]) for strip in data["strips"]] == [("w8a8", 1), ("w4a16", 0)]


@pytest.mark.process
@pytest.mark.browser
def test_a_plot_tells_the_numbers_of_a_layer_and_a_click_opens_it_and_makes_a_link(opened):
    page = opened(verdict_of())
    plot = page.locator(".card .plot")
    plot.locator("svg").focus()
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    assert plot.locator(".readout").inner_text() == "model.layers.11: 9 · ≤ 4 · 225 % used"
    box = plot.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + 50)
    assert plot.locator(".readout").inner_text().startswith("model.layers.29: 1.29")
    page.mouse.click(box["x"] + box["width"] - 20, box["y"] + 50)
    assert page.locator("#layers tr.detail:visible").count() == 1
    assert page.evaluate("document.activeElement.textContent") == "model.layers.29"
    assert page.evaluate("location.hash") == "#layer=model.layers.29"
    page.evaluate("location.hash = '#layer=model.layers.7'")
    page.wait_for_function("document.activeElement.textContent == 'model.layers.7'")


@pytest.mark.process
@pytest.mark.browser
def test_a_link_to_an_assertion_that_is_folded_opens_it(opened):
    page = opened(verdict_of(), verdict_of(Kind.PASSED, 2.0, id="quiet one"))
    assert page.locator("#a-quiet-one").get_attribute("open") is None
    page.evaluate("location.hash = '#a-quiet-one'")
    page.wait_for_function("document.getElementById('a-quiet-one').open")


def test_every_section_of_the_page_has_a_template_of_its_name():
    folder = Path(report_page.__file__).parent / "templates/report"
    assert {path.name.removesuffix(".html.j2") for path in folder.iterdir()} == set(report_page.PAGE_SECTIONS)


def of_many_layers(tmp_path, count):
    rows = [
        replace(row, layer=f"model.layers.{i // 256}.mlp.experts.{i % 256}.down_proj")
        for i, row in enumerate(rows_of("", np.random.default_rng(0).lognormal(0, 0.5, count).tolist()))
    ]
    compared = [replace(row, low=0.9 * row.value, high=1.2 * row.value, baseline=1.07 * row.value) for row in rows]
    write_report([to_plain(verdict_of(rows=compared))], tmp_path, SESSION)
    return tmp_path / "report.html"


def test_the_page_of_10_000_layers_stays_below_3_megabytes(tmp_path):
    assert of_many_layers(tmp_path, MOST_ROWS).stat().st_size < 3_000_000


@pytest.mark.browser
def test_the_tables_of_very_many_layers_are_unpacked_as_they_would_have_been_written(
    tmp_path, opened_page, monkeypatch
):
    texts, read = [], []
    for most, name in ((10_000, "packed"), (10**9, "plain")):
        monkeypatch.setattr(html, "MOST_PLAIN", most)
        file = of_many_layers(tmp_path / name, 600)
        assert ('<script type="text/plain" data-packed>' in file.read_text("utf-8")) == (name == "packed")
        page = opened_page(file)
        page.wait_for_selector("figure.plot svg")
        texts.append(
            page.evaluate("[...document.querySelectorAll('tbody, .strip')].map(each => each.innerHTML.trim())")
        )
        page.fill("#layers .filter", "experts.17.")
        page.hover("figure.plot svg")
        read.append([page.inner_text("#layers .shown"), page.inner_text("figure.plot .readout")])
    assert texts[0] == texts[1]
    assert read[0] == read[1]
    assert read[0][0] == "3 of 600"
    assert re.match(r"model\.layers\.1\.mlp\.experts\.\d+\.down_proj: .* baseline", read[0][1])
