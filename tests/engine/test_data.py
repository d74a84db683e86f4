"""Calibration data: packed windows, their special tokens, the seed, and files of one's own."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from pytest_qsa.common.errors import AnomalyError, InfraError
from pytest_qsa.engine.load.data import (
    batches_of,
    check_local,
    document_windows,
    read_texts,
    stream_windows,
    windows_of,
)
from pytest_qsa.suite import Data

BOS, EOS, UNKNOWN = 0, 1, 2
WORDS = {f"w{index}": index + 3 for index in range(100)}


def tokenizer(template="$A"):
    model = WordLevel({"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN, **WORDS}, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if template != "$A":
        inner.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def words(count, start=0):
    return " ".join(f"w{index % 100}" for index in range(start, start + count))


def ids(count, start=0):
    return [index % 100 + 3 for index in range(start, start + count)]


def data(source="custom:a.txt", **settings):
    return Data(source=source, **{"num_samples": 2, "seq_len": 5, **settings})


# Windows.


def test_texts_are_packed_one_after_the_other_without_padding():
    windows = windows_of([words(7), words(3, start=7)], data(), tokenizer())
    assert windows.tolist() == [ids(5), ids(5, start=5)]
    assert windows.dtype == torch.int64


@pytest.mark.parametrize(
    ("template", "before", "after"),
    [
        ("<s> $A", [BOS], []),
        ("$A </s>", [], [EOS]),
        ("<s> $A </s>", [BOS], [EOS]),
        ("<s> <s> $A", [BOS, BOS], []),
        ("$A", [], []),
    ],
)
def test_each_window_has_the_special_tokens_of_its_own(template, before, after):
    inner = 6 - len(before) - len(after)
    windows = windows_of([words(2 * inner)], data(seq_len=6), tokenizer(template))
    assert windows.tolist() == [[*before, *ids(inner, start), *after] for start in (0, inner)]


def test_special_tokens_can_be_left_out():
    windows = windows_of([words(10)], data(add_special_tokens=False), tokenizer("<s> $A </s>"))
    assert windows.tolist() == [ids(5), ids(5, start=5)]


def test_a_special_token_inside_the_text_is_kept():
    windows = windows_of(["w1 </s> w2 w3 w4"], data(num_samples=1), tokenizer())
    assert windows.tolist() == [[4, EOS, 5, 6, 7]]


def test_the_seed_chooses_the_windows_and_nothing_else_does():
    text, tok = [words(400)], tokenizer("<s> $A")
    settings = {"num_samples": 6, "seq_len": 5}
    first, again, other = (windows_of(text, data(seed=seed, **settings), tok) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.manual_seed(99)
    assert torch.equal(first, windows_of(text, data(seed=3, **settings), tok))


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_windows_are_different_ones_in_the_order_of_the_text(seed):
    windows = windows_of([words(100)], data(num_samples=8, seed=seed), tokenizer())
    starts = [row[0] - 3 for row in windows.tolist()]
    assert starts == sorted(set(starts))
    assert all(row == ids(5, start) for row, start in zip(windows.tolist(), starts, strict=True))


def test_all_windows_are_taken_where_there_are_just_enough():
    assert windows_of([words(14)], data(), tokenizer()).tolist() == [ids(5), ids(5, start=5)]


def test_too_little_text_says_how_much_there_was():
    with pytest.raises(
        InfraError, match=r"too little text in 'custom:a\.txt': 14 tokens make 2 windows of 5.*num_samples asks for 3"
    ):
        windows_of([words(14)], data(num_samples=3), tokenizer())
    with pytest.raises(InfraError, match="0 tokens make 0 windows"):
        windows_of([], data(), tokenizer())


@pytest.mark.parametrize("seed", range(3))
def test_windows_with_a_stride_overlap_and_follow_one_another(seed):
    windows = windows_of([words(60)], data(num_samples=6, seq_len=6, stride=2, seed=seed), tokenizer("<s> $A"))
    first = windows[0, 1].item() - 3
    assert windows.tolist() == [[BOS, *ids(5, first + 2 * at)] for at in range(6)]
    assert windows_of([words(13)], data(num_samples=5, stride=2), tokenizer()).tolist()[-1] == ids(5, start=8)
    with pytest.raises(InfraError, match=r"13 tokens make 5 windows of 5 that begin 2 apart"):
        windows_of([words(13)], data(num_samples=6, stride=2), tokenizer())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stride": 5}, "windows of 5 tokens overlap only where stride is less"),
        ({"stride": 2, "answers": {}}, "answers are samples of their own"),
        ({"stride": 0}, "greater than 0"),
    ],
)
def test_a_stride_that_means_nothing_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        data(**settings)


def test_a_stride_of_a_set_whose_windows_lie_at_random_is_refused(tmp_path):
    with pytest.raises(InfraError, match=r"data\.stride: windows of 'wikitext2' are drawn at random places"):
        check_local(data("wikitext2", stride=2), tmp_path)


def test_a_window_without_room_for_text_is_an_error():
    with pytest.raises(InfraError, match="seq_len 2 leaves no room beside 2 special tokens"):
        windows_of([words(9)], data(seq_len=2), tokenizer("<s> $A </s>"))


# Batches.


def test_batches_have_their_size_and_the_last_one_the_rest(tmp_path):
    (tmp_path / "a.txt").write_text(words(25))
    batches = batches_of(data(num_samples=5, batch_size=2), tokenizer(), tmp_path)
    assert [batch.keys() for batch in batches] == [{"input_ids"}] * 3
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 5), (2, 5), (1, 5)]
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == ids(25)


@pytest.mark.parametrize(("start", "first"), [(7, 7), (None, 0), (0, 0)])
def test_a_model_with_a_decoder_gets_the_tokens_shifted_behind_its_start(tmp_path, start, first):
    (tmp_path / "a.txt").write_text(words(10))
    config = SimpleNamespace(is_encoder_decoder=True, decoder_start_token_id=start)
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, config)
    assert batch["input_ids"].tolist() == [ids(5), ids(5, start=5)]
    assert batch["decoder_input_ids"].tolist() == [[first, *ids(4)], [first, *ids(4, start=5)]]


def test_a_model_without_a_decoder_gets_no_shifted_tokens(tmp_path):
    (tmp_path / "a.txt").write_text(words(10))
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, SimpleNamespace(is_encoder_decoder=False))
    assert batch.keys() == {"input_ids"}


def test_the_batches_of_a_decoder_run_in_a_real_model(tmp_path):
    from support import models

    (tmp_path / "a.txt").write_text(words(10) + " w1" * 20)
    model = models.t5()
    (batch,) = batches_of(data(batch_size=2), tokenizer(), tmp_path, model.config)
    batch = {key: value.clamp(max=models.VOCABULARY - 1) for key, value in batch.items()}
    from pytest_qsa import capture

    cap = capture(model, [batch], sites=[(r"decoder\.block\.1$", "output")])
    assert cap.sites["decoder.block.1", "output"].sample.tolist() == [0, 1]


# Sources.


def test_the_sample_that_comes_with_the_package_is_long_enough_for_the_defaults(tmp_path):
    (text,) = read_texts(Data(source="sample"), tmp_path)
    assert len(text.split()) > Data().num_samples * 512


@pytest.mark.parametrize("source", ["wikitext", "custom:", "custom", "hf:", "http://x"])
def test_an_unknown_source_says_what_there_is(tmp_path, source):
    with pytest.raises(InfraError, match=r"unknown data source.*sample.*custom:PATH"):
        read_texts(Data(source=source), tmp_path)


def write(folder, name, content):
    (folder / name).write_bytes(content.encode("utf-8"))
    return Data(source=f"custom:{name}")


RECORDS = ["one two", "three, four", "five\n\nsix", 'q "quoted"', "line\u2028separator\x85next\x0b", "né 你"]


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.unknown"])
def test_a_text_file_is_one_text(tmp_path, name):
    settings = write(tmp_path, name, "\n".join(RECORDS))
    assert read_texts(settings, tmp_path) == ["\n".join(RECORDS)]


@pytest.mark.parametrize("escape", [True, False])
@pytest.mark.parametrize("column", ["text", "body"])
def test_json_and_jsonl_give_a_text_a_record(tmp_path, column, escape):
    records = [{column: text, "id": index} for index, text in enumerate(RECORDS)]
    custom = {"text_column": column}
    lines = "\n".join(json.dumps(record, ensure_ascii=escape) for record in records) + "\n\n"
    for name, content in (("a.json", json.dumps(records, ensure_ascii=escape)), ("a.jsonl", lines)):
        write(tmp_path, name, content)
        assert read_texts(Data(source=f"custom:{name}", custom=custom), tmp_path) == RECORDS


def test_json_may_hold_plain_strings_or_one_record(tmp_path):
    assert read_texts(write(tmp_path, "a.json", json.dumps(RECORDS)), tmp_path) == RECORDS
    assert read_texts(write(tmp_path, "b.json", '{"text": "x"}'), tmp_path) == ["x"]
    assert read_texts(write(tmp_path, "c.jsonl", '"x"\r\n"y"'), tmp_path) == ["x", "y"]


def test_csv_gives_a_text_a_row_whatever_the_text_holds(tmp_path):
    rows = [text.replace('"', '""') for text in RECORDS]
    content = "id,text\r\n" + "".join(f'{index},"{row}"\r\n' for index, row in enumerate(rows))
    assert read_texts(write(tmp_path, "a.csv", content), tmp_path) == RECORDS
    assert read_texts(write(tmp_path, "b.csv", "id,text\n1,a\u2028b\n"), tmp_path) == ["a\u2028b"]


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    assert read_texts(write(tmp_path, "a.csv", "\ufefftext,id\nx,1\n"), tmp_path) == ["x"]
    assert read_texts(write(tmp_path, "a.jsonl", '\ufeff{"text": "x"}'), tmp_path) == ["x"]


def test_the_format_can_be_named(tmp_path):
    settings = write(tmp_path, "a.data", '{"text": "x"}')
    assert read_texts(settings, tmp_path) == ['{"text": "x"}']
    assert read_texts(Data(source="custom:a.data", custom={"format": "jsonl"}), tmp_path) == ["x"]


@pytest.mark.parametrize(("name", "content"), [
    ("a.csv", "id,body\n1,x\n"), ("a.json", '[{"id": 1, "body": "x"}]'), ("a.jsonl", '{"id": 1, "body": "x"}'),
])  # fmt: skip
def test_a_missing_column_names_the_record_and_what_it_has(tmp_path, name, content):
    with pytest.raises(
        InfraError,
        match=rf"{name}: .*record 0 has no text under 'text'; it has id, body; set data\.custom\.text_column",
    ):
        read_texts(write(tmp_path, name, content), tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[" * 99999, "it is nested more than 200 deep"),
        ('["x", "\\ud800"]', "record 1 holds half of a surrogate pair"),
        ('{"text": null}', "record 0 has no text under 'text' but a NoneType"),
    ],
)
def test_json_that_is_no_text_is_one_line(tmp_path, content, said):
    with pytest.raises(InfraError, match=rf"a\.json: can't be read as data: {said}"):
        read_texts(write(tmp_path, "a.json", content), tmp_path)


def test_a_null_in_a_column_is_one_line(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["x", None]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InfraError, match="record 1 has no text under 'text' but a NoneType"):
        read_texts(Data(source="custom:a.parquet"), tmp_path)


@pytest.mark.parametrize("record", ['{"text": 3}', "[1]", "null", '{"text": ["role"]}'])
def test_a_record_whose_text_is_none_is_an_error(tmp_path, record):
    with pytest.raises(InfraError, match="record 1 has no text"):
        read_texts(write(tmp_path, "a.jsonl", '{"text": "x"}\n' + record), tmp_path)


@pytest.mark.parametrize(
    ("name", "content"), [("a.json", "{"), ("a.jsonl", '{"text": "x"}\n{'), ("a.txt", None), ("a.csv", None)]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, name, content):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00" if content is None else content.encode())
    with pytest.raises(InfraError, match=f"{name}: can't be read as data"):
        read_texts(Data(source=f"custom:{name}"), tmp_path)


def test_a_missing_file_is_named_and_a_path_may_be_absolute(tmp_path):
    with pytest.raises(InfraError, match=r"nowhere\.txt: can't be read"):
        read_texts(Data(source="custom:nowhere.txt"), tmp_path)
    write(tmp_path, "a.txt", "x")
    assert read_texts(Data(source=f"custom:{tmp_path / 'a.txt'}"), tmp_path / "elsewhere") == ["x"]


# Data sets, read by the real `datasets` from small ones on disk.


@pytest.fixture(autouse=True)
def no_progress_bars():
    import datasets

    datasets.disable_progress_bars()


def dataset(column="text", count=6, start=0):
    import datasets

    return datasets.Dataset.from_dict(
        {"id": list(range(count)), column: [f"{column} {start + i}" for i in range(count)]}
    )


@pytest.mark.parametrize("source", ["custom:a.parquet", "hf:./a.parquet"])
def test_a_parquet_file_gives_a_text_a_row(tmp_path, source):
    dataset().to_parquet(tmp_path / "a.parquet")
    assert read_texts(Data(source=source), tmp_path) == [f"text {i}" for i in range(6)]


def test_a_parquet_file_of_any_name_is_read_by_its_format(tmp_path):
    dataset("body").to_parquet(tmp_path / "a.data")
    settings = Data(source="custom:a.data", custom={"format": "parquet", "text_column": "body"})
    assert read_texts(settings, tmp_path)[0] == "body 0"


@pytest.mark.parametrize("source", ["custom:saved", "hf:./saved"])
def test_a_saved_data_set_is_read_with_its_splits(tmp_path, source):
    import datasets

    datasets.DatasetDict({"train": dataset(), "test": dataset(start=100)}).save_to_disk(tmp_path / "saved")
    assert read_texts(Data(source=source), tmp_path)[0] == "text 0"
    assert read_texts(Data(source=source, split="test"), tmp_path)[0] == "text 100"
    with pytest.raises(InfraError, match=r"no split 'tset'; it has train, test \(did you mean 'test'\?\)"):
        read_texts(Data(source=source, split="tset"), tmp_path)


def test_a_saved_data_set_without_splits_is_read(tmp_path):
    dataset().save_to_disk(tmp_path / "saved")
    assert len(read_texts(Data(source="custom:saved"), tmp_path)) == 6


def test_a_folder_of_files_is_read_by_split_and_column(tmp_path):
    for name, start in (("train", 0), ("test", 50)):
        (tmp_path / "set").mkdir(exist_ok=True)
        dataset("body", start=start).to_json(tmp_path / "set" / f"{name}.jsonl")
    settings = {"source": "custom:set", "column": "body"}
    assert read_texts(Data(**settings), tmp_path) == [f"body {i}" for i in range(6)]
    assert read_texts(Data(**settings, split="test"), tmp_path)[0] == "body 50"


ELSEWHERE = {
    "an absolute path": "data_files: OUT/secret.txt",
    "a path by ..": "data_files: ../out/secret.txt",
    "files of a folder": "data_dir: ../out",
    "an address": "data_files: http://127.0.0.1:1/secret.txt",
}


@pytest.mark.parametrize("named", ELSEWHERE.values(), ids=ELSEWHERE)
def test_the_readme_of_a_data_set_names_no_file_outside_of_it(tmp_path, named):
    for name, text in (("set/train.txt", "w1"), ("out/secret.txt", "hunter2")):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, encoding="utf-8")
    readme = f"---\nconfigs:\n- config_name: default\n  {named.replace('OUT', str(tmp_path / 'out'))}\n---\n"
    assert read_texts(Data(source="custom:set"), tmp_path) == ["w1"]
    (tmp_path / "set" / "README.md").write_text(readme, encoding="utf-8")
    with pytest.raises(
        InfraError, match=r"set: its README\.md takes data from .*secret\.txt, (which lies outside|an addr)"
    ):
        read_texts(Data(source="custom:set"), tmp_path)


ADDRESSED = {
    "README.md": "---\nconfigs:\n- config_name: default\n  data_files: {}\n---\n",
    ".huggingface.yaml": "configs:\n- config_name: default\n  data_files:\n    train: [a.txt, {}]\n",
}


@pytest.mark.parametrize("name", ADDRESSED)
def test_no_address_in_the_settings_of_a_set_of_the_hub_is_asked_for_anything(tmp_path, monkeypatch, name):
    import datasets
    import huggingface_hub

    def fetched(repository, file, **keys):
        assert (repository, keys) == ("me/set", {"repo_type": "dataset", "revision": None})
        if file != name:
            raise huggingface_hub.errors.EntryNotFoundError("no such file")
        return tmp_path / file

    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetched)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *args, **keys: asked.append(args) or 1 / 0)
    (tmp_path / name).write_text(ADDRESSED[name].format(r'"https\x3a//inside.example/secret"'), encoding="utf-8")
    with pytest.raises(InfraError, match=r"me/set .*: its .* takes data from https://inside.example/secret, an addr"):
        read_texts(Data(source="hf:me/set"), tmp_path)
    assert not asked
    (tmp_path / name).write_text(ADDRESSED[name].format("hf://datasets/me/set/a.txt"), encoding="utf-8")
    with pytest.raises(ZeroDivisionError):
        read_texts(Data(source="hf:me/set"), tmp_path)


def test_the_settings_of_a_data_set_may_expand_to_billions_and_are_read_once(tmp_path):
    lines = [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghijklmn")]
    bomb = "a: &a [x, x]\n" + "".join(lines)
    (tmp_path / "README.md").write_text(f"---\n{bomb}configs: [*n, 'http://x']\n---\n", encoding="utf-8")
    with pytest.raises(InfraError, match="takes data from http://x, an address"):
        read_texts(Data(source=f"custom:{tmp_path}"), tmp_path)
    (tmp_path / "README.md").write_text("---\nconfigs: [\n---\n", encoding="utf-8")
    with pytest.raises(InfraError, match=r"the settings in its README\.md can't be read"):
        read_texts(Data(source=f"custom:{tmp_path}"), tmp_path)


@pytest.mark.parametrize("changed", ["state.json", "dataset_dict.json"])
def test_a_saved_data_set_is_made_of_no_file_outside_of_it(tmp_path, changed):
    import datasets

    dataset().save_to_disk(tmp_path / "out")
    datasets.DatasetDict({"train": dataset()}).save_to_disk(tmp_path / "saved")
    contents = {
        "dataset_dict.json": {"splits": ["train", "../out"]},
        "state.json": {"_data_files": [{"filename": "../../out/data-00000-of-00001.arrow"}]},
    }
    file = tmp_path / "saved" / ("train" if changed == "state.json" else "") / changed
    file.write_text(json.dumps({**json.loads(file.read_text()), **contents[changed]}), encoding="utf-8")
    with pytest.raises(InfraError, match=r"saved: it is made of '\.\./.*out.*', which is no file of this folder"):
        read_texts(Data(source="custom:saved"), tmp_path)


def test_a_missing_column_of_a_data_set_names_those_that_it_has(tmp_path):
    dataset("txet").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        InfraError, match=r"no column 'text'; it has id, txet \(did you mean 'txet'\?\); set data.column"
    ):
        read_texts(Data(source="custom:a.parquet"), tmp_path)


def test_conversations_of_a_data_set_are_found_under_messages(tmp_path):
    import datasets

    messages = [{"role": "user", "content": "w1"}]
    datasets.Dataset.from_dict({"messages": [messages, messages]}).to_parquet(tmp_path / "a.parquet")
    assert read_texts(Data(source="custom:a.parquet", chat_template=True), tmp_path) == [messages, messages]


@pytest.mark.parametrize("source", ["custom:nowhere.parquet", "hf:./nowhere"])
def test_a_data_set_that_is_not_there_is_named(tmp_path, source):
    with pytest.raises(InfraError, match=r"nowhere.*: can't be read as data: "):
        read_texts(Data(source=source), tmp_path)


def cached_set(cache, folder, repository, subset, rows, split="train"):
    """Leave a copy of a set where `datasets` keeps what it fetched from the hub."""
    import shutil

    import datasets

    rows.to_parquet(folder / "rows.parquet")
    made = datasets.load_dataset(
        "parquet", data_files={split: str(folder / "rows.parquet")}, split=split, cache_dir=str(folder / "made")
    )
    source = Path(made.cache_files[0]["filename"])
    copy = cache / repository.replace("/", "___") / subset / "0.0.0" / ("b" * 40)
    copy.mkdir(parents=True)
    name = repository.rpartition("/")[2]
    shutil.copy(source, copy / f"{name}-{split}.arrow")
    info = json.loads((source.parent / "dataset_info.json").read_text())
    info |= {"dataset_name": name, "config_name": subset}
    info["splits"][split]["dataset_name"] = name
    (copy / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Return an empty cache of data sets."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_set_of_the_hub_is_read_from_its_copy_in_the_cache(tmp_path, cache):
    cached_set(cache, tmp_path, "Salesforce/wikitext", "wikitext-2-raw-v1", dataset())
    expected = [f"text {i}" for i in range(6)]
    assert read_texts(Data(source="wikitext2"), tmp_path) == expected
    assert read_texts(Data(source="hf:Salesforce/wikitext:wikitext-2-raw-v1"), tmp_path) == expected
    assert read_texts(Data(source="hf:Salesforce/wikitext", subset="wikitext-2-raw-v1"), tmp_path) == expected


def test_a_set_of_the_hub_has_the_column_asked_for(tmp_path, cache):
    cached_set(cache, tmp_path, "someone/notes", "default", dataset("note"))
    assert read_texts(Data(source="hf:someone/notes", column="note"), tmp_path)[0] == "note 0"
    with pytest.raises(InfraError, match="no column 'text'; it has id, note"):
        read_texts(Data(source="hf:someone/notes"), tmp_path)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("wikitext2", "Salesforce/wikitext"),
        ("pile", "mit-han-lab/pile-val-backup"),
        ("c4", "allenai/c4"),
        ("redpajama", "togethercomputer/RedPajama-Data-1T-Sample"),
        ("hf:someone/notes", "someone/notes"),
    ],
)
def test_offline_and_without_a_copy_the_error_names_the_set_the_cache_and_both_ways_out(tmp_path, cache, source, name):
    with pytest.raises(InfraError) as caught:
        read_texts(Data(source=source), tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{source}: the data set {name} (")
    assert f"is not in the cache {cache}" in message
    assert f"datasets.load_dataset('{name}'" in message
    assert "data.source: custom:FOLDER" in message
    assert "\n" not in message


def test_a_misspelt_source_names_the_nearest(tmp_path):
    with pytest.raises(InfraError, match=r"unknown data source 'wikitxt2' \(did you mean 'wikitext2'\?\)"):
        read_texts(Data(source="wikitxt2"), tmp_path)


@pytest.mark.parametrize("seed", [0, 7])
def test_wikitext_windows_begin_at_random_places_of_the_first_nine_tenths(seed):
    """The rule of PrefixQuant, with Python's own generator, so that its seed gives the same places here."""
    texts = [words(300), words(200, start=300)]
    windows = stream_windows(texts, data("wikitext2", num_samples=8, seed=seed), tokenizer())
    chance = random.Random(seed)
    starts = [chance.randint(0, 450 - 5 - 1) for _ in range(8)]
    assert windows.tolist() == [ids(5, start) for start in starts]


def test_documents_that_are_too_short_are_passed_over():
    texts = [words(3), words(40, start=10), words(4), words(50, start=50), *[words(2)] * 6]
    windows = document_windows(texts, data("c4", num_samples=12), tokenizer("<s> $A")).tolist()
    assert len(windows) == 12
    assert {row[0] for row in windows} == {BOS}
    places = [row[1] - 3 for row in windows]
    assert all(row[1:] == ids(4, place) for row, place in zip(windows, places, strict=True))
    assert {10 <= place < 50 or 50 <= place < 100 for place in places} == {True}
    again = document_windows(texts, data("c4", num_samples=12), tokenizer("<s> $A")).tolist()
    assert again == windows


def test_too_few_long_documents_say_so():
    with pytest.raises(InfraError, match=r"too few texts of 'pile' are longer than 5 tokens: 0 windows were found"):
        document_windows([words(5), words(4)], data("pile"), tokenizer())


# Conversations.

CHAT = "{% for m in messages %}<s> {{ m['content'] }} </s> {% endfor %}"


def test_conversations_are_put_into_the_template_of_the_tokenizer(tmp_path):
    tok = tokenizer()
    tok.chat_template = CHAT
    records = [{"text": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}, {"text": "w3"}]
    write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, records)))
    settings = data("custom:a.jsonl", num_samples=1, seq_len=9, chat_template=True)
    (batch,) = batches_of(settings, tok, tmp_path)
    assert batch["input_ids"].tolist() == [[BOS, 4, EOS, BOS, 5, EOS, BOS, 6, EOS]]


def test_a_tokenizer_that_can_not_encode_a_text_is_told_in_one_line(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"w1": 0}, unk_token="<unk>")))
    write(tmp_path, "a.txt", words(20))
    with pytest.raises(AnomalyError, match=r"the tokenizer of .* can't encode 'a': .* Missing"):
        batches_of(data(), lacking, tmp_path)


@pytest.mark.parametrize(
    ("template", "limit"),
    [
        ("{{ 'a' * 10000000000 }}", "1 GB"),
        ("{{ 'a'|center(10000000000) }}", "1 GB"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "0 s"),
    ],
)
def test_a_template_that_never_ends_is_the_checkpoints_fault(template, limit, tmp_path, monkeypatch):
    monkeypatch.setattr("pytest_qsa.engine.load.tokenizer.TEMPLATE_SECONDS", 0.1)
    tok = tokenizer()
    tok.chat_template = template
    write(tmp_path, "a.txt", words(20))
    with pytest.raises(AnomalyError, match=rf"the checkpoint's chat template takes more than {limit}"):
        batches_of(data(chat_template=True), tok, tmp_path)


def test_a_tokenizer_without_a_template_is_an_error(tmp_path):
    write(tmp_path, "a.txt", words(20))
    with pytest.raises(InfraError, match=r"data\.chat_template: the tokenizer can't format"):
        batches_of(data(chat_template=True), tokenizer(), tmp_path)
