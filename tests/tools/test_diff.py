"""`qsa diff`: what moved between two versions is told as it is, and nothing holds because nothing was compared."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys

import numpy as np
import pytest
import torch

from pytest_qsa import Capture, capture
from pytest_qsa.cli import main
from pytest_qsa.common import json_with_checksum
from pytest_qsa.tools.diff.changes import Change, Condition
from pytest_qsa.tools.diff.sides import DiffMeasure
from support import models
from support.projects import peaks, suite

SITES = [(r"down_proj$", "output"), (r"layers\.\d$", "output"), (r"down_proj$", "weight")]
CHANGED = "model.layers.1.mlp.down_proj"
LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with captures of a model, and of the same with one down projection three times as large."""
    folder = tmp_path_factory.mktemp("diff")
    batch = models.token_batch(2, 24)
    for name, factor in (("old", 1.0), ("new", 3.0)):
        model = models.llama()
        with torch.no_grad():
            model.get_submodule(CHANGED).weight *= factor
        capture(model, [batch], sites=SITES).save(folder / f"{name}.qsa")
    capture(models.llama(), [models.token_batch(2, 24, seed=7)], sites=SITES).save(folder / "other-tokens.qsa")
    return folder


@pytest.fixture
def qsa(folder, capsys, monkeypatch):
    """Return a function that runs `qsa diff` in the folder: exit code, what was printed, and the error."""
    monkeypatch.chdir(folder)

    def run(*words):
        code = main(["diff", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def rows(out):
    """Return the rows of the table of changes: (layer, measure) → old, new, change."""
    found = re.findall(r"^  (\S+) +(\S+ @\w+) +(\S+) +(\S+) +(\S+(?: %)?)$", out, flags=re.MULTILINE)
    return {(layer, measure): (float(old), float(new), change) for layer, measure, old, new, change in found}


def baseline(values, site="weight", data=None, **query):
    asked = {"definition": "rms/1", "site": site, **query}
    content = {"format": "qsa-baseline/1", "values": values, "query": asked, "data": data, "made_with": {"model": "m"}}
    return json.dumps(content, indent=2)


def test_the_layers_that_moved_are_listed_worst_first_with_their_numbers(qsa):
    code, out, _ = qsa("old.qsa", "new.qsa")
    changes = rows(out)
    weight = models.llama().get_submodule(CHANGED).weight.detach().double().numpy()
    rms = float(np.sqrt((weight**2).mean()))

    assert code == 0
    assert changes[CHANGED, "rms @weight"] == (pytest.approx(rms, rel=1e-3), pytest.approx(3 * rms, rel=1e-3), "+200 %")
    assert changes[CHANGED, "magnitude.top1 @output"][2] == "+200 %"
    assert ("model.layers.0.mlp.down_proj", "rms @weight") not in changes
    sizes = [abs(float(change.rstrip(" %").replace("−", "-"))) for *_, change in changes.values() if change != "from 0"]
    assert sizes == sorted(sizes, reverse=True)


def test_a_summary_says_how_many_layers_of_each_measure_moved(qsa):
    _, out, _ = qsa("old.qsa", "new.qsa")
    (line,) = [line.split() for line in out.splitlines() if line.startswith("  rms @weight ") and CHANGED in line]
    assert line[2:8] == [str(LAYERS), "1", "0", "%", "+200", "%"]


def test_equal_sides_have_no_change(qsa):
    code, out, _ = qsa("old.qsa", "old.qsa", "--fail-on", "magnitude.top1 > 0%", "--fail-on", "new_outliers > 0")
    assert code == 0
    assert "0 numbers moved" in out


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("magnitude.top1 > 5%", 1), ("rms@weight > +150%", 1), ("rms@weight > 250%", 0), ("rms@weight < -1%", 0),
        ("magnitude.top1 @output > 0.001", 1),
    ],
)  # fmt: skip
def test_a_condition_fails_where_a_layer_breaks_it_and_only_there(qsa, condition, code):
    got, out, _ = qsa("old.qsa", "new.qsa", "--fail-on", condition)
    assert got == code
    assert (f"FAILED  {condition}" in out) == (code == 1)


def test_a_direction_is_told_from_its_opposite(qsa):
    assert qsa("new.qsa", "old.qsa", "--fail-on", "rms@weight > +1%")[0] == 0
    assert qsa("new.qsa", "old.qsa", "--fail-on", "rms@weight < -1%")[0] == 1


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("magnitud.top1 > 5%", "unknown metric 'magnitud' (did you mean 'magnitude'?)"),
        ("magnitude.top9 > 5%", "stat is one of top1"),
        ("rms.top1 > 5%", "rms has no stat"),
        ("magnitude.top1", "write METRIC[.STAT][@SITE] > NUMBER[%]"),
        ("__import__('os') > 1", "write METRIC"),
        ("rms < 5%", "a fall is '< -5%'"),
    ],
)
def test_a_wrong_condition_is_one_line_that_says_what_to_write(qsa, condition, message):
    code, out, err = qsa("old.qsa", "new.qsa", "--fail-on", condition)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_a_condition_on_what_was_not_compared_fails(qsa):
    code, _, err = qsa("old.qsa", "new.qsa", "--fail-on", "rms@input > 5%")
    assert code == 1
    assert "don't have it in common" in err


def test_other_tokens_are_an_error_for_activations_and_not_for_weights(qsa, folder):
    code, _, err = qsa("old.qsa", "other-tokens.qsa")
    assert (code, err.count("\n")) == (1, 1)
    assert "other tokens" in err
    for name, tokens in (("a", "sha256:1"), ("b", "sha256:2")):
        (folder / f"{name}.json").write_text(baseline({"x": 1.0}, data=tokens))
        (folder / f"{name}-out.json").write_text(baseline({"x": 1.0}, site="output", data=tokens))
    assert qsa("a.json", "b.json")[0] == 0
    assert "other tokens" in qsa("a-out.json", "b-out.json")[2]


def test_another_definition_is_an_error(qsa, folder):
    (folder / "v1.json").write_text(baseline({"x": 1.0}))
    (folder / "v2.json").write_text(baseline({"x": 1.0}, definition="rms/2"))
    code, _, err = qsa("v1.json", "v2.json")
    assert code == 1
    assert "rms/1 and rms/2" in err


def test_a_layer_that_vanished_breaks_a_condition_on_it(qsa, folder):
    (folder / "two.json").write_text(baseline({"x": 1.0, "y": 1.0}))
    (folder / "one.json").write_text(baseline({"x": 1.0}))
    code, out, _ = qsa("two.json", "one.json", "--fail-on", "rms > 5%")
    assert code == 1
    assert "y: vanished" in out
    assert "1 layers vanished under rms @weight: y" in out
    assert qsa("two.json", "one.json")[0] == 0


def test_numbers_that_are_not_finite_come_first_and_break_a_condition(qsa, folder):
    measure = DiffMeasure("rms", "weight")
    change = Change(measure, "x", 1.0, math.nan, 0)
    assert change.size == math.inf
    assert Condition.parse("rms > 5%")._broken(change)
    assert Condition.parse("rms > +5%")._broken(change)
    assert not Condition.parse("rms > 5%")._broken(Change(measure, "x", math.inf, math.inf, 0))
    assert Change(measure, "x", 0.0, 1.0, 0).relative == math.inf


def test_what_equals_its_reference_is_at_infinite_decibels_and_stays_reaches_or_leaves_them(qsa, folder):
    layers = {"same": ("Infinity", "Infinity"), "reached": (30.0, "Infinity"), "left": ("Infinity", 30.0)}
    for side, name in enumerate(("before", "after")):
        values = {layer: pair[side] for layer, pair in layers.items()}
        (folder / f"{name}.json").write_text(baseline(values, definition="sqnr/1", site="output", by="tensor"))
    conditions = [word for text in ("sqnr > 1%", "sqnr > 3", "sqnr < -1%") for word in ("--fail-on", text)]
    code, out, _ = qsa("before.json", "after.json", *conditions, "--html", "d.html")
    lines = [" ".join(line.split()) for line in out.splitlines()]

    assert code == 1
    assert "2 numbers moved by more than 1 %, worst first" in lines
    assert "reached sqnr @output 30 ∞ dB better: equal now" in lines
    assert "left sqnr @output ∞ dB 30 equal no more" in lines
    assert "FAILED sqnr > 1%: in 2 layers" in lines
    assert "FAILED sqnr > 3: in 2 layers" in lines
    assert lines[lines.index("FAILED sqnr < -1%: in 1 layer") + 1] == "left: sqnr @output ∞ dB → 30 (equal no more)"
    assert "not finite" not in out + (folder / "d.html").read_text()
    assert qsa("after.json", "after.json")[1].count("0 numbers moved") == 1


def report_of(results):
    return json_with_checksum({"schema": "qsa-report/1", "results": results}).decode()


@pytest.mark.parametrize(("old", "new"), [(30.0, math.nan), (math.nan, math.inf), (30.0, -math.inf)])
def test_decibels_that_are_not_sound_stay_not_finite(old, new):
    assert Change(DiffMeasure("sqnr", "output"), "x", old, new, 0).text == "not finite"
    assert Change(DiffMeasure("rms", "output"), "x", 1.0, math.inf, 0).text == "not finite"


def test_a_checkpoint_is_sent_to_the_command_for_it(qsa, folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    assert "checkpoints are compared by `qsa compare`" in qsa("model", "old.qsa")[2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.txt", "hello", "neither a capture (.qsa), nor a baseline, nor a report.json"),
        ("other.json", '{"a": 1}', "neither a capture"),
        ("list.json", "[]", "neither a capture"),
        ("half.qsa", "broken", "can't be read as a capture"),
        ("gone.qsa", None, "gone.qsa: can't be read as a capture: No such file or directory\n"),
        ("half.json", report_of([{}]), "a damaged report.json"),
        ("empty.json", report_of([]), "no assertion in it was measured"),
        ("merge.json", '<<<<<<<\n"format": "qsa-baseline/1"', "the baseline can't be read"),
        ("gone.json", None, "No such file"),
    ],
)
def test_a_file_of_another_kind_is_one_line_that_names_it(qsa, folder, name, content, message):
    if content is not None:
        (folder / name).write_text(content)
    code, out, err = qsa(name, "old.qsa")
    assert code in (1, 2)
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_report_that_was_changed_after_it_was_written_is_refused(qsa, folder):
    (folder / "report.json").write_text(report_of([]).replace("[]", "[ ]"))
    code, _, err = qsa("report.json", "old.qsa")
    assert (code, err.count("\n")) == (1, 1)
    assert "report.json: its checksum differs: it was damaged, or changed after it was written" in err
    (folder / "report.json").write_text('{"schema": "qsa-report/1", "results": []}')
    err = qsa("report.json", "old.qsa")[2]
    assert err.startswith("qsa: warning: report.json has no checksum, as those of earlier versions")


def test_new_and_lost_outlier_tokens_are_shown_in_context(qsa, folder):
    old = Capture.load(folder / "old.qsa")
    place = ("model.layers.2", "output")
    numbers = old.sites[place]
    maxima = numbers.token_max.copy()
    maxima[24 + 5] = 1000 * np.median(maxima)
    pieces = {int(token): f"<{token}>" for ids in old.tokens for token in ids}
    sites = dict(old.sites) | {place: numbers.having((), {"token_max": maxima})}
    dataclasses.replace(old, sites=sites, pieces=pieces).save(folder / "outlier.qsa")
    said = f"⟦<{old.tokens[1][5]}>⟧"

    code, out, _ = qsa("old.qsa", "outlier.qsa", "--fail-on", "new_outliers > 0", "--html", "d.html")
    assert code == 1
    assert "1 new outlier token " in out
    assert "sample 1, position 5" in out
    assert said in out
    assert "<mark><bdi>&lt;" in (folder / "d.html").read_text()
    code, out, _ = qsa("outlier.qsa", "old.qsa", "--fail-on", "lost_outliers > 0")
    assert (code, "1 lost outlier token " in out) == (1, True)


def test_the_comment_for_a_pull_request_is_markdown_that_no_name_breaks(qsa, folder):
    (folder / "a.json").write_text(baseline({"x|<img src=x>@team`": 1.0, **{f"l.{i}": 1.0 for i in range(3000)}}))
    (folder / "b.json").write_text(baseline({"x|<img src=x>@team`": 9.0, **{f"l.{i}": 2.0 for i in range(3000)}}))
    code, _, _ = qsa("a.json", "b.json", "--markdown", "d.md", "--fail-on", "rms > 5%", "--top", 5000)
    text = (folder / "d.md").read_text()

    assert code == 1
    assert text.startswith("### ❌ 3001 numbers moved by more than 1 %")
    assert "| `` x\\|<img src=x>@team` `` | `rms @weight` | 1 | 9 | +800 % |" in text
    assert len(text.encode()) < 65_536
    assert text.rstrip().endswith("… cut; the report has all of it.")


@pytest.mark.process
def test_baselines_and_reports_of_a_run_can_be_compared_with_each_other(own_project, llama, changed_llama):
    own_project.write("gate.qsa.yaml", suite(
        llama, peaks("baseline: {rel: 0.05}"),
        "id: scales, metric: rms, layers: down_proj$, site: weight, baseline: {rel: 0.05}",
    ))  # fmt: skip
    assert own_project.pytest("gate.qsa.yaml", "--snapshot-update").code == 0
    run = own_project.pytest("gate.qsa.yaml", f"--qsa-model={changed_llama}", "--qsa-cache=cache")
    assert run.code == 1
    (cached,) = [name for name in own_project.files("cache") if name.endswith(".qsa")]
    program = (sys.executable, "-m", "pytest_qsa", "diff")

    for new in ("qsa-results/report.json", cached):
        done = own_project.program(*program, "qsa_baselines/llama", new, "--fail-on=rms@weight > 100%")
        assert done.returncode == 1, done.stderr
        assert rows(done.stdout)["model.layers.2.mlp.down_proj", "rms @weight"][2] == "+200 %"
        assert "tokens" in done.stdout
    done = own_project.program(
        *program, "qsa-results/report.json", "qsa_baselines::llama", "--fail-on=rms@weight > +1%"
    )
    assert done.returncode == 0


def test_several_subjects_have_to_be_told_apart(qsa, folder):
    for name, value in (("m1", 1.0), ("m2", 2.0)):
        (folder / "both" / name).mkdir(parents=True, exist_ok=True)
        (folder / "both" / name / "a.json").write_text(baseline({"x": value}))
    code, _, err = qsa("both", "old.qsa")
    assert (code, "PATH::SUBJECT" in err) == (2, True)
    assert "+100 %" in qsa("both::m1", "both::m2")[1]
    assert "under 'm3'" in qsa("both::m3", "both::m2")[2]


@pytest.mark.process
def test_no_model_is_loaded_and_no_torch(folder):
    code = (
        "import sys; from pytest_qsa.cli import main; main(['diff', *sys.argv[1:], '--html', sys.argv[1] + '.html']); "
        "print('heavy', [n for n in ('torch', 'transformers', 'matplotlib', 'pytest') if n in sys.modules])"
    )
    import subprocess

    done = subprocess.run(
        [sys.executable, "-c", code, folder / "old.qsa", folder / "new.qsa"], capture_output=True, text=True, check=True
    )
    assert done.stdout.rstrip().endswith("heavy []")


@pytest.mark.process
@pytest.mark.browser
def test_the_page_of_a_comparison_sorts_and_filters_and_fits_a_phone(qsa, folder, opened_page):
    qsa("old.qsa", "new.qsa", "--html", "page.html", "--fail-on", "rms > 5%")
    page = opened_page(folder / "page.html", width=390)

    # Red is what breaks a condition; what moved besides is only bold.
    red = page.locator("#changes tr.out th").all_inner_texts()
    assert red
    assert all("rms" in text for text in red)
    assert page.locator("#changes tr.moved").count()
    assert page.locator("h1").inner_text().endswith("numbers moved by more than 1 %")
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    heads = page.locator("#changes tbody tr:visible th")
    page.get_by_label("Filter layers and measures").fill("down_proj rms @weight")
    assert heads.count() == LAYERS
    assert CHANGED in heads.first.inner_text()
    page.get_by_role("button", name="Layer", exact=True).press("Enter")
    assert "layers.0" in heads.first.inner_text()
    page.get_by_label("moved only").check()
    assert heads.count() == 1
