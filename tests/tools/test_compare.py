"""`qsa compare`: numbers of several checkpoints side by side, the best and those out of bounds marked, or refused."""

from __future__ import annotations

import csv
import json
import math
import shutil

import pytest

from pytest_qsa import Capture, capture
from pytest_qsa.captures import DataProvenance, ModelProvenance, Provenance
from pytest_qsa.cli import main
from pytest_qsa.common import AnomalyError, json_with_checksum, visible
from pytest_qsa.report.card import model_card
from pytest_qsa.report.comparison import Column, Size, comparison_of
from pytest_qsa.report.comparison_forms import comparison_lines, comparison_page
from pytest_qsa.report.report import to_plain, write_report
from pytest_qsa.verdicts.verdict import Kind, Row, Verdict
from support import models
from support.checkpoints import save_words

TOKENS, OTHER = "sha256:1111111111111", "sha256:2222222222222"


def result(id, values, *, metric="sqnr", site="output", kind=Kind.PASSED, bounds=(None, None), tokens=TOKENS, **fields):
    """Return a verdict as builtins; `values`: by layer, or one number of the whole model."""
    values = values if isinstance(values, dict) else {site: values}
    low, high = bounds

    def excess(value):
        return max(value - high, 0.0) if high is not None else min(value - low, 0.0) if low is not None else 0.0

    rows = [Row(name, v, low, high, None, excess(v), depth) for depth, (name, v) in enumerate(values.items())]
    query = {"metric": metric, "definition": f"{metric}/1", "site": site, "text": "", "parameters": {}, "unit": "dB"}
    data, reference = DataProvenance("sample", fingerprint=tokens), fields.pop("reference", None)
    run = Provenance(ModelProvenance("m"), data, reference=reference)
    query |= fields.pop("query", {})
    return to_plain(Verdict(id, "s", kind, "head", query=query, rows=rows, run=run, **fields))


def cells(comparison, name):
    (line,) = [line for line in comparison.lines if line.name == name]
    return [cell and (cell.value, cell.best, cell.out) for cell in line.cells]


def test_the_best_of_a_row_follows_what_the_metric_means():
    def of(metric, site, *values):
        columns = [Column(str(i), [result("x", value, metric=metric, site=site)]) for i, value in enumerate(values)]
        return [best for _, best, _ in cells(comparison_of(columns), "x")]

    assert of("kl_divergence", "logits", 0.2, 0.1, 0.3) == [False, True, False]
    assert of("overlap", "logits", 0.2, 0.1, 0.3) == [False, False, True]
    assert of("margin_ratio", "logits", 0.9, 1.3, 0.5) == [True, False, False]
    assert of("ln_ppl_ratio", "logits", -0.3, 0.1, 0.2) == [False, True, False]
    assert of("perplexity", "logits", 12.0, 11.0, 13.0) == [False, True, False]
    # of the size of an activation neither a high nor a low one is better
    assert of("magnitude", "output", 2.0, 1.0, 3.0) == [False, False, False]
    assert of("kl_divergence", "logits", 0.2, 0.2, 0.2) == [False, False, False]


def test_a_metric_of_layers_shows_its_worst_layer_and_then_each_layer():
    one = Column("one", [result("blocks", {"layers.0": 30.0, "layers.1": 12.0, "layers.2": math.inf})])
    two = Column("two", [result("blocks", {"layers.0": 11.0, "layers.1": 20.0, "layers.2": 25.0})])
    compared = comparison_of([one, two])

    assert cells(compared, "blocks") == [(12.0, True, False), (11.0, False, False)]
    assert [cell.layer for cell in compared.lines[0].cells] == ["layers.1", "layers.0"]
    (table,) = compared.layers
    assert [row.name for row in table.rows] == ["layers.0", "layers.1", "layers.2"]
    assert [[cell.value for cell in row.cells] for row in table.rows] == [[30.0, 11.0], [12.0, 20.0], [math.inf, 25.0]]
    assert "∞ ★" in "\n".join(comparison_lines(compared, 10))


def test_what_is_out_of_bounds_is_marked_and_comes_first():
    low = {"layers.0": 9.0, "layers.1": 30.0, "layers.2": 29.0}
    one = Column("one", [result("blocks", low, bounds=(10.0, None), kind=Kind.REGRESSION)])
    two = Column("two", [result("blocks", dict.fromkeys(low, 15.0), bounds=(10.0, None))])
    compared = comparison_of([one, two])
    assert cells(compared, "blocks") == [(9.0, False, True), (15.0, True, False)]
    assert [row.name for row in compared.layers[0].rows if row.out] == ["layers.0"]
    assert compared.layers[0].rows[0].name == "layers.0"
    assert "9 ◆" in "\n".join(comparison_lines(compared, 1))
    assert compared.lines[0].cells[0].hint == "layers.0; allowed ≥ 10"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tokens": OTHER}, r"measured on other tokens: one \(111111111111\) and two \(222222222222\)"),
        ({"query": {"definition": "sqnr/2"}}, "measured by another definition"),
        ({"reference": ModelProvenance("b", weights="sha256:bb")}, "measured against another reference"),
    ],
)
def test_numbers_that_can_not_be_compared_are_refused(changed, message):
    own = {"reference": ModelProvenance("a", weights="sha256:aa")}
    columns = [Column("one", [result("x", 1.0, **own)]), Column("two", [result("x", 2.0, **(own | changed))])]
    with pytest.raises(AnomalyError, match=message):
        comparison_of(columns)
    compared = comparison_of(columns, strict=False)
    assert compared.lines == []
    assert "measured" in compared.notes[0]


def test_weights_are_compared_whatever_the_tokens():
    columns = [
        Column(tokens, [result("w", 1.0, metric="rms", site="weight", tokens=tokens)]) for tokens in (TOKENS, OTHER)
    ]
    assert len(comparison_of(columns).lines) == 1


def test_a_speed_is_shown_of_one_machine_only():
    def of(*machines):
        query = {"metric": "external", "parameters": {"pointer": "/output_throughput"}, "definition": "external/1"}
        made = [result("speed", 9.0, site="evals", query=query), result("speed", 8.0, site="evals", query=query)]
        return comparison_of([Column(str(i), [made[i]], machine=machine) for i, machine in enumerate(machines)])

    assert [line.name for line in of("m1", "m1").lines] == ["speed"]
    for machines in (("m1", "m2"), ("", "")):
        assert of(*machines).lines == []
        assert "one machine" in of(*machines).notes[0]


def test_a_checkpoint_without_a_number_says_why_once():
    failed = [result(name, {}, kind=Kind.INFRA) for name in ("a", "b")]
    compared = comparison_of([Column("one", failed), Column("two", [result("a", 1.0), result("b", 2.0)])])
    assert [line.cells[0].text for line in compared.lines] == ["INFRA", "INFRA"]
    assert compared.notes == ["one: INFRA a, b: head"]


def test_a_checkpoint_that_can_not_be_opened_leaves_the_others_their_numbers(qsa, llama, quantized, tmp_path):
    data = ("--data.num_samples", "8", "--data.seq_len", "16", "--qsa-cache", tmp_path / "cache")
    code, out, err = qsa(quantized["int8"], "absent", "--reference", llama, *data, "--model.weights", "files")
    assert code == 1
    line = next(line for line in out.splitlines() if line.startswith("kl_divergence"))
    assert line.endswith("INFRA")
    assert "note: absent: INFRA: there is no folder absent" in out
    code, out, err = qsa("absent", "--reference", llama)
    assert (code, out) == (1, "")
    assert "absent: INFRA: there is no folder absent" in err


def test_weights_that_no_loader_takes_are_compared_beside_those_always_read_from_the_files(qsa, llama, tmp_path):
    declared = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False}
    folder = save_words(llama, tmp_path / "words", declared)
    suite = tmp_path / "weights.qsa.yaml"
    suite.write_text(
        "model: {path: words}\n"
        "data: {source: sample, num_samples: 2, seq_len: 16}\n"
        "assertions:\n"
        "  - {id: gain, metric: weight_gain, layers: _proj$, max: 4}\n"
        "  - {id: close, metric: weight_sqnr, layers: _proj$, min: 3}\n"
    )
    _, out, _ = qsa(folder, f"again={folder}", "--suite", suite, "--reference", llama)
    assert "ANOMALOUS" not in out
    assert "close [dB], 28 layers" in out


def test_results_of_other_suites_meet_by_what_they_measure():
    one, two = (
        Column("one", [result("mine", 1.0)]),
        Column("two", [result("yours", 2.0), result("mine", 3.0, metric="rms")]),
    )
    compared = comparison_of([one, two])
    assert [(line.name, [cell and cell.value for cell in line.cells]) for line in compared.lines] == [
        ("mine", [1.0, 2.0]), ("mine", [None, 3.0]),
    ]  # fmt: skip


def test_of_a_static_check_the_problems_are_added_up_and_only_layers_with_one_are_listed():
    query = {"metric": "checkpoint_health", "definition": "checkpoint_health/1"}
    found = ({"a": 0.0, "b": 2.0, "c": 1.0}, {"a": 0.0, "b": 0.0, "c": 0.0})
    made = [result("files", of, site="checkpoint", query=query, bounds=(None, 0.0)) for of in found]
    compared = comparison_of([Column("one", made[:1]), Column("two", made[1:])])
    assert cells(compared, "files") == [(3.0, False, True), (0.0, True, False)]
    assert [row.name for row in compared.layers[0].rows] == ["b", "c"]


def test_sizes_are_megabytes_and_bits_of_all_tensors_over_all_parameters():
    columns = [Column("a", [], Size(2_000_000, 1_000_000)), Column("b", [], Size(500_000, 1_000_000))]
    compared = comparison_of(columns)
    assert cells(compared, "size") == [(2.0, False, False), (0.5, True, False)]
    assert cells(compared, "bits a weight") == [(16.0, False, False), (4.0, True, False)]


HOSTILE = "</script><script>alert(1)</script>|`*\u202e"


def test_a_hostile_name_is_escaped_in_every_form():
    rows = {HOSTILE: 1.0, "b": 2.0}
    columns = [Column(HOSTILE, [result(HOSTILE, rows)]), Column("two", [result(HOSTILE, rows)])]
    compared = comparison_of(columns)
    page = comparison_page(compared, "qsa compare")
    assert page.count("<script") == 3
    assert "\u202e" not in "\n".join(map(visible, comparison_lines(compared, 5)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with captures of two damaged models against one reference, and of other tokens."""
    folder = tmp_path_factory.mktemp("compare")
    sites = [(r"layers\.\d$", "output"), ("", "logits")]
    for name, strength, seed in (("small", 0.02, 0), ("large", 0.2, 0), ("other", 0.2, 7)):
        model, batch = models.damaged(models.llama(), strength), models.token_batch(8, 24, seed=seed)
        capture(model, [batch], sites=sites, reference=models.llama()).save(folder / f"{name}.qsa")
    capture(models.llama(), [models.token_batch(2, 8)], sites=[(r"layers\.\d$", "input")]).save(folder / "inputs.qsa")
    return folder


@pytest.fixture
def qsa(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)

    def run(*words):
        code = main(["compare", *map(str, words)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return run


def test_captures_are_compared_and_the_numbers_are_those_of_the_captures(qsa, folder):
    code, out, _ = qsa("small.qsa", "big=large.qsa", "--format", "csv")
    assert code == 0
    rows = {(row["metric"], row["layer"]): row for row in csv.DictReader(out.splitlines())}
    for name, file in (("small", "small.qsa"), ("big", "large.qsa")):
        loaded = Capture.load(folder / file)
        assert float(rows["kl_divergence", ""][name]) == loaded.logits().kl_divergence().values[0]
        sqnr = loaded.output(r"layers\.\d$").sqnr()
        assert float(rows["sqnr_of_blocks", ""][name]) == min(sqnr.values)
        assert {layer: float(rows["sqnr_of_blocks", layer][name]) for layer in sqnr.layers} == sqnr.to_dict()
    assert rows["kl_divergence", ""]["best"] == "small"


def test_captures_of_other_tokens_are_refused_in_one_line(qsa):
    code, out, err = qsa("small.qsa", "other.qsa")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "was measured on other tokens: small" in err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("small.qsa", "inputs.qsa"), 1, "inputs.qsa holds nothing that is compared without a suite"),
        (("small.qsa", "absent.qsa"), 1, "absent.qsa: can't be read"),
        (("small.qsa", "absent.json"), 1, "absent.json: can't be read"),
        (("small.qsa", "no-report.json"), 2, "no-report.json: no report.json of this program"),
        (("small.qsa", "old.json"), 2, "old.json: a damaged report.json: KeyError: 'rows'"),
        (("small.qsa", "report.json::nobody"), 2, "report.json has no subject 'nobody'; it has s"),
        (("small.qsa", "a-folder"), 4, "give --reference"),
        (("small.qsa", "gate.qsa.yaml"), 2, "gate.qsa.yaml is a suite, and no TARGET"),
        (("small.qsa", "--format", "pdf"), 4, "invalid choice"),
        (("small.qsa", "large.qsa", "-o", "small.qsa/x.html"), 1, "can't be written"),
    ],
)
def test_a_mistake_is_told_in_one_line(qsa, folder, words, code, message):
    (folder / "no-report.json").write_text("{}")
    old = {"checksum": "", "schema": "qsa-report/1", "session": {}, "results": [{"subject": "s"}]}
    (folder / "old.json").write_bytes(json_with_checksum({key: old[key] for key in old if key != "checksum"}))
    write_report([result("x", 1.0)], folder, {})
    got, out, err = qsa(*words)
    assert (got, out) == (code, "")
    assert message in err


def test_a_report_has_a_column_for_each_subject(qsa, folder):
    made = [result("x", 1.0) | {"subject": "int8"}, result("x", 2.0) | {"subject": "fp8"}]
    write_report(made, folder, {"sizes": {"int8": [1000, 1000]}})
    code, out, _ = qsa("report.json", "--format", "csv")
    assert code == 0
    rows = {row["metric"]: row for row in csv.DictReader(out.splitlines())}
    assert (rows["x"]["int8"], rows["x"]["fp8"]) == ("1.0", "2.0")
    assert (rows["bits a weight"]["int8"], rows["bits a weight"]["fp8"]) == ("8.0", "")


def test_checkpoints_are_measured_against_the_reference_and_by_a_suites_bounds(qsa, folder, llama, quantized, tmp_path):
    data = ("--data.num_samples", "8", "--data.seq_len", "16", "--qsa-cache", tmp_path / "cache")
    code, out, _ = qsa(
        quantized["int8"], f"four={quantized['int4']}", llama, "--reference", llama, *data, "--format", "csv"
    )
    assert code == 0
    rows = {(row["metric"], row["layer"]): row for row in csv.DictReader(out.splitlines())}
    names = [quantized["int8"].name, "four", llama.name]
    assert list(rows["size", ""])[3:6] == names
    assert rows["kl_divergence", ""]["best"] == rows["sqnr_of_weights", ""]["best"] == names[0]
    # the original isn't compared with itself, and its size is known
    assert rows["kl_divergence", ""][names[2]] == ""
    stored = sum(path.stat().st_size for path in llama.glob("*.safetensors")) / 1e6
    assert float(rows["size", ""][names[2]]) == pytest.approx(stored, rel=0.05)
    assert float(rows["bits a weight", ""][names[2]]) == 32.0

    bound = (float(rows["kl_divergence", ""][names[0]]) + float(rows["kl_divergence", ""]["four"])) / 2
    suite = {"model": {"path": str(llama), "reference": str(llama)}, "assertions": [
        {"id": "close", "metric": "kl_divergence", "max": bound}, {"id": "files", "metric": "checkpoint_health"},
    ]}  # fmt: skip
    (folder / "gate.qsa.yaml").write_text(json.dumps(suite))
    code, out, _ = qsa(quantized["int8"], f"four={quantized['int4']}", "--suite", "gate.qsa.yaml", *data)
    assert code == 0
    line = next(line for line in out.splitlines() if line.startswith("close [nats]"))
    assert (line.count("★"), line.count("◆")) == (1, 1)
    assert line.index("★") < line.index("◆")
    assert "files [problems]" in out


def test_answers_are_compared_prompt_by_prompt(qsa, folder, llama, quantized, tmp_path):
    for name, source in (("one", quantized["int8"]), ("two", quantized["int4"]), ("original", llama)):
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(
            "{% for m in messages %}{{ m['content'] }}|{% endfor %}{% if add_generation_prompt %}> {% endif %}"
        )
    suite = {
        "model": {"path": str(tmp_path / "one"), "reference": str(tmp_path / "original")},
        "generation": {"num_prompts": 9, "max_new_tokens": 8},
        "assertions": [
            {"id": "loops", "metric": "generation", "stat": "repetition", "max": 0.9},
        ],
    }
    (folder / "answers.qsa.yaml").write_text(json.dumps(suite))
    size = ("--data.num_samples", "2", "--data.seq_len", "16", "--format", "csv")
    code, out, err = qsa(tmp_path / "one", tmp_path / "two", "--suite", "answers.qsa.yaml", *size)
    assert code == 0, err
    rows = {row["metric"]: row for row in csv.DictReader(out.splitlines())}
    assert all(-1 <= float(rows["loops"][name]) <= 1 for name in ("one", "two"))


def card_of(*results, size=None, **fields):
    return model_card(comparison_of([Column("int8", results, size)]), fields.pop("command", "qsa card int8"), **fields)


def rows_of(card):
    lines = [line for line in card.splitlines() if line.startswith("| ")]
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in (line.split("|") for line in lines)}


def test_a_card_has_a_number_beside_what_the_original_has():
    ratio, perplexity = math.log(1.25), 20.0
    made = [
        result("kl_divergence", 0.5, metric="kl_divergence", site="logits", query={"unit": "nats"}),
        result("ln_ppl_ratio", ratio, metric="ln_ppl_ratio", site="logits", query={"unit": ""}),
        result("perplexity", perplexity, metric="perplexity", site="logits", query={"unit": ""}),
        result("sqnr_of_blocks", {"layers.0": 30.0, "layers.1": 12.0}),
    ]
    rows = rows_of(card_of(*made, size=Size(1_000_000, 1_000_000), original=Size(2_000_000, 1_000_000)))
    assert rows["Size of the tensors"] == ["1 MB", "2 MB"]
    assert rows["Bits a weight, embeddings included"] == ["8", "16"]
    assert rows["Perplexity"] == ["20", "16"]
    assert rows["KL divergence from the original's next-token probabilities"] == ["0.5 nats", "0"]
    assert rows["SQNR of the blocks' outputs, the worst block"] == [r"12 dB \(layers.1\)", "∞ dB"]


def test_a_card_of_a_suite_says_what_is_allowed_and_what_is_out():
    rows = rows_of(card_of(result("close", 9.0, kind=Kind.REGRESSION, bounds=(10.0, None))))
    assert rows["close"] == ["9 dB ◆", "∞ dB", "≥ 10"]


def test_a_card_shows_no_folder_of_this_machine():
    reference = ModelProvenance("/home/someone/original", weights="sha256:abcdef0123456789")
    command = "qsa card /home/someone/int8 --qsa-cache /home/someone/c -o /home/someone/o.md --data.seq_len 8"
    card = card_of(result("x", 1.0, reference=reference), command=command)
    assert "someone" not in card
    assert "against `original` (sha256 abcdef012345)" in card
    assert "`qsa card int8 --data.seq_len 8`" in card


def test_a_card_of_a_report_with_several_subjects_asks_which_and_of_one_is_written(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    write_report([result("x", 1.0) | {"subject": "int8"}, result("x", 2.0) | {"subject": "fp8"}], folder, {})
    assert main(["card", "report.json"]) == 1
    assert "pick one of report.json::int8, report.json::fp8" in capsys.readouterr().err
    assert main(["card", "report.json::fp8", "-o", "card.md"]) == 0
    assert "### Quantization of fp8" in (folder / "card.md").read_text()


@pytest.mark.process
@pytest.mark.browser
def test_the_page_sorts_by_a_checkpoint_filters_layers_and_fits_a_phone(tmp_path, opened_page):
    layers = [f"model.layers.{i}.a_module_with_a_long_name.down_proj" for i in range(12)]
    made = {name: {layer: float(20 + (i * step) % 12) for i, layer in enumerate(layers)} for name, step in
            (("int8", 5), ("a-checkpoint-with-a-long-name", 7), ("fp8", 11))}  # fmt: skip
    columns = [Column(name, [result("blocks", values, bounds=(22.0, None))]) for name, values in made.items()]
    (tmp_path / "compare.html").write_text(comparison_page(comparison_of(columns), "qsa compare"), encoding="utf-8")
    page = opened_page(tmp_path / "compare.html", width=390)
    assert page.evaluate("document.documentElement.scrollWidth") == 390

    table = page.locator(".compared details table")
    table.get_by_role("button", name="fp8").click()
    shown = table.locator("tbody tr td:nth-child(4)").evaluate_all("cells => cells.map(cell => Number(cell.dataset.v))")
    assert shown == sorted(made["fp8"].values(), reverse=True)
    page.get_by_label("Filter the layers of blocks").fill("layers.3.")
    assert table.locator("tbody tr:visible th").all_inner_texts() == [layers[3]]
    assert table.locator("tbody tr:visible td").first.get_attribute("title") == "allowed ≥ 22"
