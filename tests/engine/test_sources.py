"""Sources of data: files of one's own, folders and sets of the hub, and what none of them may lead to."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest

from pytest_qsa.common.errors import InfraError
from pytest_qsa.engine.load.sources import read_texts
from pytest_qsa.suite import Data


@pytest.mark.parametrize("source", ["wikitext", "custom:", "custom", "hf:", "http://x"])
def test_an_unknown_source_says_what_there_is(tmp_path, source):
    with pytest.raises(InfraError, match=r"unknown data source.*sample.*custom:PATH"):
        read_texts(Data(source=source), tmp_path)


def test_a_file_that_is_named_without_its_kind_is_recognized(tmp_path):
    (tmp_path / "texts.jsonl").write_text("{}")
    with pytest.raises(InfraError, match=r"'texts\.jsonl' \(did you mean 'custom:texts\.jsonl'\?\)"):
        read_texts(Data(source="texts.jsonl"), tmp_path)


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
