"""Settings against the reference's: what one side leaves out, stop tokens, tokenizers and processors."""

from __future__ import annotations

import json
from functools import partial

import pytest
from tokenizers import Tokenizer
from transformers import GraniteConfig, MistralConfig

from pytest_qsa.checkpoint.checks.changed_settings import Resolved
from pytest_qsa.checkpoint.checks.health import Files, problems_of
from pytest_qsa.checkpoint.folder import open_folder
from pytest_qsa.common import AnomalyError
from pytest_qsa.engine.load.settings import resolved
from pytest_qsa.suite.resolved_settings import resolve_settings
from pytest_qsa.verdicts.budgets import budget_of
from pytest_qsa.verdicts.judge import judge_problems
from support.checkpoints import edit_json, edited

INT4 = "int4"


def by_class(folders):
    """Resolve as the program does, in this process."""
    answers = [resolved(dict(folder.config)) for folder in folders]
    return [Resolved(answer["name"], answer["settings"]) if answer else None for answer in answers]


def findings(folder, reference, resolve=by_class):
    return problems_of(Files(open_folder(folder), open_folder(reference), resolve), "checkpoint_settings")[1]


def problems(folder, reference, **options):
    return {each.tensor: each.what for each in findings(folder, reference, **options) if not each.note}


def notes(folder, reference, **options):
    return {each.tensor: each.what for each in findings(folder, reference, **options) if each.note}


def file_edited(source, folder, name, change):
    copy = edited(source, folder)
    content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
    change(content)
    (copy / name).write_text(json.dumps(content))
    return copy


def test_a_key_that_was_not_written_counts_as_its_class_fills_it_in(llama, tmp_path):
    other = edited(llama, tmp_path / "reference", config=lambda c: c.update(rms_norm_eps=1e-5))
    lost = edited(llama, tmp_path / "lost", config=lambda c: c.pop("rms_norm_eps"))
    assert problems(lost, other) == {"rms_norm_eps": "not set, so that LlamaConfig takes 1e-06; in the reference 1e-05"}
    # 1e-6 is the class's own value, so that nothing is lost where the reference states that
    same = edited(llama, tmp_path / "same", config=lambda c: c.update(rms_norm_eps=1e-6))
    assert findings(lost, same) == []


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "rms_norm_eps", 0.5),
        ("generation_config.json", "eos_token_id", 7),
        (
            "tokenizer.json",
            "truncation",
            {"max_length": 64, "direction": "Right", "strategy": "LongestFirst", "stride": 0},
        ),
    ],
)
def test_the_first_line_names_the_file_of_a_setting(llama, tmp_path, file, key, value):
    other = file_edited(llama, tmp_path / "other", file, lambda content: content.update({key: value}))
    files = Files(open_folder(other), open_folder(llama), by_class)
    series, found = problems_of(files, "checkpoint_settings")
    said = judge_problems(series, found, budget_of({"max": 0}, series.layers, None), files)
    assert said.headline.startswith(f"{file}: {key}: ")


@pytest.mark.parametrize(
    ("kind", "key", "value", "default"),
    [
        (GraniteConfig, "residual_multiplier", 0.22, "1.0"),
        (GraniteConfig, "logits_scaling", 8.0, "1.0"),
        (GraniteConfig, "attention_multiplier", 0.0156, "1.0"),
        (MistralConfig, "sliding_window", 128, "4096"),
        (MistralConfig, "tie_word_embeddings", True, "False"),
        (MistralConfig, "max_position_embeddings", 512, "131072"),
    ],
)
def test_settings_of_other_classes_are_compared_by_their_own_defaults(llama, tmp_path, kind, key, value, default):
    settings = kind(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, **{key: value}).to_dict()
    reference = edited(llama, tmp_path / "reference", config=lambda c: (c.clear(), c.update(settings)))
    lost = edited(reference, tmp_path / "lost", config=lambda c: c.pop(key))
    assert problems(lost, reference) == {
        key: f"not set, so that {kind.__name__} takes {default}; in the reference {value}"
    }


def test_a_key_of_no_installed_class_is_a_note_unless_it_acts_wherever_it_is_known(llama, tmp_path):
    def unknown(config):
        config.update(model_type="house-model", house_setting=3, routed_scaling_factor=2.5)

    reference = edited(llama, tmp_path / "reference", config=unknown)
    lost = edited(
        reference, tmp_path / "lost", config=lambda c: (c.pop("house_setting"), c.pop("routed_scaling_factor"))
    )
    assert problems(lost, reference) == {"routed_scaling_factor": "not set, in the reference 2.5"}
    assert notes(lost, reference) == {"house_setting": "not set, in the reference 3"}
    series, _ = problems_of(Files(open_folder(lost), open_folder(reference), by_class), "checkpoint_settings")
    assert dict(zip(series.layers, series.values, strict=True))["config.json"] == 1


def test_remote_code_is_not_asked_for_its_defaults(llama, tmp_path):
    code = tmp_path / "marker"

    def remote(config):
        config.update(model_type="own", auto_map={"AutoConfig": "configuration_own.Own"})
        config.pop("rms_norm_eps")

    folder = edited(llama, tmp_path / "remote", config=remote)
    (folder / "configuration_own.py").write_text(f"open({str(code)!r}, 'w')\n")
    assert resolve_settings([open_folder(folder)], None) == [None]
    assert not code.exists()


@pytest.mark.process
def test_the_class_is_asked_once_and_remembered_by_the_content_of_the_file(llama, tmp_path, monkeypatch):
    reference = edited(llama, tmp_path / "reference", config=lambda c: c.update(rms_norm_eps=1e-5))
    lost = edited(llama, tmp_path / "lost", config=lambda c: c.pop("rms_norm_eps"))
    resolve = partial(resolve_settings, cache=tmp_path / "cache")
    assert list(problems(lost, reference, resolve=resolve)) == ["rms_norm_eps"]
    monkeypatch.setattr("pytest_qsa.suite.resolved_settings._ask", lambda files: pytest.fail("asked again"))
    assert list(problems(lost, reference, resolve=resolve)) == ["rms_norm_eps"]
    settings = json.loads((lost / "config.json").read_text()) | {"hidden_act": "gelu"}
    (lost / "config.json").write_text(json.dumps(settings))
    with pytest.raises(pytest.fail.Exception, match="asked again"):
        problems(lost, reference, resolve=resolve)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "preprocessor_config.json"])
def test_no_other_json_of_this_machine_is_quoted(llama, tmp_path, name):
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"auths": {"ghcr.io": {"auth": "aHVudGVyMg=="}}}), encoding="utf-8")
    folder = edited(llama, tmp_path / "linked")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(AnomalyError, match=rf"{name} is no {name} of transformers, for it has n.*") as caught:
        findings(folder, llama)
    assert "aHVu" not in str(caught.value)


def test_a_stop_token_that_was_lost_or_is_stale_is_named_with_its_text(llama, tmp_path):
    name = "generation_config.json"
    reference = file_edited(llama, tmp_path / "reference", name, lambda g: g.update(eos_token_id=[1, 2]))
    texts = {
        number: repr(text) for text, number in Tokenizer.from_file(str(llama / "tokenizer.json")).get_vocab().items()
    }
    both = f"1 {texts[1]}, 2 {texts[2]}"
    said = {1: f"1 {texts[1]}", (2, 1, 3): f"{both}, 3 {texts[3]}", None: "no token"}
    for index, (stops, text) in enumerate(said.items()):
        ids = list(stops) if isinstance(stops, tuple) else stops
        folder = file_edited(reference, tmp_path / str(index), name, lambda g, ids=ids: g.update(eos_token_id=ids))
        assert problems(folder, reference) == {"eos_token_id": f"stops at {text}, the reference at {both}"}
    same = file_edited(reference, tmp_path / "same", name, lambda g: g.update(eos_token_id=[2, 1], temperature=0.6))
    assert problems(same, reference) == {}
    assert notes(same, reference) == {"temperature": "0.6, in the reference not set"}
    (same / name).unlink()
    assert problems(same, reference) == {name: "there is none, the reference has one"}


def tokenizer_edited(llama, folder, change):
    return file_edited(llama, folder, "tokenizer.json", change)


def test_a_truncation_or_padding_that_calibration_left_is_a_problem(llama, tmp_path):
    cut = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 512}, "direction": "Right", "pad_id": 2, "pad_type_id": 0, "pad_token": "</s>"}
    folder = tokenizer_edited(llama, tmp_path / "left", lambda t: t.update(truncation=cut, padding=fill))
    assert problems(folder, llama) == {
        "truncation": "cuts every prompt to 64 tokens, in the reference not set",
        "padding": "fills up every prompt to 512 tokens, in the reference not set",
    }
    assert problems(folder, folder) == {}


@pytest.mark.parametrize("key", ["ignore_merges", "byte_fallback", "fuse_unk"])
def test_a_switch_of_the_algorithm_that_changes_tokens_is_a_problem(llama, tmp_path, key):
    folder = tokenizer_edited(llama, tmp_path / "switched", lambda t: t["model"].update({key: not t["model"].get(key)}))
    assert list(problems(folder, llama)) == [key]


def test_a_dropout_of_merges_is_a_note(llama, tmp_path):
    folder = tokenizer_edited(llama, tmp_path / "dropout", lambda t: t["model"].update(dropout=0.1))
    assert (list(problems(folder, llama)), list(notes(folder, llama))) == ([], ["dropout"])


def test_the_same_tokenizer_in_another_spelling_is_no_finding(llama, tmp_path):
    def older(tokenizer):
        merges = tokenizer["model"]["merges"]
        tokenizer["model"]["merges"] = [" ".join(m) if isinstance(m, list) else m.split(" ") for m in merges]
        for key in ("ignore_merges", "byte_fallback", "dropout"):
            tokenizer["model"].pop(key, None)

    folder = tokenizer_edited(llama, tmp_path / "older", older)
    assert findings(folder, llama) == []


def test_special_tokens_in_the_file_of_transformers_4_are_the_same(llama, tmp_path):
    folder = file_edited(llama, tmp_path / "older", "tokenizer_config.json", lambda t: t.clear())
    kept = json.loads((llama / "tokenizer_config.json").read_text())
    special = {key: {"content": kept[key], "lstrip": False} for key in kept if key.endswith("_token") and kept[key]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    assert problems(folder, llama) == {}


def test_what_a_step_does_otherwise_is_shown_by_a_text(llama, tmp_path):
    splits = {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False}
    folder = tokenizer_edited(llama, tmp_path / "split", lambda t: t.update(pre_tokenizer=splits))
    (what,) = problems(folder, llama).values()
    text = what.partition(" becomes ")[0].rpartition("; ")[2].strip("'")
    ours, theirs = (Tokenizer.from_file(str(side / "tokenizer.json")).encode(text).ids for side in (folder, llama))
    assert ours != theirs


def test_the_flags_of_a_special_token_are_compared(llama, tmp_path):
    folder = tokenizer_edited(llama, tmp_path / "flags", lambda t: t["added_tokens"][0].update(special=False))
    (what,) = problems(folder, llama).values()
    assert "special: false, in the reference true" in what


@pytest.mark.parametrize(
    ("key", "value", "other", "problem"),
    [
        ("eos_token_id", [7, 2], [2, 7], None),
        ("eos_token_id", [2], 2, None),
        ("eos_token_id", [2], [2, 7], True),
        ("pad_token_id", 3, None, False),
        ("attention_dropout", 0.1, 0.0, False),
    ],
)
def test_stop_tokens_in_another_order_are_the_same_and_what_acts_in_training_is_a_note(
    llama, tmp_path, key, value, other, problem
):
    folders = [
        edited(llama, tmp_path / name, config=lambda c, value=value: c.update({key: value}))
        for name, value in (("own", value), ("reference", other))
    ]
    assert (key in problems(*folders), key in notes(*folders)) == (problem is True, problem is False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("padding_side", "left"), ("truncation_side", "left"), ("model_max_length", 77), ("pad_token", "a")),
        ("do_lower_case", True),
    ],
)
def test_what_each_call_may_set_otherwise_is_a_note(llama, tmp_path, key, value):
    folder = file_edited(llama, tmp_path / "noted", "tokenizer_config.json", lambda t: t.update({key: value}))
    assert problems(folder, llama) == {}
    assert key in notes(folder, llama)


def test_how_pictures_are_prepared_is_compared_whichever_file_states_it(llama, tmp_path):
    prepared = {"image_mean": [0.5, 0.5, 0.5], "size": {"height": 224, "width": 224}, "image_processor_type": "A"}
    reference = file_edited(llama, tmp_path / "reference", "preprocessor_config.json", lambda p: p.update(prepared))
    newer = prepared | {"image_processor_type": "AFast"}
    moved = file_edited(llama, tmp_path / "moved", "processor_config.json", lambda p: p.update(image_processor=newer))
    assert findings(moved, reference) == []
    newer["image_mean"] = [0.4, 0.5, 0.5]
    other = file_edited(llama, tmp_path / "other", "processor_config.json", lambda p: p.update(image_processor=newer))
    assert problems(other, reference) == {"image_mean": "[0.4, 0.5, 0.5], in the reference [0.5, 0.5, 0.5]"}
    assert problems(llama, reference) == {"preprocessor_config.json": "there is none, the reference has one"}


def test_tensors_of_another_size_than_the_declared_scheme_gives_are_a_note(quantized, llama, tmp_path):
    assert notes(quantized["int8"], llama) == {}

    def doubled(weights):
        weights["model.extra.weight"] = weights["model.embed_tokens.weight"].clone()

    folder = edited(quantized["int8"], tmp_path / "larger", doubled)
    (what,) = notes(folder, llama).values()
    assert what.startswith("the tensors take ")
    assert "the declared scheme of the reference's shapes" in what


def tied(llama, folder):
    """Save the Llama with its head tied to the embeddings."""
    return edited(llama, folder, lambda w: w.pop("lm_head.weight"), config=lambda c: c.update(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("head", "problem"),
    [
        (lambda table: table.clone(), False),
        (lambda table: (table * 40).round() / 40, False),
        (lambda table: table.flip(1) + 1, True),
    ],
    ids=["the same", "rounded", "another"],
)
def test_a_tie_that_was_cut_is_a_fault_only_with_another_head(llama, tmp_path, head, problem):
    reference = tied(llama, tmp_path / "reference")

    def untie(weights):
        weights["lm_head.weight"] = head(weights["model.embed_tokens.weight"])

    own = edited(reference, tmp_path / "own", untie, config=lambda c: c.update(tie_word_embeddings=False))
    end = "lm_head is unlike the reference's embeddings" if problem else "lm_head holds the reference's embeddings"
    found = {"tie_word_embeddings": f"False, in the reference True; {end}"}
    assert problems(own, reference) == (found if problem else {})
    assert notes(own, reference) == ({} if problem else found)


@pytest.mark.parametrize(("mine", "theirs", "noted"), [("float16", "bfloat16", True), ("bfloat16", "float16", False)])
def test_a_dtype_of_a_smaller_range_is_noted(llama, tmp_path, mine, theirs, noted):
    one, other = (
        edited(llama, tmp_path / name, config=lambda c, name=name: c.update(dtype=name)) for name in (mine, theirs)
    )
    what = {"dtype": f"{mine}, in the reference {theirs}: what is above 65504 becomes Inf"}
    assert notes(one, other) == (what if noted else {})
    assert problems(one, other) == {}


def test_a_chat_template_is_compared_as_transformers_takes_it(llama, tmp_path):
    text = "{% for message in messages %}\n{{ message.content }}\n{% endfor %}"

    def own(name, template, stated=None):
        folder = edited(llama, tmp_path / name)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        if stated is not None:
            edit_json(folder / "tokenizer_config.json", lambda content: content.update(chat_template=stated))
        return folder

    original = own("original", text)
    listed = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": text}]
    assert findings(own("older", None, listed), original) == []
    changed = problems(own("changed", text.replace("message.content", "message.text")), original)
    assert changed == {"chat_template": "differs from the reference's, from line 2, character 12 on"}
    (what,) = notes(own("two", text, "{{ messages[0].content }}"), original).values()
    assert what.startswith("tokenizer_config.json has another one, which transformers leaves out")
