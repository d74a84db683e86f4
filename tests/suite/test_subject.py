"""The subject: what two suites share, which other checkpoints it is held against, and what an option names."""

import json
from dataclasses import replace

import pytest

from pytest_qsa.common import InfraError
from pytest_qsa.suite import (
    Checkpoint,
    Data,
    Memory,
    Model,
    Subject,
    files_of,
    loaded_files,
    located,
    previous_of,
)  # fmt: skip


def subject(folder, name="one", *, data=None, memory=None, **model):
    source = {"path": "checkpoint"} if not {"path", "factory", "served", "logprobs"} & model.keys() else {}
    return Subject(name, Model(**source, **model), Data(**(data or {})), Memory(**(memory or {})), folder)


@pytest.fixture
def folder(tmp_path):
    """Return a suite's folder with a checkpoint, a text and a kept reference."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "kept.qsa").write_bytes(b"")
    return tmp_path


SAME = {
    "the name of the suite's model": {"name": "two"},
    "what must hold of the run": {"allow_idle": "head"},
    "the last release": {"previous": "checkpoint"},
}
OTHER = {
    "the checkpoint": {"path": "org/name"},
    "the revision": {"revision": "main"},
    "the dtype": {"dtype": "bfloat16"},
    "the reference": {"reference": "org/name"},
    "a requirement, which needs a forward": {"require": {"executed_as": ["float"]}},
    "the data": {"data": {"seed": 1}},
    "the memory": {"memory": {"device": "cpu"}},
    "a factory": {"factory": "a:b"},
    "the base of an adapter": {"base": "org/name"},
}


@pytest.mark.parametrize("case", SAME)
def test_subjects_share_a_pass_where_nothing_measured_differs(folder, case):
    assert subject(folder, **SAME[case]).key == subject(folder).key


@pytest.mark.parametrize("case", OTHER)
def test_subjects_have_passes_of_their_own_where_something_measured_differs(folder, case):
    assert subject(folder, **OTHER[case]).key != subject(folder).key


def test_the_same_files_are_the_same_subject_from_any_folder(folder):
    (folder / "deep").mkdir()
    own = {"data": {"source": "custom:text.txt"}}
    other = {"path": "../checkpoint", "data": {"source": "custom:../text.txt"}}
    assert subject(folder / "deep", **other).key == subject(folder, **own).key
    assert subject(folder / "deep", **own | {"path": "../checkpoint"}).key != subject(folder, **own).key


def test_a_path_is_a_folder_where_there_is_one_and_else_the_id_of_a_hub(folder):
    assert subject(folder).path == located(folder, "checkpoint") == str(folder / "checkpoint")
    assert subject(folder, path="org/name").path == located(folder, "org/name") == "org/name"
    assert subject(folder, factory="a:b").path == ""
    assert subject(folder, served={"url": "http://localhost:1/v1"}).path == "http://localhost:1/v1"
    assert subject(folder, logprobs="text.txt").path == str(folder / "text.txt")
    named = Subject("x", Model(path="checkpoint"), Data(), Memory(), folder, checkpoint="/elsewhere")
    assert named.path == "/elsewhere"


@pytest.mark.parametrize(
    ("named", "path", "revision"),
    [("checkpoint", "checkpoint", None), ("org/name", "org/name", None), ("org/name@v1", "org/name", "v1")],
)
@pytest.mark.parametrize(
    ("key", "other"), [("reference", lambda subject: subject.reference), ("previous", previous_of)]
)
def test_another_checkpoint_is_a_subject_of_the_same_data(folder, key, other, named, path, revision):
    own = subject(folder, path="own", gguf_file="a.gguf", dtype="bfloat16", data={"seed": 3}, **{key: named})
    found = other(own)
    assert (found.model.path, found.model.revision, found.model.gguf_file) == (path, revision, None)
    assert (found.model.dtype, found.data, found.model.previous, found.checkpoint) == ("bfloat16", own.data, None, None)


def test_a_folder_whose_name_has_an_at_is_no_revision(folder):
    (folder / "a@b").mkdir()
    found = subject(folder, reference="a@b").reference
    assert (found.model.path, found.model.revision) == ("a@b", None)


@pytest.mark.parametrize("name", ["kept.qsa", "later.qsa"])
def test_a_recorded_reference_is_known_by_its_name_before_it_is_there(folder, name):
    assert subject(folder, reference=name).reference == folder / name


def test_a_subject_without_a_reference_has_none(folder):
    assert subject(folder).reference is None
    assert Subject("x", None, Data(), Memory(), folder).reference is None


def test_a_subject_of_a_fixture_names_no_model(folder):
    with pytest.raises(InfraError, match="no section 'model'"):
        _ = Subject("x", None, Data(), Memory(), folder, fixture="conftest.py").named
    own = subject(folder).named
    assert own.named is own
    with pytest.raises(InfraError, match="no last release"):
        previous_of(own)


def test_files_lie_in_the_path_or_in_the_cache_of_the_hub(folder, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def looked_up(error):
        def snapshot_download(*_, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        return subject(folder, path="org/name").local_folder

    assert subject(folder).local_folder == folder / "checkpoint"
    assert subject(folder, factory="a:b").local_folder is None
    assert looked_up(LocalEntryNotFoundError("not in the cache")) is None
    with pytest.raises(InfraError, match=r"org/name can't be looked up in the hub's cache: .*denied"):
        looked_up(PermissionError("denied"))


def test_static_checks_need_files(folder, int8_llama, llama):
    for own in (subject(folder, factory="a:b"), subject(folder, served={"url": "http://localhost:1"})):
        with pytest.raises(InfraError, match="has none here"):
            files_of(own)
        assert loaded_files(own) is None
    files = files_of(subject(folder, path=str(int8_llama), reference=str(llama)))
    assert files.reference is not None
    assert len(files.stored_quantized) == 28
    assert files_of(subject(folder, path=str(int8_llama), reference="kept.qsa")).reference is None
    assert loaded_files(subject(folder, path=str(int8_llama), submodule="model")) is None


def test_a_damaged_reference_hides_no_layer_that_the_subject_holds_quantized(folder, int8_llama):
    (folder / "checkpoint" / "config.json").write_text("[]")
    assert len(loaded_files(subject(folder, path=str(int8_llama), reference="checkpoint")).stored_quantized) == 28


def test_an_option_names_a_checkpoint_and_labels_tell_two_apart(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "other" / "checkpoint").mkdir(parents=True)
    found = Checkpoint.parse_all(["checkpoint", "new=org/name", "other/checkpoint", "a=b=c"])
    assert [checkpoint.name for checkpoint in found] == [None, "new", None, "a"]
    assert [checkpoint.path for checkpoint in found] == [
        str(folder / "checkpoint"), "org/name", str(folder / "other" / "checkpoint"), "b=c",
    ]  # fmt: skip
    assert [checkpoint.label for checkpoint in found] == ["checkpoint.1", "new", "checkpoint.3", "a"]


def test_an_engine_has_baselines_of_its_own(folder):
    assert subject(folder, path="own").baseline_name == "one"
    served = subject(folder, path="own", engine="vllm")
    assert served.baseline_name == "one@vllm"
    cached = subject(folder, path="own", engine={"name": "vllm", "kv_cache_dtype": "fp8"})
    assert cached.baseline_name == "one@vllm+kv-fp8"
    assert served.of_files.baseline_name == "one"


def test_an_original_runs_by_transformers_and_the_last_release_by_the_engine_of_the_subject(folder):
    own = subject(folder, path="own", engine="vllm", reference="org/original", previous="org/last")
    assert own.reference.model.engine.name == "transformers"
    assert previous_of(own).model.engine.name == "vllm"


def test_what_is_measured_names_neither_places_nor_names(folder):
    measured = json.dumps(subject(folder, name="x", reference="kept.qsa", previous="p").model.measured)
    assert not any(word in measured for word in ("checkpoint", "kept.qsa", "previous"))


class TestAnAdapter:
    @pytest.fixture
    def folder(self, folder):
        """Return a suite's folder with two releases of an adapter, its base and a model."""
        for name in ("adapter", "older"):
            (folder / name).mkdir()
            (folder / name / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
        (folder / "base").mkdir()
        return folder

    def test_has_a_folder_of_its_own_and_that_of_its_base(self, folder):
        own = subject(folder, path="adapter", base="base")
        assert (own.local_folder, own.base_folder) == (folder / "adapter", folder / "base")
        assert own.base_path == str(folder / "base")
        plain = subject(folder)
        assert (plain.base_folder, plain.base_path) == (plain.local_folder, "")

    def test_shares_its_base_with_its_last_release_and_not_with_its_reference(self, folder):
        own = subject(folder, path="adapter", base="base", previous="older", reference="checkpoint")
        assert previous_of(own).base == str(folder / "base")
        assert own.reference.base == ""

    def test_leaves_the_base_out_for_another_checkpoint_that_is_none(self, folder):
        """`--qsa-model MERGED` runs the suite of an adapter."""
        own = subject(folder, path="adapter", base="base")
        assert replace(own, checkpoint=str(folder / "checkpoint")).base == ""
        assert replace(own, checkpoint=str(folder / "older")).base == str(folder / "base")

    def test_needs_a_path(self):
        with pytest.raises(ValueError, match="base is that of an adapter in path"):
            Model(factory="a:b", base="base")
