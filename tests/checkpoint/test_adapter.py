"""A LoRA adapter from the files: the weight is the base's and the delta, as peft merges them; a misfit is told."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.torch import load_file

from pytest_qsa.captures import Request
from pytest_qsa.checkpoint import Files, Folder, base_of, capture_weights, format_of, open_folder, problems_of
from pytest_qsa.common import AnomalyError, InfraError
from support.captures import statistics
from support.checkpoints import edit_json, edited, save_adapter

Q, DOWN, GATE = (f"model.layers.2.{name}_proj" for name in ("self_attn.q", "mlp.down", "mlp.gate"))
A, B = (f"base_model.model.{DOWN}.lora_{factor}.weight" for factor in "AB")

LORAS = {
    "two kinds of layers": {},
    "rsLoRA": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r"layers\.[02]\.self_attn\.q_proj": 2, "down_proj": 3},
        "alpha_pattern": {"layers.1.mlp.down_proj": 11},
    },
    "rsLoRA with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "modules saved as a whole": {"modules_to_save": ["lm_head"], "target_modules": ["k_proj"]},
    "an embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "some layers": {"layers_to_transform": [1, 2], "target_modules": ["gate_proj"]},
    "bias and dropout": {"lora_dropout": 0.5, "bias": "none"},
}


@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_rows_are_those_of_pefts_own_merge(llama, tmp_path, options):
    merged = save_adapter(tmp_path / "adapter", llama, **options)
    form = format_of(open_folder(tmp_path / "adapter", base=str(llama)))
    matrices = {name.removesuffix(".weight"): tensor for name, tensor in merged.items() if tensor.dim() == 2}
    assert set(matrices) <= set(form.folder.layers)
    for layer, expected in matrices.items():
        # to within a rounding of float32, in which peft adds
        np.testing.assert_allclose(form.rows(layer), expected.numpy(), rtol=1e-5, atol=2e-7, err_msg=layer)
        np.testing.assert_array_equal(form.rows(layer, slice(1, 9, 3)), form.rows(layer)[1:9:3])
    assert any(not np.array_equal(form.rows(layer), form.stored_rows(layer)) for layer in matrices)
    assert list(form.adapter_findings()) == []


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Return a small GPT-2, whose linear layers keep their weights [in, out]."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2") / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2)).save_pretrained(folder)
    return folder


def test_layers_whose_weights_are_transposed_get_a_transposed_delta(gpt2, tmp_path):
    merged = save_adapter(tmp_path / "adapter", gpt2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    form = format_of(open_folder(tmp_path / "adapter", base=str(gpt2)))
    for layer in ("transformer.h.1.attn.c_attn", "transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"):
        expected = merged[f"{layer}.weight"].numpy()
        stored = layer if layer in form.folder.layers else layer.removeprefix("transformer.")
        np.testing.assert_allclose(form.rows(stored), expected, rtol=1e-5, atol=2e-7, err_msg=layer)


def test_an_adapter_on_a_quantized_base_is_added_to_the_dequantized_weight(llama, int8_llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama)
    form = format_of(open_folder(tmp_path / "adapter", base=str(int8_llama)))
    delta = merged[f"{DOWN}.weight"].numpy() - load_file(llama / "model.safetensors")[f"{DOWN}.weight"].numpy()
    np.testing.assert_allclose(form.rows(DOWN) - form.stored_rows(DOWN), delta, atol=1e-6)
    np.testing.assert_array_equal(form.stored_rows(DOWN), format_of(open_folder(int8_llama)).rows(DOWN))


REFUSED = {
    "DoRA": ({"use_dora": True}, "no plain LoRA (use_dora)"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "an option of a later peft": ({"config": lambda config: config.update(use_new=True)}, "use_new"),
    "PiSSA": ({"config": lambda config: config.update(init_lora_weights="pissa")}, "init_lora_weights, pissa"),
    "IA3": ({"kind": "IA3", "target_modules": ["down_proj"], "feedforward_modules": ["down_proj"]}, "IA3"),
    "VeRA": ({"kind": "Vera", "target_modules": ["down_proj"], "r": 4}, "VERA"),
    "LoHa": ({"kind": "LoHa", "target_modules": ["down_proj"], "r": 4}, "LOHA"),
    "AdaLoRA": ({"kind": "AdaLora", "target_modules": ["down_proj"], "total_step": 100}, "ADALORA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_weight_under_another_adapter_is_refused_by_its_name(llama, tmp_path, case):
    options, named = REFUSED[case]
    save_adapter(tmp_path / "adapter", llama, **options)
    form = format_of(open_folder(tmp_path / "adapter", base=str(llama)))
    assert form.rows(DOWN) is None
    assert named in form.refusal(DOWN)
    np.testing.assert_array_equal(form.rows(GATE), form.stored_rows(GATE))  # what it doesn't change is read


def test_a_wrong_fan_in_fan_out_is_no_reason_to_guess(llama, tmp_path):
    def transposed(config):
        config["fan_in_fan_out"] = True

    save_adapter(tmp_path / "adapter", llama, config=transposed)
    form = format_of(open_folder(tmp_path / "adapter", base=str(llama)))
    assert form.rows(Q) is None  # a square weight, whose sides don't tell
    assert "fan_in_fan_out" in form.refusal(Q)


def findings(adapter, base, metric="checkpoint_health"):
    return problems_of(Files(open_folder(adapter, base=str(base))), metric)[1]


def test_a_healthy_adapter_has_no_problem(llama, int8_llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama, modules_to_save=["lm_head"])
    assert findings(tmp_path / "adapter", llama) == []
    assert findings(tmp_path / "adapter", int8_llama) == []


def test_statistics_of_the_weights_of_files_are_those_of_the_merged_weights(llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama, modules_to_save=["lm_head"])
    files = Files(open_folder(tmp_path / "adapter", base=str(llama)))
    found = capture_weights(files, [Request("_proj$|head", "weight", None, statistics("moments"))])
    for layer in (DOWN, Q, GATE, "lm_head"):
        rms = np.sqrt(np.mean(merged[f"{layer}.weight"].double().numpy() ** 2))
        assert found.weight(f"^{layer}$").rms().values[0] == pytest.approx(rms, rel=1e-6)
    assert found.provenance.model.base == str(llama)
    assert found.provenance.model.adapter == "LoRA of rank 4"


FAULTS = {
    "NaN": (lambda tensors: tensors[A].__setitem__((1, 2), float("nan")), "1 elements are NaN"),
    "half of a delta": (lambda tensors: tensors.pop(A), f"lora_B.weight of {DOWN} and no lora_A.weight"),
    "another rank": (lambda t: t.update({A: t[A][:2].clone(), B: t[B][:, :2].clone()}), "says rank 4"),
    "another width": (lambda t: t.update({A: t[A][:, :60].clone()}), "32×60, and the weight of the base 32×64"),
    "a layer that isn't there": (
        lambda t: t.update({name.replace("layers.2.", "layers.9."): t[name].clone() for name in (A, B)}),
        "a layer model.layers.9.mlp.down_proj",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_an_adapter_is_found_in_its_files(llama, tmp_path, fault):
    change, what = FAULTS[fault]
    save_adapter(tmp_path / "adapter", llama, tensors=change)
    found = findings(tmp_path / "adapter", llama)
    assert found
    assert any(what in finding.what for finding in found), [str(finding) for finding in found]


@pytest.mark.parametrize(
    ("key", "value"), [("r", 0), ("lora_alpha", "16"), ("rank_pattern", ["q_proj"]), ("alpha_pattern", {"(": 1})]
)
def test_a_scaling_that_is_no_number_is_told(llama, tmp_path, key, value):
    save_adapter(tmp_path / "adapter", llama, config=lambda config: config.update({key: value}))
    with pytest.raises(AnomalyError, match=rf"adapter_config\.json: {key} "):
        format_of(open_folder(tmp_path / "adapter", base=str(llama))).rows(DOWN)


def test_tensors_of_an_adapter_are_no_part_of_the_model_beside_them(llama, tmp_path):
    """Without adapter_config.json nothing would load them."""
    save_adapter(tmp_path / "adapter", llama)
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copy(tmp_path / "adapter/adapter_model.safetensors", folder)
    form = format_of(open_folder(folder))
    np.testing.assert_array_equal(form.rows(DOWN), format_of(open_folder(llama)).rows(DOWN))
    assert problems_of(Files(open_folder(folder)), "checkpoint_health")[1] == []


def test_an_adapter_in_the_folder_of_a_model_changes_its_weights(llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama)
    folder = shutil.copytree(llama, tmp_path / "model")
    shutil.copytree(tmp_path / "adapter", folder, dirs_exist_ok=True)
    form = format_of(Folder(folder))
    np.testing.assert_allclose(form.rows(DOWN), merged[f"{DOWN}.weight"].numpy(), rtol=1e-5, atol=2e-7)
    assert base_of(folder) is None


@pytest.fixture(scope="module")
def saved(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "adapter"
    save_adapter(folder, llama)
    return folder


@pytest.fixture
def adapter(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "adapter")


class TestTheBase:
    def name(self, adapter, base, **more):
        edit_json(adapter / "adapter_config.json", lambda c: c.update(base_model_name_or_path=base, **more))

    def test_is_the_one_that_the_suite_names(self, adapter, llama):
        assert base_of(adapter, str(llama)) == (str(llama), None)
        assert base_of(adapter, "org/model@v2") == ("org/model", "v2")

    def test_is_the_hub_id_that_the_adapter_names_with_its_revision(self, adapter):
        self.name(adapter, "org/model", revision="abc")
        assert base_of(adapter) == ("org/model", "abc")

    def test_lies_inside_the_folder(self, adapter, llama):
        shutil.copytree(llama, adapter / "base")
        self.name(adapter, "base")
        assert base_of(adapter) == (str((adapter / "base").resolve()), None)
        assert format_of(open_folder(adapter)).rows(DOWN) is not None

    @pytest.mark.parametrize("base", ["{llama}", "../llama", "./nowhere", ""])
    def test_elsewhere_on_this_machine_is_not_taken_from_a_downloaded_file(self, adapter, llama, base):
        self.name(adapter, base.format(llama=llama))
        with pytest.raises(InfraError, match=r"name (it|the base) in model\.base"):
            open_folder(adapter)

    def test_that_may_be_a_folder_here_or_a_hub_id_is_asked_for(self, adapter, monkeypatch, tmp_path):
        (tmp_path / "org/model").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        self.name(adapter, "org/model")
        with pytest.raises(InfraError, match=r"name the base in model\.base"):
            open_folder(adapter)

    def test_of_no_adapter_is_a_mistake(self, llama):
        with pytest.raises(InfraError, match=r"holds no adapter_config\.json: leave it out"):
            open_folder(llama, base=str(llama))

    def test_that_is_not_here_is_named(self, adapter):
        with pytest.raises(
            InfraError, match="there is no folder nowhere/at-all, and it is no hub id in the local cache"
        ):
            open_folder(adapter, base="nowhere/at-all")


def test_a_configuration_without_a_kind_is_damaged(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama, config=lambda config: config.pop("peft_type"))
    with pytest.raises(AnomalyError, match="has no peft_type"):
        format_of(open_folder(tmp_path / "adapter", base=str(llama))).rows(DOWN)


def test_an_adapter_without_safetensors_is_not_read(llama, tmp_path):
    save_adapter(tmp_path / "adapter", llama)
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(InfraError, match=r"no adapter_model\.safetensors"):
        format_of(open_folder(tmp_path / "adapter", base=str(llama))).rows(DOWN)


def test_other_names_before_the_blocks_are_matched_by_what_follows_them(llama, tmp_path):
    merged = save_adapter(tmp_path / "adapter", llama)

    def renamed(weights):
        for name in [name for name in weights if name.startswith("model.layers.")]:
            weights[f"language_{name}"] = weights.pop(name)

    base = edited(llama, tmp_path / "base", renamed)
    form = format_of(open_folder(tmp_path / "adapter", base=str(base)))
    np.testing.assert_allclose(form.rows(f"language_{DOWN}"), merged[f"{DOWN}.weight"].numpy(), rtol=1e-5, atol=2e-7)
    assert list(form.adapter_findings()) == []
