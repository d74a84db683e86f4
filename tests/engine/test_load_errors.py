"""Checkpoints that can't be loaded: the fault of their own files is ANOMALOUS, that of the machine is INFRA."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.tokenizer import load_tokenizer
from pytest_qsa.suite.sections import Memory, Model
from support.checkpoints import edited, save_gguf

DOWN = "model.layers.2.mlp.down_proj"


def load(folder, **keys):
    return load_model(Model(path=str(folder), **keys), str(folder), Memory(device="cpu"), allow_code=False)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_an_absent_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def replace_by_a_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


FILES = {
    "a file that is cut short": (cut, AnomalyError, "is cut short"),
    "an index that names an absent file": (
        index_an_absent_shard,
        AnomalyError,
        "model-00002.*is not there",
    ),
    "a config.json that is no JSON": (
        lambda folder: (folder / "config.json").write_text("{,"),
        AnomalyError,
        r"config\.json is no JSON",
    ),
    "a pointer of git-lfs": (replace_by_a_pointer, InfraError, "git lfs pull"),
    "no config.json": (lambda folder: (folder / "config.json").unlink(), InfraError, "can't be loaded"),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_told_from_one_that_this_machine_lacks(llama, tmp_path, damage):
    change, kind, text = FILES[damage]
    folder = edited(llama, tmp_path / "damaged")
    change(folder)
    with pytest.raises(kind, match=text):
        load(folder)


def reshaped(weights):
    weights[f"{DOWN}.weight"] = torch.ones(3, 4)


def lost(weights):
    del weights[f"{DOWN}.weight"]


def added(weights):
    weights[f"{DOWN}.extra"] = torch.ones(3)


def scale_added(weights):
    weights[f"{DOWN}.weight_scale"] = torch.ones(3)


TENSORS = {
    reshaped: (AnomalyError, r"weight is \[3, 4\], and LlamaForCausalLM as it is loaded here wants \[32, 64\]"),
    lost: (AnomalyError, "lacks 1 weights of LlamaForCausalLM, filled with random numbers"),
    added: (AnomalyError, r"extra; name them in model\.allow_unexpected"),
    scale_added: (AnomalyError, "weight_scale; the codes of a weight mean nothing without them"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_the_checkpoint_s_fault(llama, tmp_path, change):
    kind, text = TENSORS[change]
    with pytest.raises(kind, match=text) as raised:
        load(edited(llama, tmp_path / "damaged", change))
    assert change is not scale_added or "allow_unexpected" not in str(raised.value)


def test_sound_files_that_the_libraries_load_wrongly_are_the_installation_s_fault(quantized):
    with pytest.raises(InfraError, match="the installed libraries can't load the format"):
        load(quantized["int4 with zero points"])


def test_a_damaged_gguf_file_is_the_checkpoint_s_fault(llama, tmp_path):
    folder = save_gguf(tmp_path / "gguf", llama)
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(AnomalyError, match="can't be read as GGUF"):
        load(folder, gguf_file="model.gguf")


def test_a_model_without_a_tokenizer_says_so_where_one_is_needed(llama, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((llama / name).read_bytes())
    assert load_tokenizer(str(folder), {}) is None
    with pytest.raises(InfraError, match="bare has no tokenizer"):
        load(folder).required_tokenizer("bare")


TOKENIZERS = {
    "a tokenizer.json that is no JSON": ("{,", AnomalyError, r"tokenizer\.json is no JSON"),
    "a tokenizer.json that is no tokenizer": ('{"model": {}}', InfraError, "the tokenizer of .* can't be loaded: "),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_can_not_be_loaded_is_not_one_that_is_missing(llama, tmp_path, damage):
    text, kind, message = TOKENIZERS[damage]
    folder = edited(llama, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(text)
    loaded = load(folder)  # weights and batches of one's own need no tokenizer
    assert loaded.tokenizer is None
    with pytest.raises(kind, match=message):
        loaded.required_tokenizer("damaged")


def test_a_package_that_a_tokenizer_needs_is_named(llama, monkeypatch):
    import transformers

    def needs_sentencepiece(*arguments, **options):
        raise ImportError("sentencepiece is not installed")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs_sentencepiece)
    with pytest.raises(InfraError, match="can't be loaded: ImportError: sentencepiece is not installed"):
        load_tokenizer(str(llama), {})


def test_a_declared_format_that_nothing_knows_is_the_installation_s_fault(llama, tmp_path):
    def declare(config):
        config["quantization_config"] = {"quant_method": "nobodys"}

    folder = edited(llama, tmp_path / "unknown", config=declare)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InfraError):
        load(folder)
