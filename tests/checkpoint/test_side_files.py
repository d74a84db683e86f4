"""Files of settings beside the weights: a value that is not what its key stands for is told with file and key."""

from __future__ import annotations

import base64
import json
import shutil

import pytest

from pytest_qsa.checkpoint import Files, check_side_files, open_folder, problems_of, readable_tokenizer
from pytest_qsa.checkpoint.side_files import growth_of
from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.load.tokenizer import load_tokenizer

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
MARKED = "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}"
STRAY = "{% for message in messages %}{% tool %}{% endfor %}"
GENERATION, TOKENIZER, TEMPLATE = "generation_config.json", "tokenizer_config.json", "chat_template.jinja"


@pytest.fixture(scope="module")
def settings(llama, tmp_path_factory):
    """Return a folder with the small Llama's files beside its weights."""
    folder = tmp_path_factory.mktemp("settings")
    for file in llama.glob("*.json"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def written(settings, tmp_path):
    """Return a function that copies these files, edits one of them, and opens the folder."""

    def write(file, change):
        folder = shutil.copytree(settings, tmp_path / "other")
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        if isinstance(change, dict):
            content = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(content | change))
        else:
            path.write_bytes(change if isinstance(change, bytes) else change.encode())
        return open_folder(folder)

    return write


ODD = [
    (GENERATION, {"temperature": "hot"}, "temperature is 'hot', and not a number"),
    (GENERATION, {"temperature": float("nan")}, "is no JSON: it holds NaN"),
    (GENERATION, {"top_p": 1.5}, "top_p is 1.5, and not a number from 0 to 1"),
    (GENERATION, {"top_k": "50"}, "top_k is '50'"),
    (GENERATION, {"do_sample": "yes"}, "do_sample is 'yes', and not true or false"),
    (GENERATION, {"max_new_tokens": 1.5}, r"max_new_tokens is 1\.5"),
    (GENERATION, {"eos_token_id": "</s>"}, "eos_token_id is '</s>', and not the id of a token"),
    (GENERATION, {"eos_token_id": [[2]]}, r"eos_token_id is \[\[2\]\]"),
    (GENERATION, {"eos_token_id": True}, "eos_token_id is True"),
    (GENERATION, {"eos_token_id": [400, 500]}, "the vocabulary has 320 tokens: generation never ends"),
    (GENERATION, {"pad_token_id": {}}, "pad_token_id is {}"),
    (GENERATION, {"stop_strings": 3}, "stop_strings is 3"),
    (GENERATION, "{,", "is no JSON: .*; copy or download it again"),
    (GENERATION, "", "is empty"),
    (GENERATION, b"{\xff\xfe", "is no JSON: 'utf-8' codec"),
    (GENERATION, b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    (GENERATION, "{}".encode("utf-16"), "begins with a byte order mark"),
    (GENERATION, "\n<!doctype html><title>Sign in</title>", "is a web page"),
    (TOKENIZER, {"chat_template": 3}, "chat_template is 3, and not a template"),
    (TOKENIZER, {"chat_template": [PLAIN]}, r"chat_template is \[.*, and not a template, or a list of templates"),
    (
        TOKENIZER,
        {"chat_template": [{"name": "default", "template": PLAIN[:40]}]},
        "chat_template can't be parsed, line 1",
    ),
    (TOKENIZER, {"model_max_length": "long"}, "model_max_length is 'long'"),
    (TOKENIZER, {"padding_side": "middle"}, "padding_side is 'middle', and not left or right"),
    (TOKENIZER, {"bos_token": 3}, "bos_token is 3"),
    (TOKENIZER, {"add_bos_token": "maybe"}, "add_bos_token is 'maybe'"),
    (TOKENIZER, {"added_tokens_decoder": {"x": {"content": "a"}}}, "and not a section of tokens by id"),
    (TEMPLATE, PLAIN[:-12], r"jinja can't be parsed, line 1: Unexpected end of template"),
    (TEMPLATE, b"\xff\xfe\x00", "jinja is no text"),
    (TEMPLATE, "{% if " + "(" * 3000, "is nested too deeply to be parsed"),
    ("additional_chat_templates/tools.jinja", "{% if %}", r"tools\.jinja can't be parsed"),
    ("chat_template.json", {"chat_template": 3}, "chat_template is 3"),
    ("special_tokens_map.json", "[]", "is no JSON object but a list"),
    ("added_tokens.json", {"<a>": "b"}, "<a> is 'b', and not the id of a token"),
    ("tokenizer.json", {"added_tokens": [{"content": "a"}]}, "and not a list of tokens"),
    ("tokenizer.json", {"truncation": 3}, "truncation is 3, and not a section"),
    ("preprocessor_config.json", {"do_resize": 1}, "do_resize is 1, and not true or false"),
    ("preprocessor_config.json", {"image_mean": "x"}, "image_mean is 'x'"),
    ("processor_config.json", "nope", "is no JSON"),
    ("config.json", {"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', and not a list"),
    ("config.json", {"rms_norm_eps": -1.0}, r"rms_norm_eps is -1\.0"),
    ("config.json", {"dtype": "bfloat61"}, "dtype is 'bfloat61', and not the name of one of torch's"),
    (
        "config.json",
        {"rope_parameters": {"rope_theta": 0}},
        r"rope_parameters\.rope_theta is 0, and not a number above 0",
    ),
    ("config.json", {"quantization_config": []}, r"quantization_config is \[\], and not a section"),
    (
        "config.json",
        {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 0}}}}},
        r"group_0\.weights\.num_bits is 0",
    ),
]


@pytest.mark.parametrize(("file", "change", "text"), ODD)
def test_a_setting_that_is_not_what_its_key_stands_for_is_told_with_its_file(written, file, change, text):
    with pytest.raises(AnomalyError, match=text) as raised:
        check_side_files(written(file, change))
    assert file in str(raised.value)
    assert "\n" not in str(raised.value)


SOUND = [
    (GENERATION, {"temperature": 0, "top_p": 1, "top_k": -1, "eos_token_id": [2, 400], "pad_token_id": -1}),
    (GENERATION, {"do_sample": None, "max_length": 20, "some_newer_key": object.__name__}),
    (TOKENIZER, {"chat_template": PLAIN, "model_max_length": 1e30, "bos_token": {"content": "<s>"}}),
    (TOKENIZER, {"chat_template": [{"name": "default", "template": MARKED}]}),
    (TEMPLATE, MARKED),
    (TEMPLATE, STRAY),
    ("config.json", {"torch_dtype": "float16", "quantization_config": {"weight": {"dtype": "fp8_e4m3"}}}),
    ("config.json", {"time_step_limit": [0.0, float("inf")], "rope_theta": [5e6, 1e4]}),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "do_resize": True, "size": {"height": 4}}),
]


@pytest.mark.parametrize(("file", "change"), SOUND)
def test_settings_as_libraries_write_them_are_sound(written, file, change):
    check_side_files(written(file, change))


def test_the_settings_of_no_model_of_the_installed_transformers_are_odd(tmp_path):
    from transformers import GenerationConfig, LlamaConfig, LxmertConfig, Mamba2Config, Qwen2VLConfig, WhisperConfig

    GenerationConfig().save_pretrained(tmp_path)
    for kind in (LlamaConfig, LxmertConfig, Mamba2Config, Qwen2VLConfig, WhisperConfig):
        kind().save_pretrained(tmp_path)
        check_side_files(open_folder(tmp_path))


def test_a_template_that_is_a_pointer_is_not_the_checkpoint_s_fault(written):
    with pytest.raises(InfraError, match="jinja is a git-lfs pointer"):
        check_side_files(written(TEMPLATE, "version https://git-lfs.github.com/spec/v1\n"))


@pytest.mark.parametrize("referenced", [False, True])
def test_files_are_told_without_a_load_whether_or_not_there_is_a_reference(llama, tmp_path, referenced):
    folder = shutil.copytree(llama, tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["zz", "qq"]]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    files = Files(open_folder(folder), open_folder(llama) if referenced else None)
    with pytest.raises(AnomalyError, match=r"no tokenizer can be made of .*tokenizer\.json: Token `zz`"):
        problems_of(files, "checkpoint_health")


def test_an_index_names_only_files_of_its_own_folder(written):
    folder = written("model.safetensors.index.json", {"metadata": {}, "weight_map": {"x.weight": "/etc/hostname"}})
    with pytest.raises(AnomalyError, match=r"index\.json doesn't name the file of each tensor"):
        _ = folder.indexed


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("recipe.yaml", "default_stage: {default_modifiers: {GPTQModifier: {scheme: W4A16}}}", "recipe.yaml"),
        ("recipe.yaml", "default_stage: {default_modifiers: {QuantizationModifier: {scheme: W4A16}}}", ""),
        ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "quant_method in config.json"),
    ],
)
def test_a_checkpoint_by_gptq_is_known_by_its_recipe_or_its_method(written, file, change, said):
    assert written(file, change).by_gptq == said


TEN = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
STAR = {"SpecialToken": {"id": "*", "type_id": 0}}
ADDS = {
    "type": "TemplateProcessing",
    "single": [STAR, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
}


def charsmap(longest):
    return base64.b64encode((4).to_bytes(4, "little") + bytes(4) + b"a\0" + b"b" * longest + b"\0").decode()


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
GROWING = {
    "normalizer": {"type": "Sequence", "normalizers": [TEN] * 8},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES] * 30},
    "decoder": {"type": "Sequence", "decoders": [TEN] * 8},
    "post_processor": ADDS | {"special_tokens": {"*": {"id": "*", "ids": [0] * 2000, "tokens": ["a"] * 2000}}},
}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
USUAL = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]},
    "post_processor": ADDS | {"special_tokens": {"*": {"id": "*", "ids": [0], "tokens": ["a"]}}},
}


@pytest.mark.parametrize("part", GROWING)
def test_a_tokenizer_that_makes_texts_endless_is_refused_before_it_has_one(written, part):
    folder = written("tokenizer.json", {part: GROWING[part]})
    for read in (readable_tokenizer, lambda folder: load_tokenizer(str(folder.path), {})):
        with pytest.raises(AnomalyError, match=f"its {part} (makes a text up to|adds 2,000 tokens)"):
            read(folder)


def test_the_usual_steps_of_a_tokenizer_are_no_growth(written):
    assert readable_tokenizer(written("tokenizer.json", USUAL)) is not None


@pytest.mark.parametrize("longest", [50, 5000])
def test_a_table_of_replacements_grows_by_its_longest(longest):
    step = {"type": "Precompiled", "precompiled_charsmap": charsmap(longest)}
    assert growth_of(step) == longest
