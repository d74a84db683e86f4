"""The JSON Schema of suites: editors complete and check by it."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from pytest_qsa.checkpoint import CHECKS
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import suite_schema
from support.paths import ROOT

EXAMPLES = ROOT / "example_suites"


@pytest.fixture(scope="module")
def schema():
    return suite_schema()


def test_the_schema_has_every_metric_with_its_parameters(schema):
    named = {
        d["properties"]["metric"]["const"]: d
        for d in schema["$defs"].values()
        if "const" in d["properties"].get("metric", {})
    }
    assert set(named) == {*METRICS, *CHECKS, "external"}
    for name, metric in [*METRICS.items(), *CHECKS.items()]:
        assert set(metric.parameters) <= set(named[name]["properties"])
        assert named[name]["additionalProperties"] is False


def test_the_schema_knows_the_sections_and_refuses_others(schema):
    assert set(schema["properties"]) == {
        "extends",
        "defaults",
        "model",
        "data",
        "memory",
        "generation",
        "visualization",
        "assertions",
    }
    assert schema["additionalProperties"] is False


def fits(value, schema):
    return jsonschema.Draft202012Validator(schema).is_valid(value)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.qsa.yaml")), ids=lambda path: path.name)
def test_the_schema_accepts_the_example_suites(schema, path):
    assert fits(yaml.safe_load(path.read_text(encoding="utf-8")), schema)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{positions: {skip_first: 4}, baseline: {rel: 0.1}}", True),
        ("{equals: 3, over: sum, level: warn, reason: x, exclude: y}", True),
        ("{max: many}", False),
        ("{treshold: 3}", False),
        ("{level: wran}", False),
    ],
)
def test_the_schema_tells_right_from_wrong(schema, text, right):
    base = {"id": "a", "metric": "absmax", "layers": "x", "site": "output"}
    value = {"assertions": [base | yaml.safe_load(text)]}
    assert fits(value, schema) == right


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("{extends: a.yaml, assertions: [{id: a, max: 3}]}", True),
        ("{extends: [a.yaml], assertions: {a: {max: 3, min: null}, b: null}}", True),
        ("{defaults: {site: output, max: 1}, assertions: [{id: a, metric: rms, layers: x}]}", True),
        ("{assertions: [{id: a, max: 3}]}", False),
        ("{extends: 3}", False),
        ("{extends: a.yaml, assertions: [{max: 3}]}", False),
        ("{extends: a.yaml, assertions: {a: {mx: 3}}}", False),
        ("{extends: a.yaml, assertions: {a: {max: many}}}", False),
        ("{defaults: {sight: output}}", False),
    ],
)
def test_the_schema_knows_suites_that_extend_and_share(schema, text, right):
    assert fits(yaml.safe_load(text), schema) == right


def test_the_schema_documents_its_keys(schema):
    assert schema["$defs"]["Data"]["description"]
    assert schema["$defs"]["OutlierTokens"]["description"]
