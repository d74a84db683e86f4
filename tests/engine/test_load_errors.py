"""Checkpoints that can't be loaded: the fault of their own files is ANOMALOUS, that of the machine is INFRA."""

from __future__ import annotations

import io
import json
import socket
from contextlib import nullcontext

import pytest
import torch

from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.load import models
from pytest_qsa.engine.load.completeness import check_complete
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.outline import layer_names, outline
from pytest_qsa.engine.load.tokenizer import load_tokenizer
from pytest_qsa.suite.sections import Memory, Model
from support.checkpoints import edited, save_gguf, save_quantized_moe

DOWN = "model.layers.2.mlp.down_proj"


def load(folder, **keys):
    return load_model(Model(path=str(folder), **keys), str(folder), Memory(device="cpu"), allow_code=False)


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_an_absent_shard(folder):
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cut_to_one_shard_without_metadata(folder):
    shard = (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors").name
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))


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
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        AnomalyError,
        r"holds no config\.json: copy or download the checkpoint again",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), AnomalyError, "holds no weights"),
    "weights in a format that is read by others": (
        lambda folder: (folder / "model.safetensors").rename(folder / "model.gguf"),
        InfraError,
        r"name the file, model\.gguf_file: model\.gguf",
    ),
    "a pickle that is none": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        AnomalyError,
        r"pytorch_model\.bin is no file of weights alone",
    ),
    "a link to nothing": (
        lambda folder: ((folder / "model.safetensors").unlink(), (folder / "model.safetensors").symlink_to("gone")),
        AnomalyError,
        r"model\.safetensors is no file: No such file",
    ),
    "a generation_config.json that is no object": (
        lambda folder: (folder / "generation_config.json").write_text("[1]"),
        AnomalyError,
        r"generation_config\.json is no JSON object but a list",
    ),
    "an odd value in generation_config.json": (
        lambda folder: (folder / "generation_config.json").write_text('{"temperature": "hot"}'),
        AnomalyError,
        r"generation_config\.json: temperature is 'hot', and not a number",
    ),
    "shards with an index that transformers stops on": (
        cut_to_one_shard_without_metadata,
        AnomalyError,
        r"index\.json: there is no section metadata",
    ),
    "a config.json that is a pointer of git-lfs": (
        lambda folder: (folder / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n"),
        InfraError,
        r"config\.json is a git-lfs pointer, not the file",
    ),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_told_from_one_that_this_machine_lacks(llama, tmp_path, damage):
    change, kind, text = FILES[damage]
    folder = edited(llama, tmp_path / "damaged")
    change(folder)
    with pytest.raises(kind, match=text):
        load(folder)


def other_settings(**keys):
    """Return an edit of config.json; a key that is None is left out."""

    def change(config):
        config |= {key: value for key, value in keys.items() if value is not None}
        for key in [key for key, value in keys.items() if value is None]:
            config.pop(key, None)

    return change


def groups(**weights):
    """Return an edit of the first quantized group of config.json."""

    def change(config):
        config["quantization_config"]["config_groups"]["group_0"]["weights"] |= weights

    return change


def quantization(**keys):
    def change(config):
        other_settings(**keys)(config["quantization_config"])

    return change


SETTINGS = {
    "no model_type": (other_settings(model_type=None), AnomalyError, r"config\.json names no model_type"),
    "a size that is no number": (
        other_settings(hidden_size="many"),
        AnomalyError,
        r"config\.json is no configuration of llama: .*hidden_size.* expected int, got str",
    ),
    "an unknown activation": (
        other_settings(hidden_act="nope"),
        AnomalyError,
        r"config\.json: no model can be made of its settings: KeyError: 'nope' \(hidden_act\)",
    ),
    "a class that transformers doesn't have": (
        other_settings(architectures=["LlamaForCasualLM"]),
        AnomalyError,
        r"config\.json: architectures names LlamaForCasualLM, .* \(did you mean 'LlamaForCausalLM'\?\)",
    ),
    "something else than a model's class": (
        other_settings(architectures=["LlamaConfig"]),
        AnomalyError,
        "architectures names LlamaConfig, .*; of llama it has LlamaForCausalLM, ",
    ),
    "another family's class": (
        other_settings(architectures=["BertModel"]),
        AnomalyError,
        r"no model can be made of its settings: .* \(architectures names BertModel, which is no class of llama\)",
    ),
    "no class, so that the head is left out": (
        other_settings(architectures=[]),
        AnomalyError,
        "lm_head.weight; config.json names no class in architectures, so that it is LlamaModel",
    ),
    "codes in layers that are declared to have none": (
        quantization(config_groups={}),
        AnomalyError,
        "the quantization_config of config.json leaves these layers out, and they hold codes",
    ),
    "a pattern that is no regular expression": (
        quantization(ignore=["re:("]),
        AnomalyError,
        r"config\.json: quantization_config names layers by '\(', which is no regular expression",
    ),
    "groups that the scales aren't of": (
        groups(strategy="group", group_size=7),
        AnomalyError,
        "weight_scale .*: shape 32×1, but group-wise scales of a weight",
    ),
    "no heads": (other_settings(num_attention_heads=0), AnomalyError, r"json is no configuration of llama: Zero"),
    "another model's width": (
        other_settings(intermediate_size=128),
        AnomalyError,
        r"config\.json makes model\.layers\.0\.mlp\.down_proj \[32, 128\], and the files hold \[32, 64\]",
    ),
    "another model's heads": (
        other_settings(head_dim=16),
        AnomalyError,
        r"config\.json makes model\.layers\.0\.self_attn\..*_proj \[",
    ),
    "another model's depth": (
        other_settings(num_hidden_layers=6),
        AnomalyError,
        r"wants model\.layers\.4\..* the files don't hold",
    ),
    "a quantization without groups": (
        quantization(config_groups=3),
        AnomalyError,
        r"config\.json: quantization_config can't be read: .* config_groups Input should be a valid dictionary",
    ),
    "a quantization without a method": (quantization(quant_method=None), AnomalyError, "it names no quant_method"),
    "a quantization that is no section": (
        other_settings(quantization_config=3),
        AnomalyError,
        r"config\.json: quantization_config is 3, and not a section of settings",
    ),
    "bits that are no number": (groups(num_bits="eight"), AnomalyError, "weights.num_bits is 'eight', and not a whole"),
    "a strategy that a newer library may know": (groups(strategy="newer"), InfraError, "'newer' is not a valid"),
    "a class that a newer library may know": (
        other_settings(model_type="newer"),
        InfraError,
        "model type `newer` but Transformers does not recognize",
    ),
}


@pytest.mark.parametrize("damage", SETTINGS)
def test_a_setting_that_no_model_can_be_made_of_is_the_checkpoint_s_fault(quantized, tmp_path, damage):
    change, kind, text = SETTINGS[damage]
    with pytest.raises(kind, match=text):
        load(edited(quantized["int8"], tmp_path / "odd", config=change))


def test_a_missing_package_is_not_the_checkpoint_s_fault_whatever_its_settings(llama, tmp_path, monkeypatch):
    import transformers

    def lacking(*arguments, **options):
        raise ImportError("this model needs a package")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", lacking)
    with pytest.raises(InfraError, match="can't be loaded: ImportError: this model needs a package"):
        load(edited(llama, tmp_path / "odd", config=other_settings(intermediate_size=128)))


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
    lost: (AnomalyError, r"model\.safetensors lacks 1 weight of LlamaForCausalLM, which would be random numbers"),
    added: (AnomalyError, r"extra; name them in model\.allow_unexpected"),
    scale_added: (AnomalyError, "weight_scale; config.json has no quantization_config, so that codes are taken for"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_that_are_not_those_of_the_model_are_the_checkpoint_s_fault(llama, tmp_path, change):
    kind, text = TENSORS[change]
    with pytest.raises(kind, match=text) as raised:
        load(edited(llama, tmp_path / "damaged", change))
    assert change is not scale_added or "allow_unexpected" not in str(raised.value)


def as_tied(config):
    config["tie_word_embeddings"] = True


def tied_head_in_codes(weights):
    weights["lm_head.weight"] = torch.ones(320, 32, dtype=torch.int8)
    weights["lm_head.weight_scale"] = torch.ones(320, 1)


def test_a_tied_head_in_codes_is_the_checkpoint_s_fault(quantized, tmp_path):
    folder = edited(quantized["int8"], tmp_path / "tied", tied_head_in_codes, config=as_tied)
    with pytest.raises(AnomalyError, match=r"model\.safetensors holds 1 tensor .*; config\.json ties this head to the"):
        load(folder)


def test_a_head_that_was_tied_by_a_key_which_is_gone_says_so(llama, tmp_path):
    def untold(config):
        del config["tie_word_embeddings"]

    folder = edited(llama, tmp_path / "untold", lambda weights: weights.pop("lm_head.weight"), config=untold)
    with pytest.raises(AnomalyError, match=r"lm_head\.weight; config\.json doesn't state tie_word_embeddings"):
        load(folder)


def test_weights_that_transformers_can_not_make_of_the_files_are_named(tmp_path):
    folder = save_quantized_moe(tmp_path / "moe", "W8A8")
    with pytest.raises(InfraError, match=r"can't make 2 weights of .*: model\.layers\.0\.mlp\.experts\.gate_up_proj, "):
        load(folder)


def test_a_path_without_a_folder_says_what_is_there(llama):
    with pytest.raises(InfraError, match=rf"config\.json is a file: give its folder, {llama}$"):
        load(llama / "config.json")
    with pytest.raises(
        InfraError, match=rf"there is no folder .* \(did you mean '{llama.name}'\?\), and it can't be a hub"
    ):
        load(llama.with_name(f"{llama.name}x"))


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
    with pytest.raises(AnomalyError, match="bare has no tokenizer"):
        load(folder).required_tokenizer("bare")


TOKENIZERS = {
    "no JSON": ("{,", AnomalyError, r"tokenizer\.json is no JSON"),
    "no object": ("[]", AnomalyError, r"tokenizer\.json is no JSON object but a list"),
    "no tokenizer": ('{"model": {}}', AnomalyError, r"no tokenizer can be made of .*damaged/tokenizer\.json: "),
    "missing": (
        None,
        AnomalyError,
        r"holds no tokenizer\.json, and no tokenizer can be made of tokenizer_config\.json",
    ),
    "an added token without a number": (
        '{"model": {"type": "WordLevel", "vocab": {}}, "added_tokens": [{"id": "x", "content": "a"}]}',
        AnomalyError,
        r"tokenizer\.json: added_tokens is .*, and not a list of tokens",
    ),
    "a newer library's": ('{"model": {"type": "Newer"}}', InfraError, "the tokenizer of .* can't be loaded: "),
}


@pytest.mark.parametrize("damage", TOKENIZERS)
def test_a_tokenizer_that_can_not_be_loaded_is_not_one_that_is_missing(llama, tmp_path, damage):
    text, kind, message = TOKENIZERS[damage]
    folder = edited(llama, tmp_path / "damaged")
    (folder / "tokenizer.json").write_text(text) if text else (folder / "tokenizer.json").unlink()
    loaded = load(folder)  # weights and batches of one's own need no tokenizer
    assert loaded.tokenizer is None
    with pytest.raises(kind, match=message):
        loaded.required_tokenizer("damaged")


def test_a_chat_template_that_can_not_be_parsed_is_told_where_a_tokenizer_is_needed(llama, tmp_path):
    folder = edited(llama, tmp_path / "damaged")
    (folder / "chat_template.jinja").write_text("{% for message in messages %}{{ message")
    with pytest.raises(AnomalyError, match=r"chat_template\.jinja can't be parsed, line 1: "):
        load(folder).required_tokenizer("damaged")


def test_a_package_that_a_tokenizer_needs_is_named(llama, monkeypatch):
    import transformers

    def needs_sentencepiece(*arguments, **options):
        raise ImportError("sentencepiece is not installed")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs_sentencepiece)
    with pytest.raises(InfraError, match="can't be loaded: ImportError: sentencepiece is not installed"):
        load_tokenizer(str(llama), {})


def declaring(**keys):
    def change(config):
        config["quantization_config"] = keys

    return change


def as_codes(weights):
    weights[f"{DOWN}.weight"] = (weights[f"{DOWN}.weight"] * 1000).to(torch.int8)


def with_state(weights):
    weights[f"{DOWN}.SCB"] = torch.ones(32)


def as_unsigned(weights):
    weights[f"{DOWN}.weight"] = weights[f"{DOWN}.weight"].view(torch.uint8)


UNDECLARED = {
    "an unknown method, and plain floats": (
        "float", {"config": declaring(quant_method="nobodys")}, InfraError,
        r"declares quant_method 'nobodys', which transformers 5.* doesn't know: it would take the codes for weights",
    ),
    "codes, and no declaration": (
        "float", {"change": as_codes}, AnomalyError, r"down_proj\.weight \(.*\): its I8 codes have no scale",
    ),
    "codes of another dtype than is declared": (
        "int8", {"change": as_unsigned}, AnomalyError,
        r"files hold weight \(U8 32×64\), weight_scale .*: int-quantized is declared, which is stored as I8; correct",
    ),
    "a part of bitsandbytes, dropped": (
        "float", {"change": with_state}, AnomalyError, r"SCB; config.json has no quantization_config",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNDECLARED)
def test_codes_are_never_loaded_as_if_they_were_weights(quantized, tmp_path, case):
    form, edit, kind, text = UNDECLARED[case]
    with pytest.raises(kind, match=text) as raised:
        load(edited(quantized[form], tmp_path / "undeclared", **edit))
    assert "allow_unexpected" not in str(raised.value)


def test_what_may_be_dropped_does_not_make_codes_weights(llama, tmp_path):
    folder = edited(llama, tmp_path / "modelopt", as_codes)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(InfraError, match="can't be loaded: transformers has no loader for modelopt"):
        load(folder, allow_unexpected="scale")


def test_scales_under_a_name_that_the_loader_does_not_know_are_not_the_checkpoint_s_fault(llama, tmp_path):
    def to_fp8(weights):
        for name in [name for name in weights if name.endswith("_proj.weight")]:
            weights[name] = weights[name].to(torch.float8_e4m3fn)
            weights[name.replace(".weight", ".weight_scale")] = torch.ones(())

    folder = edited(llama, tmp_path / "fp8", to_fp8, config=declaring(quant_method="fp8"))
    with pytest.raises(InfraError, match="mean nothing without them: compare the installed libraries") as raised:
        load(folder)
    assert "allow_unexpected" not in str(raised.value)
    info = {"missing_keys": {f"{DOWN}.weight_scale_inv"}}  # as where a GPU runs its kernels
    with pytest.raises(
        InfraError, match=f"wants {DOWN}.weight_scale_inv: the installed libraries can't load the format"
    ):
        check_complete(Model(path=str(folder)), str(folder), "LlamaForCausalLM", info)


@pytest.mark.parametrize("key", ["mtp.fc.weight", "model.layers.4.eh_proj.weight"])
def test_a_head_of_several_tokens_that_is_promised_stops_no_load(llama, tmp_path, key):
    for name, count in (("promised", 1), ("not", 0)):
        edited(llama, tmp_path / name, config=lambda config, count=count: config.update(num_nextn_predict_layers=count))

    def check(name):
        folder = str(tmp_path / name)
        check_complete(Model(path=folder), folder, "LlamaForCausalLM", {"unexpected_keys": {key}})

    check("promised")
    with pytest.raises(AnomalyError, match=f"holds 1 tensor that .* has no place for, and that loading drops: {key}"):
        check("not")


def test_what_a_wrong_configuration_makes_a_loader_drop_is_told_by_the_configuration(llama, int8_llama, tmp_path):
    fewer = edited(llama, tmp_path / "fewer", config=lambda config: config.update(num_hidden_layers=3))
    with pytest.raises(AnomalyError, match=r"config\.json counts 3 blocks by num_hidden_layers: correct it"):
        load(fewer)
    undeclared = edited(int8_llama, tmp_path / "none", config=lambda config: config.pop("quantization_config"))
    with pytest.raises(AnomalyError, match="has no quantization_config, so that codes are taken for weights"):
        load(undeclared)


def name_own_code(folder):
    """Make a checkpoint whose classes are code of its own that leaves a file behind where it runs."""
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "architectures": ["Own"]}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")


@pytest.mark.parametrize("way", ["load_model", "outline", "layer_names"])
def test_a_checkpoint_s_own_code_is_neither_run_nor_offered_on_the_terminal(llama, tmp_path, monkeypatch, way):
    folder = edited(llama, tmp_path / "own")
    name_own_code(folder)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    spec, memory = Model(path=str(folder)), Memory(device="cpu")
    ways = {
        "load_model": lambda: load_model(spec, str(folder), memory, allow_code=False),
        "outline": lambda: outline(spec, str(folder)),
        "layer_names": lambda: layer_names(spec, str(folder), memory, allow_code=False),
    }
    with pytest.raises(InfraError, match=r"own has code of its own: set model\.trust_remote_code .* --qsa-allow-code"):
        ways[way]()
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("who", ["suite", "checkpoint"])
def test_a_kernel_of_the_hub_is_not_fetched_unless_code_is_allowed(llama, tmp_path, who):
    folder, named = edited(llama, tmp_path / "kernel"), "someone/attention"
    if who == "checkpoint":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": named}))
        assert outline(Model(path=str(folder)), str(folder))
    keys = {"attn_implementation": named} if who == "suite" else {}
    with pytest.raises(
        InfraError, match=r"attn_implementation.* 'someone/attention' is code .*: allow it with --qsa-a"
    ):
        load(folder, **keys)


@pytest.mark.parametrize(("proxies", "asked"), [({}, True), ({"https": "http://proxy"}, False)])
def test_a_hub_id_is_not_tried_for_minutes_where_the_hub_has_no_address(tmp_path, monkeypatch, proxies, asked):
    def nowhere(host, port):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "getproxies", lambda: proxies)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints/my-model").mkdir(parents=True)
    models.check_path("checkpoints/my-model")
    with pytest.raises(InfraError, match=r"did you mean 'my-model'.*has no address here") if asked else nullcontext():
        models.check_path("checkpoints/my-modle")
