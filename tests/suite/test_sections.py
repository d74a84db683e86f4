"""What the sections model and visualization take, and what they make of it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pytest_qsa.suite import Memory, Model, Served, Visualization


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ({"path": "checkpoints/smollm2-int8/"}, "smollm2-int8"),
        ({"path": "org/name"}, "name"),
        ({"path": "x", "name": "team/gate"}, "team/gate"),
        ({"factory": "package.module:make"}, "package.module:make"),
        ({"served": {"url": "http://localhost:8000/v1"}}, "served"),
        ({"served": {"url": "http://localhost:8000/v1", "model": "org/small"}}, "small"),
        ({"logprobs": "answers/run.jsonl"}, "run.jsonl"),
    ],
)
def test_a_subject_has_a_name_for_its_baselines(model, name):
    assert Model(**model).id == name


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ({"path": "x", "name": "../../../out"}, "name"),
        ({"path": "x", "name": "/etc"}, "name"),
        ({"path": "x", "name": "a//b"}, "name"),
        ({"path": "x", "name": "team/."}, "name"),
        ({"path": "../.."}, "path"),
        ({"path": "/"}, "path"),
        ({"path": "models/a\nb"}, "path"),
        ({"path": r"models\.."}, "path"),
        ({"served": {"url": "http://localhost", "model": ".."}}, "served"),
    ],
)
def test_no_name_leads_out_of_the_folder_of_baselines(model, key):
    with pytest.raises(ValidationError, match="can't be that of a subject") as raised:
        Model(**model)
    assert raised.value.errors()[0]["ctx"]["error"].key == key
    assert Model(**model | {"name": "named"}).id == "named"


@pytest.mark.parametrize("sources", [{}, {"path": "x", "factory": "a:b"}, {"path": "x", "logprobs": "y"}])
def test_a_model_has_one_source(sources):
    with pytest.raises(ValidationError, match="give one of path, factory, served and logprobs"):
        Model(**sources)


@pytest.mark.parametrize(
    ("model", "only"),
    [({"path": "x"}, False), ({"logprobs": "x"}, True), ({"served": {"url": "http://localhost"}}, True)],
)
def test_a_served_model_is_known_by_its_logprobs_only(model, only):
    assert Model(**model).logprobs_only == only


def test_what_a_capture_depends_on_are_no_locations_and_no_names():
    one = Model(path="a", name="x", reference="b", previous="c")
    assert one.measured == Model(path="d").measured
    assert one.measured != Model(path="a", dtype="float16").measured


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("https://host/v1/", "https://host"),
        ("http://h", "http://h"),
    ],
)
def test_the_root_of_an_endpoint_has_no_version(url, root):
    assert Served(url=url).root == root


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:8000", "write an address such as"),
        ("ftp://host/v1", "write an address such as"),
        ("http://host:99999/v1", "write an address such as"),
        ("http://host/v1?key=1", "write an address such as"),
        ("http://me:secret@host/v1", "a password has no place in a suite"),
    ],
)
def test_an_address_that_is_none_is_refused(url, said):
    with pytest.raises(ValidationError, match=said):
        Served(url=url)


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1", "xpu:0"])
def test_a_device_is_one_of_torch(device):
    assert Memory(device=device).device == device


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cpu:0", "CUDA"])
def test_another_device_is_refused(device):
    with pytest.raises(ValidationError, match="is none of auto, cpu"):
        Memory(device=device)


@pytest.mark.parametrize(
    ("ways", "taken"),
    [("W8A8 emulated", ["W8A8 emulated"]), (["weights only", "float"], ["weights only", "float"])],
)
def test_a_required_execution_is_one_or_a_list(ways, taken):
    assert Model(path="x", require={"executed_as": ways}).require.executed_as == taken


@pytest.mark.parametrize("ways", ["fast", [], ["W8A8", 3]])
def test_a_required_execution_that_there_is_none_of_is_refused(ways):
    with pytest.raises(ValidationError, match="executed_as"):
        Model(path="x", require={"executed_as": ways})


@pytest.mark.parametrize(("name", "file"), [("a.html", "a.html"), ("a.htm", "a.htm"), ("a", "a.html")])
def test_a_report_has_a_suffix(name, file):
    assert Visualization(output={"report_name": name}).output.report_file == file


def test_a_picture_of_one_side_says_which():
    visualization = Visualization()
    assert (visualization.heatmap_3d.site, visualization.distribution.site) == ("output", "input")


@pytest.mark.parametrize(
    "model",
    [
        {"factory": "a:b", "engine": "vllm"},
        {"path": "x", "engine": "sglang"},
        {"path": "x", "engine": {"name": "vllm", "worker_extension_cls": "a.b"}},
        {"path": "x", "engine": {"name": "vllm", "quantization": "a.b.C"}},
        {"path": "x", "engine": {"tensor_parallel_size": 2}},
        {"path": "x", "engine": "vllm", "gguf_file": "a.gguf"},
        {"path": "x", "engine": "vllm", "submodule": "language_model"},
    ],
)
def test_an_engine_takes_no_setting_that_could_name_code_and_no_other_source(model):
    with pytest.raises(ValidationError):
        Model(**model)


def test_captures_of_before_there_were_engines_are_still_found():
    assert "engine" not in Model(path="x").measured
    assert "engine" not in Model(path="x", engine="transformers").measured
    assert Model(path="x", engine="vllm").measured["engine"]["name"] == "vllm"
