"""Adapters put onto a loaded model: the weight that multiplies, one layer a module, and what can't be loaded so."""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pytest_qsa.captures import LOGITS, Request
from pytest_qsa.checkpoint import Files, capture_weights, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError, InfraError
from pytest_qsa.engine.formats.format import dequantized, is_quantized, schemes_of
from pytest_qsa.engine.formats.stored import StoredWeights
from pytest_qsa.engine.load import adapters, models
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.outline import outline
from pytest_qsa.engine.modules import layers_of
from pytest_qsa.engine.reference.record import RecordOptions
from pytest_qsa.engine.subject import capture_subject, record_reference
from pytest_qsa.suite import Data, Memory, Model, Subject, files_of
from support.captures import statistics
from support.checkpoints import edit_json, edited, save_adapter
from support.models import llama as small_llama

DOWN, UP = "model.layers.2.mlp.down_proj", "model.layers.2.mlp.up_proj"
MEMORY = Memory(device="cpu")


def load(path, base="", memory=MEMORY, **keys):
    return load_model(Model(path=str(path), **keys), str(path), memory, allow_code=False, base=str(base)).model


def weight(model, layer):
    return dequantized(layers_of(model)[layer]).numpy()


LORAS = {
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    "an embedding and a saved head": {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_weights_are_those_of_pefts_own_merge(llama, tmp_path, options):
    merged = save_adapter(tmp_path / "adapter", llama, **options)
    model = load(tmp_path / "adapter", llama)
    form = format_of(open_folder(tmp_path / "adapter", base=str(llama)))
    for name, expected in merged.items():
        layer = name.removesuffix(".weight")
        np.testing.assert_allclose(weight(model, layer), expected.numpy(), rtol=1e-6, atol=1e-7, err_msg=layer)
        if expected.dim() == 2:
            np.testing.assert_allclose(form.rows(layer), weight(model, layer), rtol=1e-5, atol=2e-7)


def test_a_layer_with_an_adapter_is_one_layer(llama, tmp_path):
    """What peft puts into it isn't listed, so that a suite of the base fits, and a reference has all of its layers."""
    save_adapter(tmp_path / "adapter", llama, modules_to_save=["lm_head"])
    assert list(layers_of(load(tmp_path / "adapter", llama))) == list(layers_of(load(llama)))


def test_layers_are_listed_as_they_are_loaded(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    path = str(tmp_path / "adapter")
    rows = {name: row for name, *row in outline(Model(path=path), path, str(llama))}
    assert list(rows) == list(layers_of(load(path, llama)))
    assert rows[DOWN] == ["lora.Linear", "32×64", 32 * 64 + 4 * (32 + 64)]
    assert rows[UP][0] == "Linear"


def test_an_adapter_in_the_folder_of_a_model_is_put_onto_it(llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama)
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    np.testing.assert_allclose(weight(load(folder), DOWN), merged[f"{DOWN}.weight"].numpy(), rtol=1e-6, atol=1e-7)


def test_a_base_that_lacks_a_weight_is_not_hidden_by_its_adapter(llama, tmp_path):
    """transformers reports the keys of the adapter alone, where it loads both."""
    folder = edited(llama, tmp_path / "model", lambda weights: weights.pop(f"{UP}.weight"))
    save_adapter(tmp_path / "adapter", llama)
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    with pytest.raises(AnomalyError, match=rf"lacks 1 weight of .*{UP}"):
        load(folder)


def test_of_an_adapter_on_a_quantized_base_the_base_is_dequantized(llama, int8_llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    model, base = load(tmp_path / "adapter", int8_llama), load(int8_llama)
    form = format_of(open_folder(tmp_path / "adapter", base=str(int8_llama)))
    np.testing.assert_allclose(weight(model, DOWN), form.rows(DOWN), rtol=1e-5, atol=1e-6)
    assert schemes_of(model) == schemes_of(base)
    stored = StoredWeights(Files(form.folder), layers_of(model))
    reference, error, *_ = stored.powers(DOWN, layers_of(model)[DOWN])
    assert error < 1e-10 * reference
    assert stored.unmatched == []
    assert is_quantized(layers_of(model)[DOWN])


def test_an_adapter_on_floats_is_not_quantized(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    assert not any(is_quantized(layer) for layer in layers_of(load(tmp_path / "adapter", llama)).values())


@pytest.fixture
def peft_model():
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}
        return peft.get_peft_model(small_llama(), peft.LoraConfig(**options)), options


def test_disabled_merged_and_second_adapters_count_as_the_forward_uses_them(peft_model):
    import peft

    model, options = peft_model
    layer = layers_of(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    base = layer.base_layer.weight.detach().clone()
    first = layer.get_delta_weight("default")
    torch.testing.assert_close(dequantized(layer), base + first)
    model.add_adapter("other", peft.LoraConfig(**options))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(dequantized(layer), base + first + layer.get_delta_weight("other"))
    with model.disable_adapter():
        assert torch.equal(dequantized(layer), base)
    model.base_model.set_adapter("default")
    model.merge_adapter()
    torch.testing.assert_close(dequantized(layer), base + first)


def test_a_model_of_a_fixture_may_be_offloaded(peft_model):
    from accelerate import cpu_offload

    model, _ = peft_model
    layer = layers_of(model)["base_model.model.model.layers.0.self_attn.q_proj"]
    whole = dequantized(layer)
    cpu_offload(model, execution_device="cpu")
    assert layer.base_layer.weight.device.type == "meta"
    assert torch.equal(dequantized(layer), whole)


OTHERS = {
    "DoRA": ("Lora", {"use_dora": True}, "lora.Linear, DoraLinearVariant"),
    "AdaLoRA": ("AdaLora", {"total_step": 10}, "adalora.SVDLinear"),
    "IA3": ("IA3", {"feedforward_modules": []}, "ia3.Linear"),
    "VeRA": ("Vera", {}, "vera.Linear"),
    "LoHa": ("LoHa", {}, "loha.Linear"),
    "trained tokens": ("TrainableTokens", {"token_indices": [1]}, "trainable_tokens.TrainableTokensLayer"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_the_weight_under_another_adapter_is_refused_by_its_class(case):
    import peft

    kind, options, named = OTHERS[case]
    target = "embed_tokens" if kind == "TrainableTokens" else "q_proj"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(small_llama(), getattr(peft, f"{kind}Config")(target_modules=[target], **options))
    layers = layers_of(model)
    with pytest.raises(InfraError, match=named):
        dequantized(next(layer for name, layer in layers.items() if name.endswith(target)))
    assert dequantized(layers["base_model.model.lm_head"]) is not None


def change_config(**keys):
    return {"config": lambda config: config.update(keys)}


def cut(tensors):
    for name in [name for name in tensors if "layers.1.mlp" in name]:
        tensors.pop(name)


A = f"base_model.model.{DOWN}.lora_A.weight"
MISTAKES = {
    "a kind that peft doesn't know": (change_config(peft_type="FOO"), InfraError, "no adapter of the kind FOO"),
    "an option that this peft doesn't know": (change_config(use_new=True), InfraError, "doesn't know use_new"),
    "prompts": (change_config(peft_type="P_TUNING"), InfraError, "P_TUNING puts tokens before a text"),
    "a target that isn't there": (change_config(target_modules=["c_attn"]), InfraError, "c_attn.* not found"),
    "tensors of another width": (
        {"tensors": lambda t: t.update({A: t[A][:, :9].clone()})},
        AnomalyError,
        "is 32×9, and",
    ),
    "a layer without its tensors": ({"tensors": cut}, AnomalyError, "lacks .*layers.1.mlp.down_proj.*random"),
    "DoRA, which transformers loads in part": ({"use_dora": True}, InfraError, "lora_magnitude_vector.* don't load"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_adapter_that_cannot_be_loaded_is_told_in_one_line(llama, tmp_path, mistake):
    options, kind, text = MISTAKES[mistake]
    save_adapter(tmp_path / "adapter", llama, **options)
    with pytest.raises(kind, match=text) as raised:
        load(tmp_path / "adapter", llama)
    assert "\n" not in str(raised.value)


KINDS = {
    "IA3": ("IA3", {"target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}),
    "AdaLoRA": ("AdaLora", {"target_modules": ["down_proj"], "total_step": 10}),
    "replicated layers": ("Lora", {"layer_replication": [[0, 3], [1, 4]]}),
    "trained tokens": ("Lora", {"trainable_token_indices": [1, 2]}),
    "PiSSA": ("Lora", {"init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("case", KINDS)
def test_an_adapter_whose_weights_are_refused_runs_as_peft_loads_it(llama, tmp_path, case):
    import peft
    from transformers import AutoModelForCausalLM

    kind, options = KINDS[case]
    adapter, ids = str(tmp_path / "adapter"), torch.arange(20)[None]
    save_adapter(tmp_path / "adapter", llama, kind=kind, **options)
    files = Files(open_folder(adapter, base=str(llama)))
    assert problems_of(files, "checkpoint_health")[1] == []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).eval()
        torch.testing.assert_close(load(adapter, llama)(ids).logits, loaded(ids).logits)


def test_what_needs_no_refused_weight_is_measured(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama, kind="IA3", **KINDS["IA3"][1])
    model = Model(path="adapter", base=str(llama))
    subject = Subject("ia3", model, Data(num_samples=1, seq_len=8), MEMORY, tmp_path)
    rms = [Request("_proj$", site, None, statistics("moments")) for site in ("weight", "output")]
    for capture in (capture_subject(subject, rms), capture_weights(files_of(subject), rms)):
        downs = {f"model.layers.{block}.mlp.down_proj" for block in range(4)}
        assert set(capture.refused) == downs
        assert {layer for layer, site in capture.sites if site == "weight"}.isdisjoint(downs)
        assert (UP, "weight") in capture.sites
        assert capture.provenance.model.adapter == "IA3"


def test_an_adapter_is_kept_as_a_reference_whose_head_is_that_of_its_base(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    data, file = Data(num_samples=1, seq_len=8), tmp_path / "kept.qsa"
    subject = Subject("lora", Model(path="adapter", base=str(llama)), data, MEMORY, tmp_path).named
    predictions = [Request("", LOGITS, None, statistics("scores", "agreement"))]
    recording = record_reference(subject, predictions, RecordOptions(), file)
    assert recording.content.head["path"] == os.path.relpath(llama, tmp_path)


def test_without_peft_nothing_is_measured(llama, tmp_path, monkeypatch):
    """transformers would run the base alone, and say nothing."""
    save_adapter(tmp_path / "adapter", llama)
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    for path, base in ((folder, ""), (tmp_path / "adapter", llama)):
        with pytest.raises(InfraError, match="pip install peft"):
            load(path, base)


def test_an_offloaded_base_takes_no_adapter(llama, tmp_path, monkeypatch):
    save_adapter(tmp_path / "adapter", llama)
    with pytest.raises(InfraError, match=r"memory\.offload_device is disk: merge it"):
        load(tmp_path / "adapter", llama, Memory(device="cpu", offload_device="disk"))
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=1))
    with pytest.raises(InfraError, match="its base does not fit into memory: merge it"):
        load(tmp_path / "adapter", llama)


def test_a_base_with_an_adapter_of_its_own_is_not_stacked(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    base = shutil.copytree(llama, tmp_path / "base")
    shutil.copytree(tmp_path / "adapter", base, dirs_exist_ok=True)
    with pytest.raises(InfraError, match="holds an adapter of its own: merge that first"):
        load(tmp_path / "adapter", base)


def test_the_tokenizer_of_an_adapter_is_used_before_that_of_its_base(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    path = str(tmp_path / "adapter")
    assert len(load_model(Model(path=path), path, MEMORY, allow_code=False, base=str(llama)).tokenizer) == 320
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llama / name, path)
    content = json.loads((tmp_path / "adapter/tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 320, "content": "<new>"})
    (tmp_path / "adapter/tokenizer.json").write_text(json.dumps(content))
    assert len(load_model(Model(path=path), path, MEMORY, allow_code=False, base=str(llama)).tokenizer) == 321


def test_an_adapter_of_the_hub_is_found_in_its_cache(llama, tmp_path, monkeypatch):
    """The adapter names its base by hub id, as most of them do."""
    from huggingface_hub import constants

    def cached(name, source):
        folder = tmp_path / f"hub/models--org--{name}"
        shutil.copytree(source, folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs/main").write_text("0" * 40)

    merged = save_adapter(tmp_path / "adapter", llama)
    edit_json(tmp_path / "adapter/adapter_config.json", lambda c: c.update(base_model_name_or_path="org/base"))
    cached("base", llama)
    cached("lora", tmp_path / "adapter")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert adapters.source_of("org/lora", None).path == "org/base"
    np.testing.assert_allclose(weight(load("org/lora"), DOWN), merged[f"{DOWN}.weight"].numpy(), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(format_of(open_folder("org/lora")).rows(DOWN), weight(load("org/lora"), DOWN), atol=2e-7)
