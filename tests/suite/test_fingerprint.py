"""What makes two runs the same: every setting, file and library that could change a number, and nothing else."""

import hashlib
import json
import os
import shutil
import threading
from importlib import metadata

import pytest

from pytest_qsa.captures import Capture
from pytest_qsa.suite import Data, FileHashes, Memory, Model, Subject, fingerprint as module, fingerprint_of, identified


def subject_of(folder, **changed):
    sections = {"model": {}, "data": {}, "memory": {}} | changed
    model = Model(path=str(folder), **sections["model"])
    return Subject("llama", model, Data(**sections["data"]), Memory(**sections["memory"]), folder.parent)


def fingerprint(folder, **changed):
    return fingerprint_of(subject_of(folder, **changed), FileHashes(None))


@pytest.fixture
def own_llama(llama, tmp_path):
    return shutil.copytree(llama, tmp_path / "llama")


@pytest.mark.parametrize(
    "changed",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"attn_implementation": "eager"}},
        {"data": {"seed": 1}},
        {"data": {"num_samples": 3}},
        {"data": {"add_special_tokens": False}},
        {"memory": {"device": "cpu"}},
    ],
    ids=str,
)
def test_a_setting_that_can_change_a_number_changes_the_fingerprint(own_llama, changed):
    assert fingerprint(own_llama, **changed) != fingerprint(own_llama)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "modeling_own.py"])
def test_a_changed_file_of_the_checkpoint_changes_the_fingerprint(own_llama, file):
    before = fingerprint(own_llama)
    with (own_llama / file).open("ab") as content:
        content.write(b" ")
    assert fingerprint(own_llama) != before


def test_changed_data_changes_the_fingerprint_and_its_place_does_not(own_llama):
    text = own_llama.parent / "words.txt"
    text.write_text("one two")
    before = fingerprint(own_llama, data={"source": "custom:words.txt"})
    text.write_text("one too")
    assert fingerprint(own_llama, data={"source": "custom:words.txt"}) != before
    moved = own_llama.rename(own_llama.with_name("moved"))
    assert fingerprint(moved) == fingerprint(shutil.copytree(moved, own_llama))


def test_a_changed_file_of_a_data_folder_changes_the_fingerprint(own_llama):
    folder = own_llama.parent / "texts"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "one"}')
    before = fingerprint(own_llama, data={"source": "custom:texts"})
    (folder / "train.jsonl").write_text('{"text": "two"}')
    assert fingerprint(own_llama, data={"source": "custom:texts"}) != before


def test_a_set_of_the_hub_is_known_by_its_copy_and_not_cached_without_one(own_llama, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert fingerprint(own_llama, data={"source": "wikitext2"}) is None
    copy = tmp_path / "cache" / "Salesforce___wikitext" / "x" / "wikitext-train.arrow"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"one")
    before = fingerprint(own_llama, data={"source": "wikitext2"})
    copy.write_bytes(b"two")
    assert before is not None
    assert fingerprint(own_llama, data={"source": "wikitext2"}) not in (None, before)


def test_what_no_hash_can_cover_is_never_cached(tmp_path):
    assert fingerprint_of(Subject("x", None, Data(), Memory(), tmp_path), FileHashes(None)) is None
    factory = Subject("x", Model(factory="a:b"), Data(), Memory(), tmp_path)
    assert fingerprint_of(factory, FileHashes(None)) is None


def test_a_large_file_is_hashed_once_and_again_when_it_changes(tmp_path):
    file, memory = tmp_path / "weights.safetensors", tmp_path / "hashes.json"
    file.write_bytes(bytes(2 << 20))
    first = FileHashes(memory).of(file)
    remembered = FileHashes(memory)
    assert remembered.of(file) == first
    file.write_bytes(bytes(2 << 20)[:-1] + b"x")
    assert FileHashes(memory).of(file) != first
    memory.write_text("{broken")
    assert FileHashes(memory).of(file) != first


def test_a_hash_that_was_begun_is_that_of_the_file_as_it_is_when_it_is_asked_for(tmp_path):
    kept, edited = tmp_path / "kept.safetensors", tmp_path / "edited.safetensors"
    for file in (kept, edited):
        file.write_bytes(os.urandom((9 << 20) + 7))  # two parts
    hashes = FileHashes(None)
    hashes.begin([kept, edited])
    for begun in hashes._begun.values():
        begun.result()
    edited.write_bytes(os.urandom(2 << 20))
    assert [hashes.of(file) for file in (kept, edited)] == [
        hashlib.sha256(file.read_bytes()).hexdigest() for file in (kept, edited)
    ]
    assert hashes.remembers(kept)
    assert hashes.remembers(edited)


def test_a_file_whose_hash_was_begun_is_read_once_by_a_thread_of_its_own(tmp_path, monkeypatch):
    file, readers, read = tmp_path / "weights.safetensors", [], module._stamp_and_digest
    file.write_bytes(bytes(2 << 20))

    def noted(file):
        readers.append(threading.current_thread().name)
        return read(file)

    monkeypatch.setattr(module, "_stamp_and_digest", noted)
    hashes = FileHashes(None)
    hashes.begin([file])
    assert hashes.of(file) == hashes.of(file) == hashlib.sha256(bytes(2 << 20)).hexdigest()
    assert [name.partition("_")[0] for name in readers] == ["qsa-hashes"]


def beside(own, reference):
    return fingerprint_of(subject_of(own, model={"reference": str(reference)}), FileHashes(None), with_reference=True)


def test_a_reference_counts_where_it_runs_beside_the_subject(own_llama, changed_llama, tmp_path):
    alone = fingerprint(own_llama, model={"reference": str(changed_llama)})
    assert alone == fingerprint(own_llama)
    first = beside(own_llama, changed_llama)
    assert first not in (alone, None)
    assert beside(own_llama, shutil.copytree(changed_llama, tmp_path / "other")) == first
    assert beside(own_llama, own_llama) != first
    kept = tmp_path / "kept.qsa"
    kept.write_bytes(b"rows")
    assert beside(own_llama, kept) not in (first, alone, None)
    assert beside(own_llama, "nobody/nothing") is None


def test_a_capture_says_which_weights_it_is_of(own_llama, changed_llama):
    named = identified(Capture(sites={}), subject_of(own_llama), FileHashes(None)).provenance.model
    other = identified(Capture(sites={}), subject_of(changed_llama), FileHashes(None)).provenance.model
    assert named.path == str(own_llama)
    assert named.weights.startswith("sha256:")
    assert named.weights != other.weights
    again = identified(Capture(sites={}), subject_of(own_llama.rename(own_llama.with_name("moved"))), FileHashes(None))
    assert again.provenance.model.weights == named.weights
    fixture = identified(Capture(sites={}), Subject("x", None, Data(), Memory(), own_llama.parent), FileHashes(None))
    assert fixture.provenance.model.weights is None


def test_a_library_that_reads_any_format_changes_the_fingerprint(own_llama, monkeypatch):
    first, version = fingerprint(own_llama), metadata.version
    for library in ("bitsandbytes", "compressed-tensors", "torchao", "gguf", "kernels", "gptqmodel"):
        with monkeypatch.context() as patched:
            patched.setattr(metadata, "version", lambda name, own=library: "0.0" if name == own else version(name))
            assert fingerprint(own_llama) != first, library


def test_a_capture_names_the_format_of_its_files(own_llama, quantized):
    def of(folder):
        return identified(Capture(sites={}), subject_of(folder), FileHashes(None)).provenance.model.format

    assert of(quantized["int8"]) == "compressed-tensors"
    assert of(own_llama) is None


@pytest.mark.parametrize(
    "file", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "llama/config.json"]
)
def test_the_files_of_an_adapter_and_of_its_base_count(own_llama, file):
    folder = own_llama.parent
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"x")
    before = fingerprint(folder / "adapter", model={"base": "llama"})
    assert before not in (None, fingerprint(own_llama))
    with (folder / file).open("ab") as content:
        content.write(b" ")
    assert fingerprint(folder / "adapter", model={"base": "llama"}) != before


def test_a_capture_of_an_adapter_names_both_folders_and_the_weights_of_both(own_llama):
    folder = own_llama.parent
    (folder / "adapter").mkdir()
    (folder / "adapter/adapter_config.json").write_text('{"peft_type": "LORA"}')

    def model_of(content):
        (folder / "adapter/adapter_model.safetensors").write_bytes(content)
        subject = subject_of(folder / "adapter", model={"base": "llama"})
        return identified(Capture({}), subject, FileHashes(None)).provenance.model

    one, other = model_of(b"x"), model_of(b"y")
    assert (one.path, one.base) == (str(folder / "adapter"), str(own_llama))
    assert one.weights != other.weights


@pytest.fixture
def with_code_elsewhere(own_llama):
    """Return a checkpoint whose class lies in another folder, and that folder."""
    code = own_llama.parent / "code"
    (code / "parts").mkdir(parents=True)
    (code / "modeling_own.py").write_text("from .parts import layers\n")
    (code / "parts/layers.py").write_text("x = 1\n")
    config = json.loads((own_llama / "config.json").read_text())
    config["text_config"] = {"auto_map": {"AutoModelForCausalLM": [f"{code}--modeling_own.Own", None]}}
    (own_llama / "config.json").write_text(json.dumps(config))
    return own_llama, code


@pytest.mark.parametrize("file", ["modeling_own.py", "parts/layers.py"])
def test_changed_code_of_another_repository_changes_the_fingerprint_where_it_may_run(with_code_elsewhere, file):
    folder, code = with_code_elsewhere
    trusted, not_trusted = ({"trust_remote_code": trust} for trust in (True, False))
    before = [fingerprint(folder, model=model) for model in (trusted, not_trusted)]
    (code / file).write_text("x = 2\n")
    after = [fingerprint(folder, model=model) for model in (trusted, not_trusted)]
    assert None not in before
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_code_of_another_repository_counts_for_the_reference_too(with_code_elsewhere, llama):
    folder, code = with_code_elsewhere
    subject = subject_of(llama, model={"reference": str(folder), "trust_remote_code": True})
    before = fingerprint_of(subject, FileHashes(None), with_reference=True)
    (code / "modeling_own.py").write_text("x = 2\n")
    assert before not in (None, fingerprint_of(subject, FileHashes(None), with_reference=True))


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_a_model_with_code_that_is_not_here_has_no_fingerprint(own_llama, key):
    config = json.loads((own_llama / "config.json").read_text())
    config[key] = {"AutoModel": "nobody/nothing--modeling.Own"} if key == "auto_map" else "nobody/kernel"
    (own_llama / "config.json").write_text(json.dumps(config))
    assert fingerprint(own_llama, model={"trust_remote_code": True}) is None
    assert fingerprint(own_llama, model={"attn_implementation": "nobody/kernel"}) is None


def remembered(tmp_path):
    """Return a file above the size from which its hash is remembered, and the file that remembers it."""
    weights, memory = tmp_path / "weights.bin", tmp_path / "hashes.json"
    weights.write_bytes(b"x" * ((1 << 20) + 1))
    FileHashes(memory).of(weights)
    return weights, memory


def test_a_remembered_hash_that_was_edited_is_not_believed(tmp_path):
    weights, memory = remembered(tmp_path)
    assert FileHashes(memory).remembers(weights)
    digest = FileHashes(None).of(weights)
    memory.write_text(memory.read_text().replace(digest, "0" * 64))
    assert not FileHashes(memory).remembers(weights)
    assert FileHashes(memory).of(weights) == digest


def test_a_remembered_hash_in_a_file_without_a_checksum_is_not_believed(tmp_path):
    weights, memory = remembered(tmp_path)
    content = json.loads(memory.read_text())
    del content["checksum"]
    memory.write_text(json.dumps(content))
    assert not FileHashes(memory).remembers(weights)


def test_a_changed_picture_that_a_file_of_records_names_changes_the_fingerprint(own_llama):
    folder = own_llama.parent
    (folder / "set").mkdir()
    (folder / "set" / "a.png").write_bytes(b"one")
    (folder / "a.jsonl").write_text('{"image": "set/a.png"}')
    before = fingerprint(own_llama, data={"source": "custom:a.jsonl", "num_samples": 1})
    (folder / "set" / "a.png").write_bytes(b"two")
    assert fingerprint(own_llama, data={"source": "custom:a.jsonl", "num_samples": 1}) != before
