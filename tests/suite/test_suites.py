"""What a suite may say, and what is said of one that is wrong: `file:line: message (did you mean …?)`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_qsa.common.errors import SuiteError
from pytest_qsa.suite import check_override, load_suite

GOOD = """\
model: {path: x}
assertions:
  - id: peaks
    metric: absmax
    layers: layers
    site: output
    max: 1
"""
AGAIN = "  - {id: peaks, metric: rms, layers: x, site: input, max: 1}\n"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("pattern", ["[[:alpha:]]", "[a&&b]", "[a||b]"])
def test_a_regex_that_a_later_python_may_read_otherwise_is_no_error(load, pattern):
    # warnings are errors here
    assert load(changed("layers: layers", f"layers: '{pattern}'")).assertions[0].layers == pattern


def test_a_user_that_nobody_knows_is_a_folder_of_that_name(mistake, load):
    assert load(GOOD + "data: {source: 'custom:~nobody-here/x'}\n")
    load(GOOD + "visualization: {save_dir: '~nobody-here/x'}\n")


def test_a_bound_in_a_bound_is_told_in_the_words_of_a_suite(mistake):
    said = mistake(changed("max: 1", "max: {default: {default: 1}}"))
    assert said.startswith("a.qsa.yaml:7: default: write a number, or what follows the last release, {of: previous}")


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Return a function that loads a text as a suite."""
    monkeypatch.chdir(tmp_path)

    def load(text, *overrides):
        path = tmp_path / "a.qsa.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_suite(path, overrides)

    return load


@pytest.fixture
def mistake(load):
    """Return a function that loads a wrong suite and returns what is said of it."""

    def mistake(text, *overrides):
        with pytest.raises(SuiteError) as caught:
            load(text, *overrides)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return mistake


def changed(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        pytest.param(GOOD + "    treshold: 3\n", 8, "unknown key 'treshold'", id="unknown key of an assertion"),
        pytest.param(GOOD + "    lauers: 3\n", 8, "'lauers' (did you mean 'layers'?)", id="misspelt key"),
        pytest.param(
            GOOD.replace("absmax", "outlier_tokens") + "    treshold: 3\n", 8, "(did you mean 'threshold'?)",
            id="misspelt parameter of the metric",
        ),
        pytest.param("modle: {}\n" + GOOD, 1, "'modle' (did you mean 'model'?)", id="misspelt section"),
        pytest.param(changed("path: x", "path: x, nam: y"), 1, "(did you mean 'name'?)", id="misspelt model key"),
        pytest.param(
            "visualization:\n  outlier:\n    treshold: 3\n" + GOOD, 3, "(did you mean 'threshold'?)",
            id="misspelt key of a picture",
        ),
        pytest.param(
            "visualization: {enabled: {heatmap: true}}\n" + GOOD, 1, "'heatmap' (did you mean 'heatmap_3d'?)",
            id="no such picture",
        ),
        pytest.param("visualization: {magnitude: {patterns: [x, 'y(']}}\n" + GOOD, 1, "'y('", id="regex of a picture"),
        pytest.param("visualization: {magnitude: {patterns: []}}\n" + GOOD, 1, "patterns", id="a picture of nothing"),
        pytest.param("visualization: {magnitude: {reduce_dim: 0}}\n" + GOOD, 1, "reduce_dim", id="reduce_dim 0"),
        pytest.param(
            "visualization: {output: {formats: [pgn]}}\n" + GOOD, 1, "(did you mean 'png'?)", id="misspelt format"
        ),
        pytest.param(
            "visualization: {output: {report_name: ../x}}\n" + GOOD, 1, "without a folder", id="report elsewhere"
        ),
        pytest.param("data: {custom: {fromat: csv}}\n" + GOOD, 1, "(did you mean 'format'?)", id="misspelt deep key"),
        pytest.param(GOOD + "    baseline: {rell: 1}\n", 8, "(did you mean 'rel'?)", id="misspelt baseline key"),
        pytest.param(changed("max: 1", "max: many"), 7, "max: should be a valid number, not 'many'", id="wrong type"),
        pytest.param("memory: [a]\n" + GOOD, 1, "memory: should be a mapping of keys, not", id="a section as a list"),
        pytest.param(changed("id: peaks", "id: 7"), 3, "id: should be a text, so put it in quotes", id="a number"),
        pytest.param(changed("max: 1", "max: true"), 7, "max: should be a valid number", id="a truth is no number"),
        pytest.param(changed("max: 1", "max: .nan"), 7, "max: should be a finite number", id="NaN bound"),
        pytest.param("data: {num_samples: 0}\n" + GOOD, 1, "num_samples: should be greater than 0", id="no samples"),
        pytest.param(changed("layers: layers", "layers: x("), 5, "'x('", id="bad regex"),
        pytest.param(GOOD + "    exclude: '['\n", 8, "'['", id="bad exclude"),
        pytest.param(GOOD + AGAIN, 8, "the id 'peaks' is taken by line 3", id="id used twice"),
        pytest.param(changed("id: peaks", "id: a/b"), 3, "may hold letters, digits and _ . - only", id="id with /"),
        pytest.param("assertions: []\n", 1, "assertions is empty", id="empty assertions"),
        pytest.param("assertions:\n", 1, "assertions is empty", id="null assertions"),
        pytest.param("assertions: [x]\n", 1, "an assertion is a mapping", id="an assertion that is a word"),
        pytest.param(changed("    max: 1\n", ""), 3, "an assertion needs a bound or a baseline", id="no bound"),
        pytest.param(GOOD + "    min: 2\n", 8, "min 2 is above max 1", id="bounds that nothing satisfies"),
        pytest.param(GOOD + "    equals: 2\n", 8, "equals", id="equals beside max, which would be ignored"),
        pytest.param(GOOD + "    x: [\n", 9, "not valid YAML", id="syntax error"),
        pytest.param("a: 1\n---\nb: 2\n", 2, "not valid YAML", id="two documents"),
        pytest.param(GOOD + "memory: {device: gpu}\n", 8, "'gpu' is none of auto, cpu", id="a device"),
        pytest.param(
            changed("max: 1", "baseline: 0.05"), 7, "write {rel: 0.05} for a relative", id="a bare tolerance"
        ),
        pytest.param("a: \x07\n" + GOOD, 1, "not valid YAML", id="a character that YAML forbids"),
        pytest.param("a: " + "[" * 3000, 1, "not valid YAML", id="nested without end"),
        pytest.param(b"\xff\xfe", 1, "can't be read as UTF-8 text", id="not UTF-8"),
        pytest.param("# nothing\n", 1, "the file is empty", id="empty file"),
        pytest.param("- x\n", 1, "a suite is a mapping", id="a list"),
        pytest.param(GOOD + "    max: 2\n", 8, "the key 'max' stands twice", id="repeated key"),
        pytest.param(GOOD + "model: {path: y}\n", 8, "the key 'model' stands twice", id="repeated section"),
        pytest.param(changed("absmax", "absmaxx"), 4, "'absmaxx' (did you mean 'absmax'?)", id="misspelt metric"),
        pytest.param(changed("absmax", "speed"), 4, "the metrics are outlier_tokens, ", id="no such metric"),
        pytest.param(changed("absmax", "[absmax]"), 4, "unknown metric", id="a metric that is a list"),
        pytest.param(changed("    metric: absmax\n", ""), 3, "'metric' is missing", id="no metric"),
        pytest.param(changed("    site: output\n", ""), 3, "'site' is missing", id="no site"),
        pytest.param(changed("output", "outptu"), 6, "(did you mean 'output'?)", id="misspelt site"),
        pytest.param(GOOD + "    level: wran\n", 8, "(did you mean 'warn'?)", id="misspelt level"),
        pytest.param(GOOD + "    reduce: max\n", 8, "absmax pools all samples", id="reduce on a pooled metric"),
        pytest.param(
            changed("absmax", "rms") + "    positions: no_sink\n", 8, "so it takes no positions",
            id="positions on an elementwise metric",
        ),
        pytest.param(
            changed("absmax", "magnitude") + "    reduce_dim: -2\n    positions: no_sink\n", 9, "positions",
            id="positions on channel-wise maxima, where they would be ignored",
        ),
        pytest.param(
            changed("absmax", "outlier_tokens").replace("output", "weight"), 6, "a weight has none",
            id="tokens of a weight",
        ),
        pytest.param(changed("absmax", "quantile") + "    q: 2\n", 8, "q", id="a quantile above 1"),
        pytest.param(GOOD + "    positions: {skip_frist: 2}\n", 8, "skip_first", id="misspelt positions"),
        pytest.param(changed("layers: layers", 'layers: "\\bx"'), 5, "a backspace", id="control character in a regex"),
        pytest.param(
            changed("layers: layers", 'layers: "x\\.0"'), 5, "write a regex without quotes", id="regex in double quotes"
        ),
        pytest.param(BOMB + GOOD, 1, "expands to more than", id="alias bomb"),
        pytest.param("a: &a [*a]\n", 1, "expands to more than", id="a list that holds itself"),
        pytest.param(changed("path: x", "path: x, factory: a:b"), 1, "give one of path, factory", id="two models"),
        pytest.param(changed("path: x", "name: x"), 1, "give one of path, factory", id="no path"),
        pytest.param("a: !!python/object/apply:os.getcwd []\n", 1, "not valid YAML", id="a Python object"),
        pytest.param(
            changed("path: x", "path: x, kv_cache: fp8_e4m"), 1, "(did you mean 'fp8_e4m3'?)", id="misspelt KV cache"
        ),
        pytest.param(
            changed("path: x", "served: {url: 'http://x'}, kv_cache: q8_0"), 1, "start the server with its own",
            id="the KV cache of a server",
        ),
        pytest.param(
            changed("path: x", "path: x, engine: vllm, kv_cache: q8_0"), 1, "engine: kv_cache_dtype",
            id="our KV cache in vLLM",
        ),
        pytest.param(
            changed("path: x", "path: x, reference: self"), 1, "self is the model without kv_cache",
            id="the same model twice",
        ),
        pytest.param(
            changed("path: x", "path: x, kv_cache: q8_0, reference: self")
            + "  - {id: w, metric: weight_sqnr, layers: x, min: 1}\n",
            8, "model.reference: self has the same ones", id="the same weights twice",
        ),
        pytest.param(
            changed("absmax", "quantization_sqnr").replace("max: 1", "min: 1") + "    by: token_head\n", 8,
            "by: token_head is of the KV cache", id="heads of an output",
        ),
        pytest.param(
            changed("absmax", "quantization_sqnr").replace("max: 1", "min: 1").replace("output", "key")
            + "    by: checkpoint\n", 8, "scheme: fp8_e4m3", id="a checkpoint's scale in int8",
        ),
        pytest.param(
            changed("absmax", "cache_clipping"), 6, "is a metric of the key or value or latent",
            id="clipping of what no cache keeps",
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line_with_its_place(mistake, text, line, said):
    message = mistake(text)
    assert message.startswith("a.qsa.yaml:")
    assert said in message
    assert re.match(r"a\.qsa\.yaml:(\d+): ", message)[1] == str(line)


@pytest.mark.parametrize(
    "name",
    ["__init__", "__file__", "pytestmark", "pytest_generate_tests", "setup_module", "teardown_function", "setUpModule"],
)
def test_an_id_that_pytest_would_take_for_something_else_is_refused(mistake, name):
    assert mistake(changed("id: peaks", f"id: {name}")).startswith("a.qsa.yaml:3: ")


TOO_LONG = {
    "model: {path: x, name: NAME}\n".replace("NAME", "a" * 201): "it is longer than the name of a folder may be",
    "model: {path: x, name: NAME}\n".replace("NAME", "a/" * 600 + "a"): "it is longer than the name of a folder may be",
    f"model: {{path: {'ä' * 101}}}\n": "it is longer than the name of a folder may be",
    "model: {path: x}\nmemory: {device: 'cuda:99999999999999'}\n": "device 'cuda:99999999999999' is none of auto",
    f"model: {{path: x}}\nassertions: [{{id: {'a' * 201}, metric: checkpoint_keys}}]\n": "id: ",
}


@pytest.mark.parametrize("text", TOO_LONG)
def test_what_no_folder_no_file_and_no_device_can_be_called_is_refused(mistake, text):
    assert TOO_LONG[text] in mistake(text)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "+1e-3", ".1e-2", "1.e-3", "0.001"])
def test_a_number_in_scientific_notation_is_a_number(load, text):
    assert load(changed("max: 1", f"max: {text}")).assertions[0].max == 0.001


def test_a_seed_configuration_is_a_suite_without_assertions(load):
    file = load("model: {path: x}\nvisualization: {dpi: 300, outlier: {top_n: 3}}\n")
    assert file.suite.assertions is None
    assert not file.assertions


def test_an_assertion_knows_its_line_and_the_line_of_its_bound(load):
    file = load(GOOD + "  - {id: b, metric: rms, layers: x, site: input,\n     min: 1,\n     max: 2}\n")
    assert [file.place_of(0).line, file.bound_place_of(0).line] == [3, 7]
    assert [file.place_of(1).line, file.bound_place_of(1).line] == [8, 10]


@pytest.mark.parametrize("newline", ["\r\n", "\n"])
@pytest.mark.parametrize("mark", ["\ufeff", ""])
def test_a_file_from_windows_is_read(load, newline, mark):
    assert load(mark + GOOD.replace("\n", newline)).bound_place_of(0).line == 7


@pytest.mark.parametrize(
    ("override", "get", "value"),
    [
        ("data.num_samples=8", lambda suite: suite.data.num_samples, 8),
        ("data.custom.format=csv", lambda suite: suite.data.custom.format, "csv"),
        ("model.path=y", lambda suite: suite.model.path, "y"),
        ("memory.device=cpu", lambda suite: suite.memory.device, "cpu"),
        ("assertions.peaks.max=1e-3", lambda suite: suite.assertions[0].max, 0.001),
        ("assertions.peaks.layers=layers\\.0$", lambda suite: suite.assertions[0].layers, "layers\\.0$"),
        ("assertions.peaks.baseline={rel: 0.1}", lambda suite: suite.assertions[0].baseline.rel, 0.1),
        ("assertions.peaks.baseline.abs=2", lambda suite: suite.assertions[0].baseline.abs, 2),
        ("assertions.peaks.positions={skip_first: 2}", lambda suite: suite.assertions[0].where, "skip_first:2"),
        ("visualization.dpi=100", lambda suite: suite.visualization.dpi, 100),
    ],
)
def test_an_override_sets_any_key(load, override, get, value):
    check_override(override)
    assert get(load(GOOD, override).suite) == value


def test_an_id_with_dots_can_be_overridden(load):
    text = changed("id: peaks", "id: a") + AGAIN.replace("peaks", "a.b")
    file = load(text, "assertions.a.b.max=3", "assertions.a.max=2")
    assert [assertion.max for assertion in file.assertions] == [2, 3]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.num_samples", "write KEY=VALUE"),
        ("=8", "write KEY=VALUE"),
        ("data.num_sample=8", "no key 'data.num_sample' (did you mean 'num_samples'?)"),
        ("dta.num_samples=8", "no key 'dta' (did you mean 'data'?)"),
        ("data.seed.x=8", "no key 'data.seed.x'"),
        ("extends=a.yaml", "what a suite extends stands in its file"),
    ],
)
def test_a_wrong_override_is_told_before_any_suite_is_read(override, said):
    with pytest.raises(SuiteError, match=re.escape(said)) as caught:
        check_override(override)
    assert str(caught.value).startswith(f"--qsa-set {override.partition('=')[0]}")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.num_samples=many", "num_samples: should be a valid integer, not 'many'"),
        ("assertions.peaks.mx=3", "unknown key 'mx' (did you mean 'max'?)"),
        ("assertions.peak.max=3", "no assertion 'peak' in a.qsa.yaml (did you mean 'peaks'?)"),
        ("assertions.peaks.layers=x(", "'x('"),
        ("assertions.peaks.metric=speed", "unknown metric 'speed'"),
        ("model=x", "model: "),
    ],
)
def test_an_override_that_does_not_fit_is_named(mistake, override, said):
    message = mistake(GOOD, override)
    assert message.startswith(f"--qsa-set {override}: ")
    assert said in message.removeprefix(f"--qsa-set {override}")


WRONG = """\
model: {path: nowhere}
assertions:
  - id: peaks
    metric: absmax
    layers: layers
    site: output
    max: 1
    reduse: max
"""


@pytest.fixture(scope="module")
def wrong(project):
    """Run a wrong suite beside a good test."""
    project.write("wrong.qsa.yaml", WRONG)
    project.write("test_good.py", "def test_good(): pass\n")
    return project.pytest()


@pytest.mark.process
def test_a_wrong_suite_stops_the_run_with_exit_code_2(wrong):
    assert wrong.code == 2
    assert "wrong.qsa.yaml:8: unknown key 'reduse' (did you mean 'reduce'?)" in wrong.out


@pytest.mark.process
def test_a_wrong_suite_shows_no_traceback(wrong):
    assert "Traceback" not in wrong.out
    assert ".py:" not in wrong.out.partition("ERRORS")[2]


@pytest.mark.process
def test_a_wrong_suite_loads_no_model(wrong):
    assert "nowhere" not in wrong.out


@pytest.fixture
def usage(own_project):
    """Return a project with a suite."""
    own_project.write("a.qsa.yaml", GOOD)
    return own_project


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--qsa-set", "data.num_sample=8"], "'data.num_sample'"),
        (["--qsa-set", "data"], "--qsa-set data: write KEY=VALUE, such as data.num_samples=8"),
        (["--qsa-config", "nowhere.yaml"], "--qsa-config nowhere.yaml: there is no such file"),
        (["--qsa-model", "a b=x"], "a name may hold letters"),
        (["--qsa-model", "a=x", "--qsa-model", "a=y"], "the name stands twice"),
        (["--qsa-model", "x", "--qsa-model", "y", "--snapshot-update"], "two --qsa-model without NAME"),
        (["-o", "qsa_report=sometimes"], "qsa_report = sometimes: one of on-failure, always, never"),
    ],
)
def test_a_wrong_option_is_a_usage_error(usage, arguments, said):
    run = usage.pytest(*arguments)
    assert run.code == 4
    assert said in run.out
    assert "Traceback" not in run.out


@pytest.mark.process
def test_an_override_for_an_assertion_that_no_suite_has_is_an_error(usage):
    run = usage.pytest("--qsa-set", "assertions.peak.max=2")
    assert run.code == 2
    assert "no assertion 'peak' in a.qsa.yaml (did you mean 'peaks'?)" in run.out


@pytest.mark.process
def test_workers_say_once_that_an_override_is_for_no_assertion(usage):
    run = usage.pytest("--qsa-set", "assertions.peak.max=2", "-n2")
    assert run.code == 2
    assert run.out.count("no assertion 'peak' in a.qsa.yaml (did you mean 'peaks'?)") == 1
    assert "crashed" not in run.out


@pytest.mark.process
def test_an_override_for_an_assertion_reaches_the_suite_that_has_it(usage):
    usage.write("b.qsa.yaml", GOOD.replace("id: peaks", "id: other"))
    run = usage.pytest("--co", "-q", "--qsa-set", "assertions.other.max=2")
    assert run.code == 0, run.out
    assert run.collected == ["a.qsa.yaml::peaks", "b.qsa.yaml::other"]


ASSERTION = "assertions:\n  - {id: a, metric: absmax, layers: ., site: output, "
MISTAKES = {
    "a key that looks like a tag": (f"{ASSERTION}max: 1}}\n'[': 1\n", 4, "unknown key '['"),
    "such a key of an assertion": (f"{ASSERTION}max: 1, '[x': 3}}\n", 3, "unknown key '[x'"),
    "an int that is none": (f"{ASSERTION}max: !!int abc}}\n", 3, "invalid literal for int"),
    "a bool that is none": (f"{ASSERTION}max: !!bool abc}}\n", 3, "the value is no bool"),
    "a time that is none": (f"{ASSERTION}max: !!timestamp abc}}\n", 3, "the value is no timestamp"),
    "5,000 digits": (f"{ASSERTION}max: {'9' * 5000}}}\n", 3, "a whole number has at most 1,000 digits"),
    "as many in hexadecimal": (f"{ASSERTION}max: 0x{'f' * 5000}}}\n", 3, "a whole number has at most 1,000 digits"),
    "a long text for a number": (f"{ASSERTION}max: {'x' * 5000}}}\n", 3, "max: should be a valid number"),
    "NUL in a path": (f'{ASSERTION}max: 1}}\ndata: {{source: "custom:a\\0b"}}\n', 4, "holds the character NUL"),
    "NUL in a base": ('extends: "a\\0b"\n', 2, "holds the character NUL"),
    "half a pair of surrogates": ('data: {source: "\\ud800"}\n', 2, "surrogates not allowed"),
    "a count too large for a regex": (f"{ASSERTION}max: 1, exclude: 'x{{99999999999}}'}}\n", 3, "number is too large"),
    "a seed below zero": ("data: {seed: -1}\n", 2, "seed: should be greater than or equal to 0"),
    "samples without an end": ("data: {num_samples: 99999999999999999999}\n", 2, "num_samples: should be less than"),
    "a name that no system takes": (f"data: {{source: {'a' * 5000}}}\n", 2, "is no path"),
    "such a name of a base": (f"extends: {'a' * 5000}\n", 2, "File name too long"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_odd_mistake_is_one_short_line_too(tmp_path, monkeypatch, mistake):
    monkeypatch.chdir(tmp_path)
    text, line, said = MISTAKES[mistake]
    Path("odd.qsa.yaml").write_text(f"model: {{path: x}}\n{text}", encoding="utf-8")
    with pytest.raises(SuiteError, match=rf"^odd\.qsa\.yaml:{line}: .*{re.escape(said)}") as caught:
        load_suite(Path("odd.qsa.yaml"))
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 300
