"""Suites that extend others, and what their assertions share: what is merged, and where each value then stands."""

from __future__ import annotations

import re

import pytest

from pytest_qsa.common import SuiteError
from pytest_qsa.suite import inherit, load_suite, read_suite
from pytest_qsa.suite.yaml_source import read_yaml
from support.projects import Project, peaks

BASE = """\
model: {path: x, dtype: float32}
data: {num_samples: 2, seq_len: 32}
defaults: {site: output, reason: because}
assertions:
  - {id: peaks, metric: absmax, layers: 'layers', max: 100}
  - id: drift
    metric: magnitude
    layers: down_proj$
    baseline: {rel: 0.1, direction: up}
  - {id: gone, metric: rms, layers: x, max: 1}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes a file of the project."""
    monkeypatch.chdir(tmp_path)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def extending(write):
    """Return a function that loads a suite which extends the base."""
    write("_base/w8a8.qsa.yaml", BASE)

    def load(text, *overrides):
        return load_suite(write("a/one.qsa.yaml", "extends: ../_base/w8a8.qsa.yaml\n" + text), overrides)

    return load


@pytest.fixture
def mistake(extending):
    """Return a function that loads a wrong suite and returns what is said of it."""

    def mistake(text, *overrides):
        with pytest.raises(SuiteError) as caught:
            extending(text, *overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return mistake


def ids(file):
    return [assertion.id for assertion in file.assertions]


def test_sections_merge_key_by_key(extending):
    suite = extending("model: {path: y, name: one}\ndata: {seed: 3}\n").suite
    assert (suite.model.path, suite.model.name, suite.model.dtype) == ("y", "one", "float32")
    assert (suite.data.num_samples, suite.data.seed) == (2, 3)


def test_assertions_merge_by_id_and_new_ones_come_last(extending):
    file = extending(
        "assertions:\n  - {id: new, metric: std, layers: x, max: 1}\n  - {id: drift, baseline: {rel: 0.2}}\n"
    )
    assert ids(file) == ["peaks", "drift", "gone", "new"]
    drift = file.assertions[1]
    assert (drift.metric, drift.baseline.rel, drift.baseline.direction) == ("magnitude", 0.2, "up")


@pytest.mark.parametrize(
    "text",
    [
        "assertions:\n  gone: null\n  peaks: {max: null, min: 1}\n",
        "assertions: {gone: , peaks: {max: ~, min: 1}}\n",
    ],
)
def test_null_takes_out_an_assertion_or_a_key_of_it(extending, text):
    file = extending(text)
    assert ids(file) == ["peaks", "drift"]
    assert (file.assertions[0].max, file.assertions[0].min) == (None, 1)


def test_a_value_of_another_kind_replaces_the_base_s(extending):
    assert extending("assertions: {drift: {baseline: null, max: 3}}\n").assertions[1].max == 3


def test_later_bases_win_over_earlier_ones_and_the_suite_over_all(write):
    write("one.yaml", "model: {path: x}\ndata: {seed: 1, num_samples: 1, seq_len: 1}\n")
    write("two.yaml", "data: {seed: 2, num_samples: 2}\n")
    suite = load_suite(write("a.qsa.yaml", "extends: [one.yaml, two.yaml]\ndata: {seed: 3}\n")).suite
    assert (suite.data.seed, suite.data.num_samples, suite.data.seq_len) == (3, 2, 1)


def test_a_base_may_extend_another(write):
    write("one.yaml", BASE)
    write("two/two.yaml", "extends: ../one.yaml\nassertions: {peaks: {max: 7}}\n")
    assert load_suite(write("a.qsa.yaml", "extends: two/two.yaml\n")).assertions[0].max == 7


def test_paths_of_a_base_stay_relative_to_it(write):
    write("_base/checkpoint/config.json", "{}")
    write("_base/b.yaml", "model: {path: checkpoint, reference: org/name}\ndata: {source: 'custom:text.txt'}\n")
    write("a/mid.yaml", "extends: ../_base/b.yaml\n")
    suite = load_suite(write("a/deep/a.qsa.yaml", "extends: ../mid.yaml\n")).suite
    assert suite.model.path == "../../_base/checkpoint"
    assert suite.model.reference == "org/name"
    assert suite.data.source == "custom:../../_base/text.txt"


def place(file, name, key=()):
    index = ids(file).index(name)
    found = file.bound_place_of(index, key) if key else file.place_of(index)
    return found.path.name, found.line


def test_an_assertion_and_its_bound_stand_in_the_files_that_say_them(extending):
    file = extending("assertions:\n  - id: drift\n    max: 3\n")
    assert place(file, "peaks") == ("w8a8.qsa.yaml", 5)
    assert place(file, "drift") == ("one.qsa.yaml", 3)
    assert place(file, "drift", ("max",)) == ("one.qsa.yaml", 4)
    assert place(file, "drift", ("baseline",)) == ("w8a8.qsa.yaml", 9)


MERGED = {
    # case: (what the base says, what the suite says, what both say together)
    "a key that only the base has": ("data: {a: 1}", "model: {b: 2}", {"data": {"a": 1}, "model": {"b": 2}}),
    "a key that both have": ("data: {seed: 1, seq_len: 8}", "data: {seed: 2}", {"data": {"seed": 2, "seq_len": 8}}),
    "an order": ("data: {a: 1, b: 2}", "data: {b: 3, c: 4}", {"data": {"b": 3, "c": 4, "a": 1}}),
    "a mapping of mappings": ("x: {y: {a: 1, b: 2}}", "x: {y: {b: 3}}", {"x": {"y": {"b": 3, "a": 1}}}),
    "a list": ("x: {y: [1, 2, 3]}", "x: {y: [4]}", {"x": {"y": [4]}}),
    "a list by a mapping": ("x: {y: [1, 2]}", "x: {y: {a: 1}}", {"x": {"y": {"a": 1}}}),
    "a mapping by a number": ("x: {y: {a: 1}}", "x: {y: 3}", {"x": {"y": 3}}),
    "a number by a mapping": ("x: {y: 3}", "x: {y: {a: 1}}", {"x": {"y": {"a": 1}}}),
    "null takes out a key": ("x: {y: 1, z: 2}", "x: {y: null}", {"x": {"z": 2}}),
    "null takes out a section": ("x: {y: 1}\nz: 2", "x: null", {"z": 2}),
    "null of the suite's own stays": ("x: {y: 1}", "x: {z: null}", {"x": {"z": None, "y": 1}}),
    "null of the base is said again": ("x: {y: null}", "x: {y: 1}", {"x": {"y": 1}}),
    "assertions by id": (
        "assertions: [{id: a, max: 1}, {id: b, max: 2}]", "assertions: [{id: c, max: 3}, {id: b, min: 0}]",
        {"assertions": [{"id": "a", "max": 1}, {"id": "b", "min": 0, "max": 2}, {"id": "c", "max": 3}]},
    ),
    "assertions in a mapping": (
        "assertions: {a: {max: 1}, 7: {max: 2}}", "assertions: {7: {max: 3}}",
        {"assertions": [{"id": "a", "max": 1}, {"id": "7", "max": 3}]},
    ),
    "a list over a mapping of assertions": (
        "assertions: {a: {max: 1}}", "assertions: [{id: a, max: 2}]", {"assertions": [{"id": "a", "max": 2}]},
    ),
    "an assertion taken out": (
        "assertions: [{id: a, max: 1}, {id: b}]", "assertions: {a: null}", {"assertions": [{"id": "b"}]},
    ),
    "a number that is an id": (
        "assertions: [{id: 1, max: 1}]", "assertions: [{id: '1', max: 2}]", {"assertions": [{"id": "1", "max": 2}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MERGED)
def test_a_suite_is_laid_over_its_base(write, case):
    base, own, both = MERGED[case]
    write("base.yaml", base + "\n")
    found = read_suite(write("own.yaml", f"extends: base.yaml\n{own}\n")).data
    assert found.pop("extends") == "base.yaml"
    assert found == both
    assert all(list(found[key]) == list(both[key]) for key in both if isinstance(both[key], dict))


PATHS = {
    # case: (what the base in ../base says, what is then said in own/)
    "a folder that is there": ("model: {path: here}", {"model": {"path": "../base/here"}}),
    "a name of a hub": ("model: {path: org/name}", {"model": {"path": "org/name"}}),
    "the reference and the last release": (
        "model: {reference: here, previous: here}",
        {"model": {"reference": "../base/here", "previous": "../base/here"}},
    ),
    "a text of one's own": ("data: {source: 'custom:a.txt'}", {"data": {"source": "custom:../base/a.txt"}}),
    "a built-in text": ("data: {source: sample}", {"data": {"source": "sample"}}),
    "files of assertions": (
        "assertions: [{id: a, file: evals/a.json, reference: b.json}]",
        {"assertions": [{"id": "a", "file": "../base/evals/a.json", "reference": "../base/b.json"}]},
    ),
    "files of defaults": ("defaults: {file: a.json}", {"defaults": {"file": "../base/a.json"}}),
}  # fmt: skip


@pytest.mark.parametrize("case", PATHS)
def test_a_path_of_a_base_leads_to_the_same_file_from_the_suite(write, case):
    base, seen = PATHS[case]
    write("base/here/config.json", "{}")
    write("base/base.yaml", base + "\n")
    found = read_suite(write("own/own.yaml", "extends: ../base/base.yaml\n")).data
    assert {key: found[key] for key in seen} == seen


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("assertions: {gon: null}\n", "a/one.qsa.yaml:2: no suite that this one extends has an assertion 'gon' ("),
        ("assertions: [{id: peak, max: 2}]\n", "a/one.qsa.yaml:2: the key 'metric' is missing: no suite that this one"),
        ("assertions: {peaks: 3}\n", "a/one.qsa.yaml:2: assertions: 'peaks' should have the keys of an assertion"),
        ("assertions:\n  id: peaks\n  max: 3\n", "a/one.qsa.yaml:3: assertions is a list: begin each"),
        ("assertions: {peaks: , drift: , gone: }\n", "a/one.qsa.yaml:2: no assertion is left"),
        ("assertions: {peaks: {max: many}}\n", "a/one.qsa.yaml:2: max: should be a valid number"),
        ("assertions: {drift: {site: inptu}}\n", "a/one.qsa.yaml:2: site: 'inptu' is none of"),
        ("assertions: {peaks: {min: 200}}\n", "a/one.qsa.yaml:2: min 200 is above max 100"),
        ("defaults: [site]\n", "a/one.qsa.yaml:2: defaults is a mapping"),
        ("defaults: {sight: output}\n", "a/one.qsa.yaml:2: unknown key 'sight' (did you mean 'site'?)"),
        ("defaults: {id: x}\n", "a/one.qsa.yaml:2: unknown key 'id'"),
        ("defaults: {level: wran}\n", "a/one.qsa.yaml:2: level: 'wran' is none of 'fail' or 'warn' (did you mean"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_the_file_that_makes_it(mistake, text, said):
    assert mistake(text).startswith(said)


def test_a_mistake_of_a_base_is_told_in_the_base(write):
    write("_base/b.yaml", BASE.replace("max: 1}", "max: 1, lauers: 2}"))
    with pytest.raises(SuiteError, match=re.escape("_base/b.yaml:10: unknown key 'lauers' (did you mean 'layers'?)")):
        load_suite(write("a.qsa.yaml", "extends: _base/b.yaml\n"))


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"a.yaml": "extends: b.yaml", "b.yaml": "data: {}\nextends: [a.yaml]"},
            "b.yaml:2: extends goes in a circle: a.yaml → b.yaml → a.yaml",
        ),
        ({"a.yaml": "extends: ./a.yaml"}, "a.yaml:1: extends goes in a circle: a.yaml → a.yaml"),
        (
            {"a.yaml": "extends: b.yaml", "b.yaml": "extends: d/c.yaml"},
            "b.yaml:1: extends 'd/c.yaml': there is no such file (a.yaml → b.yaml → d/c.yaml)",
        ),
        ({"a.yaml": "extends: ."}, "a.yaml:1: extends '.': there is no such file (a.yaml → .)"),
        (
            {"a.yaml": "extends: [b.yaml]", "b.yaml": "x: ["},
            "b.yaml:2: not valid YAML: expected the node content, but found '<stream end>' (a.yaml → b.yaml)",
        ),
        ({"a.yaml": "extends: 3"}, "a.yaml:1: extends is the path of a suite, or a list of them, not 3"),
        ({"a.yaml": "extends: [3]"}, "a.yaml:1: extends is the path of a suite, or a list of them, not [3]"),
        (
            {"a.yaml": "extends: b.yaml", "b.yaml": "assertions: {peaks: null}"},
            "b.yaml:1: no suite that this one extends has an assertion 'peaks' (a.yaml → b.yaml)",
        ),
    ],
)  # fmt: skip
def test_bases_that_cannot_be_read_are_told_with_the_chain_of_files(write, files, said):
    for name, text in files.items():
        write(name, text + "\n")
    with pytest.raises(SuiteError) as caught:
        load_suite(write("a.yaml", files["a.yaml"] + "\n"))
    assert str(caught.value) == said


def test_defaults_reach_the_assertions_that_do_not_say_it_themselves(extending):
    file = extending("defaults: {site: input, baseline: {rel: 0.3, abs: 1}}\nassertions: {peaks: {site: weight}}\n")
    assert [assertion.site for assertion in file.assertions] == ["weight", "input", "input"]
    assert [assertion.reason for assertion in file.assertions] == ["because"] * 3
    kept = file.assertions[1].baseline
    assert (kept.rel, kept.abs, kept.direction) == (0.1, 1, "up")


def test_null_keeps_a_default_away(extending):
    assert extending("assertions: {peaks: {reason: null}}\n").assertions[0].reason is None


def test_a_default_goes_only_to_metrics_that_take_it(write):
    file = load_suite(
        write(
            "a.yaml",
            "defaults: {site: output, layers: x, max: 1, threshold: 7, positions: no_sink, reduce: mean, q: 0.5}\n"
            "assertions: [{id: a, metric: outlier_tokens}, {id: b, metric: rms}, {id: c, metric: quantile},\n"
            "  {id: d, metric: magnitude, site: weight}]\n",
        )
    )
    assert [a.positions for a in file.assertions] == ["no_sink", None, None, None]
    assert [a.reduce for a in file.assertions] == ["mean", None, None, "mean"]
    assert (file.assertions[0].threshold, file.assertions[2].q) == (7, 0.5)


def test_an_override_reaches_the_defaults_and_the_merged_assertions(extending):
    file = extending("", "defaults.site=input", "assertions.peaks.max=3")
    assert [file.assertions[0].site, file.assertions[0].max] == ["input", 3]


@pytest.fixture(scope="module")
def family(tmp_path_factory, llama):
    """Run two suites that extend one base: the first fails at the base's bound, the second at its own."""
    project = Project(tmp_path_factory.mktemp("family") / "project")
    project.write(
        "_base/w8a8.qsa.yaml",
        f"model: {{path: {llama}}}\ndata: {{num_samples: 2, seq_len: 32}}\nassertions:\n"
        f"  - {{{peaks('max: 1')}}}\n"
        "  - {id: drift, metric: magnitude, stat: median, layers: down_proj$, site: output, baseline: {rel: 0.05}}\n",
    )
    project.write("one/gate.qsa.yaml", "extends: ../_base/w8a8.qsa.yaml\nmodel: {name: one}\n")
    project.write(
        "two/gate.qsa.yaml",
        "extends: ../_base/w8a8.qsa.yaml\nmodel: {name: two}\nassertions:\n  - id: peaks\n    max: 2\n",
    )
    return project, project.pytest("--snapshot-update", "--junitxml=junit.xml")


@pytest.mark.process
def test_a_base_is_collected_only_by_name(family):
    project, run = family
    names = ("peaks", "drift")
    assert run.collected == [f"{folder}/gate.qsa.yaml::{name}" for folder in ("one", "two") for name in names]
    assert project.pytest("--co", "-q", "_base").collected == []
    assert project.pytest("--co", "-q", "_base/w8a8.qsa.yaml").collected[0] == "_base/w8a8.qsa.yaml::peaks"


@pytest.mark.process
def test_a_failure_stands_in_the_file_that_set_the_bound(family):
    _, run = family
    assert run.text("one/gate.qsa.yaml::peaks").startswith("_base/w8a8.qsa.yaml:4: in peaks\n    - {id: peaks,")
    assert run.text("two/gate.qsa.yaml::peaks").startswith("two/gate.qsa.yaml:5: in peaks\n    max: 2\n")
    assert run.labelled("one/gate.qsa.yaml::peaks")["bound"] == ["_base/w8a8.qsa.yaml:4: max 1"]
    assert run.labelled("two/gate.qsa.yaml::peaks")["bound"] == ["two/gate.qsa.yaml:5: max 2"]
    assert run.report("one/gate.qsa.yaml::peaks")["path"].endswith("/_base/w8a8.qsa.yaml")


@pytest.mark.process
def test_baselines_lie_beside_the_suite_that_extends(family):
    project, _ = family
    made = [name for name in project.files() if "qsa_baselines" in name]
    assert made == ["one/qsa_baselines/one/gate/drift.json", "two/qsa_baselines/two/gate/drift.json"]


@pytest.mark.process
def test_a_failure_s_command_runs_the_suite_that_extends(family):
    _, run = family
    assert run.labelled("one/gate.qsa.yaml::peaks")["again"] == ["pytest one/gate.qsa.yaml::peaks"]


def test_a_default_of_sites_does_not_reach_a_check_of_files(write):
    file = load_suite(
        write(
            "a.yaml",
            "defaults: {site: output, layers: x, max: 1}\n"
            "assertions: [{id: a, metric: checkpoint_health}, {id: b, metric: rms}]\n",
        )
    )
    assert [assertion.max for assertion in file.assertions] == [1, 1]


def test_a_base_named_twice_at_each_of_many_levels_is_read_once(write, monkeypatch):
    write("b0.qsa.yaml", BASE)
    for level in range(1, 25):
        write(f"b{level}.qsa.yaml", f"extends: [b{level - 1}.qsa.yaml, b{level - 1}.qsa.yaml]\n")
    read = []
    monkeypatch.setattr(inherit, "read_yaml", lambda path: read.append(path.name) or read_yaml(path))
    assert len(load_suite(write("top.qsa.yaml", "extends: b24.qsa.yaml\n")).assertions) == 3
    assert len(read) == len(set(read)) == 26


def test_a_chain_of_files_that_has_no_end_in_sight_is_refused_in_one_short_line(write):
    write("c0.qsa.yaml", BASE)
    for level in range(1, 400):
        path = write(f"c{level}.qsa.yaml", f"extends: c{level - 1}.qsa.yaml\n")
    with pytest.raises(SuiteError, match=r"^c300\.qsa\.yaml:1: more than 100 suites extend .* → … → ") as caught:
        load_suite(path)
    assert len(str(caught.value)) < 300
