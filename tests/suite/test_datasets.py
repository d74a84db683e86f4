"""Which set of the hub, or which file, a data source names."""

from pathlib import Path

import pytest

from pytest_qsa.suite import Data, cache_folder, hub_set_of, local_path


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"source": "wikitext2"}, "Salesforce/wikitext (wikitext-2-raw-v1, split train)"),
        ({"source": "pile"}, "mit-han-lab/pile-val-backup (split validation)"),
        ({"source": "hf:org/name"}, "org/name (split train)"),
        ({"source": "hf:org/name:part"}, "org/name (part, split train)"),
        ({"source": "hf:org/name", "subset": "other", "split": "test"}, "org/name (other, split test)"),
        ({"source": "hf:"}, "None"),
        ({"source": "hf:./folder"}, "None"),
        ({"source": "custom:a.txt"}, "None"),
        ({"source": "sample"}, "None"),
    ],
)
def test_a_source_names_a_set_of_the_hub_or_none(data, named):
    assert str(hub_set_of(Data(**data))) == named


def test_settings_of_the_suite_win_over_those_of_a_built_in_set():
    found = hub_set_of(Data(source="wikitext2", split="test", column="body", revision="v1"))
    assert (found.split, found.column, found.revision, found.rule) == ("test", "body", "v1", "stream")


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("custom:a.txt", "suite/a.txt"), ("custom:../a.txt", "suite/../a.txt"), ("custom:/a.txt", "/a.txt"),
        ("hf:./a", "suite/a"), ("hf:/a", "/a"), ("hf:org/name", None), ("custom:", None), ("sample", None),
    ],
)  # fmt: skip
def test_a_path_is_relative_to_the_suite(source, path):
    assert local_path(Data(source=source), Path("suite")) == (Path(path) if path else None)


def test_the_command_that_fetches_a_set_names_all_that_the_loader_will_ask_for():
    assert hub_set_of(Data(source="hf:org/name:part", revision="v1")).fetch == (
        "python -c \"import datasets; datasets.load_dataset('org/name', 'part', revision='v1', split='train')\""
    )
    assert "data_files={'train': 'en/c4-train.00000-of-01024.json.gz'}" in hub_set_of(Data(source="c4")).fetch


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_DATASETS_CACHE": "/d", "HF_HOME": "/h"}, "/d"),
        ({"HF_HOME": "/h"}, "/h/datasets"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/datasets"),
        ({}, "~/.cache/huggingface/datasets"),
    ],
)
def test_copies_lie_where_the_library_puts_them(monkeypatch, environment, folder):
    for name in ("HF_DATASETS_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(folder).expanduser()


def test_only_arrow_files_of_the_set_are_copies(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    folder = tmp_path / "org___name" / "default"
    folder.mkdir(parents=True)
    for name in ("b.arrow", "a.arrow", "info.json"):
        (folder / name).write_text("")
    (tmp_path / "other.arrow").write_text("")
    assert hub_set_of(Data(source="hf:org/name")).copies == [folder / "a.arrow", folder / "b.arrow"]
