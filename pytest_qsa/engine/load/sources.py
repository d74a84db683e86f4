"""Sources of data: the texts of a file, a folder or a set of the hub; none that leads outside of its folder is read."""

from __future__ import annotations

import contextlib
import csv
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from ...common import (
    InfraError,
    QsaError,
    did_you_mean,
    one_line,
    parsed_json,
    read_json,
    refuse_special,
    shown_path,
)
from ...suite import (
    BUILTIN,
    DOCUMENTS,
    MEDIA,
    PROMPTS,
    SHIPPED,
    Conversation,
    Data,
    HubSet,
    cache_folder,
    file_records,
    hub_set_of,
    local_path,
    media_column,
    prompts,
)

Records = list[dict[str, Any]]
SETTINGS = ("README.md", ".huggingface.yaml")
"""The files in which a data set says of which files it is made."""
MOST_SETTINGS = 10_000_000
MOST_READ_AHEAD = 10_000_000
"""Bytes of a file of data that are read to see whether they can be, before a model is loaded."""


def read_texts(data: Data, folder: Path) -> list[Any]:
    """Return the texts of a source, in their order; with `chat_template` a record may be a list of messages.

    A record whose messages stand beside `tools` is a `Conversation`.
    """
    if data.source in SHIPPED:
        return [SHIPPED[data.source]()]
    if data.source == PROMPTS:
        return list(prompts())
    spec = hub_set_of(data)
    if spec is not None:
        return _texts_of(read_hub(spec, data), data)
    path = local_path(data, folder)
    if path is None:
        named = [*SHIPPED, PROMPTS, *MEDIA, *BUILTIN]
        is_there = (folder / data.source).exists()
        near = f" (did you mean 'custom:{data.source}'?)" if is_there else did_you_mean(data.source, named)
        raise InfraError(
            f"unknown data source '{data.source}'{near}: use {', '.join(named)}, hf:NAME, "
            "or custom:PATH of a text, JSON, JSONL, CSV or parquet file or a folder"
        )
    if _is_set(path, data):
        return _texts_of(read_folder(path, data), data)
    try:
        return _read_custom(path, data)
    except (OSError, ValueError, csv.Error) as error:
        raise InfraError(f"{shown_path(path)}: can't be read as data: {error}") from None


def _is_set(path: Path, data: Data) -> bool:
    parquet = data.custom.format == "parquet" or (data.custom.format == "auto" and path.suffix == ".parquet")
    return path.is_dir() or parquet or data.source.startswith("hf:")


def rows_of_set(data: Data, folder: Path, most: int) -> list[Any] | None:
    """Return the first records of a set or of a file of records, pictures and sounds not decoded; None of a text.

    Raises:
        InfraError: it can't be read.
    """
    path, spec = local_path(data, folder), hub_set_of(data)
    if data.source in BUILTIN or (path is None and spec is None):
        return None
    if spec is not None:
        return hub_rows(spec, data, most)
    assert path is not None
    if _is_set(path, data):
        return folder_rows(path, data, most)
    try:
        records = file_records(path, data)
    except (OSError, ValueError, csv.Error) as error:
        raise InfraError(f"{shown_path(path)}: can't be read as data: {error}") from None
    return None if records is None else list(records[:most])


def check_local(data: Data, folder: Path) -> None:
    """Read data that are a small file, or none that is here, before a model is loaded in vain.

    Raises:
        InfraError: as `read_texts`, or `data.stride` is given where windows don't follow one another.
    """
    spec = hub_set_of(data)
    if data.stride is not None and spec is not None and spec.rule != "packed":
        raise InfraError(f"data.stride: windows of '{data.source}' are drawn at random places: take custom:FILE of it")
    if data.source in SHIPPED or data.source in MEDIA or spec is not None:
        return
    path = local_path(data, folder)
    if path is None or not path.exists() or (path.is_file() and path.stat().st_size < MOST_READ_AHEAD):
        try:
            read_texts(data, folder)
        except InfraError:
            # Records of pictures and sounds need no text; the model says later whether it takes them.
            if path is None or not path.exists() or media_column(rows_of_set(data, folder, 1) or []) is None:
                raise


def _texts_of(records: Sequence[Any], data: Data) -> list[Any]:
    try:
        return [_text_of(record, "text", index, chat=data.chat_template) for index, record in enumerate(records)]
    except ValueError as error:
        raise InfraError(f"'{data.source}' can't be read as data: {error}") from None


def _read_custom(path: Path, data: Data) -> list[Any]:
    records = file_records(path, data)
    if records is None:
        return [path.read_text(encoding="utf-8-sig")]  # a byte order mark would become part of the first token
    return [
        _text_of(record, data.custom.text_column, index, chat=data.chat_template)
        for index, record in enumerate(records)
    ]


def _text_of(record: Any, column: str, index: int, *, chat: bool) -> Any:
    if isinstance(record, str):
        return _whole(record, index)
    if isinstance(record, dict) and chat:
        messages = record.get(column, record.get("messages"))
        if isinstance(messages, list):
            return Conversation(messages, _tools_of(record, index)) if record.get("tools") else messages
    if not isinstance(record, dict) or not isinstance(record.get(column), str):
        if isinstance(record, dict) and column in record:
            raise ValueError(f"record {index} has no text under '{column}' but a {type(record[column]).__name__}")
        known = f"; it has {', '.join(map(str, record))}" if isinstance(record, dict) else ""
        raise ValueError(f"record {index} has no text under '{column}'{known}; set data.custom.text_column")
    return _whole(str(record[column]), index)


def _tools_of(record: Mapping[str, Any], index: int) -> list[Any]:
    """Return the tools that a record offers, as OpenAI's API describes them, perhaps as the text of a JSON."""
    tools = record["tools"]
    found = parsed_json(tools) if isinstance(tools, str) else tools
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        raise ValueError(f"record {index} has tools that are no list of objects")
    return found


def _whole(text: str, index: int) -> str:
    try:
        text.encode()  # JSON can hold half of a pair, and no tokenizer takes it
    except UnicodeEncodeError:
        raise ValueError(f"record {index} holds half of a surrogate pair, which is no text") from None
    return text


def read_hub(spec: HubSet, data: Data) -> Records:
    """Return the first documents of a set.

    Raises:
        InfraError: it is neither in the cache nor to be reached, or has no such subset, split or column.
    """
    # The first documents alone, streamed or from a copy: both then give the same windows.
    return _with_column(hub_rows(spec, data, DOCUMENTS), spec.column, data, str(spec))


def hub_rows(spec: HubSet, data: Data, most: int) -> Records:
    """Return the first records of a set: streamed if it is large and no copy lies in the cache.

    Raises:
        InfraError: it is neither in the cache nor to be reached, or has no such subset or split.
    """
    import datasets
    from huggingface_hub import constants

    # streaming needs the network, and a large set is too much to download for its first documents
    offline = bool(constants.HF_HUB_OFFLINE)
    streamed = spec.large and not offline and not spec.copies
    try:
        with _quiet_datasets():
            for name in SETTINGS:
                if (file := _settings_on_hub(spec, name)) is not None:
                    _check_addresses(file, str(spec))
            keys = {"revision": spec.revision, "data_files": spec.files, "cache_dir": str(cache_folder())}
            _check_files(datasets.load_dataset_builder(spec.repository, spec.subset, **keys), cache_folder(), str(spec))
            rows = datasets.load_dataset(spec.repository, spec.subset, split=spec.split, streaming=streamed, **keys)
            return list(islice(map(dict, _undecoded(rows)), most))
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InfraError(_unreachable(spec, data.source, error)) from None
    except (ValueError, RuntimeError) as error:  # no such subset or split, a set that is a script
        raise InfraError(f"{data.source}: {spec} can't be read: {one_line(error)}") from None


def read_folder(path: Path, data: Data) -> Records:
    """Return the records of a data set's folder (`save_to_disk`, or files by split) or of a parquet file.

    Raises:
        InfraError: it can't be read, or has no such split or column.
    """
    return _with_column(folder_rows(path, data), data.column or data.custom.text_column, data, shown_path(path))


def folder_rows(path: Path, data: Data, most: int | None = None) -> Records:
    """Return the first records of a data set's folder or of a parquet file, or all of them.

    Raises:
        InfraError: it can't be read, or has no such split.
    """
    import datasets

    split = data.split or "train"
    try:
        with _quiet_datasets():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                _check_saved(path)
                rows = datasets.load_from_disk(str(path))
                rows = _split_of(rows, data.split) if isinstance(rows, datasets.DatasetDict) else rows
            elif path.is_dir():
                # Streamed, for otherwise the library first writes a copy of the whole set into its cache.
                for name in SETTINGS:
                    _check_addresses(path / name, shown_path(path))
                builder = datasets.load_dataset_builder(str(path), data.subset)
                _check_files(builder, path, shown_path(path))
                rows = builder.as_streaming_dataset(split=split)
            else:
                rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            return list(islice(map(dict, _undecoded(rows)), most))
    except QsaError:
        raise
    except Exception as error:  # pyarrow's, fsspec's and the loaders' own
        raise InfraError(f"{shown_path(path)}: can't be read as data: {one_line(error)}") from None


def _undecoded(rows: Any) -> Any:
    """Let `datasets` leave pictures and sounds as the bytes that they are: it needs packages to decode some."""
    import datasets

    for name, feature in (rows.features or {}).items():
        of = feature.feature if isinstance(feature, datasets.List) else feature
        if isinstance(of, (datasets.Image, datasets.Audio)):
            plain = type(of)(decode=False)
            rows = rows.cast_column(name, datasets.List(plain) if of is not feature else plain)
    return rows


def _check_files(builder: Any, folder: Path, name: str) -> None:
    """Check that a set takes its files from its own folder or from the hub: its README.md may name any of this machine.

    Raises:
        InfraError: it names another file, or an address.
    """
    inside = os.path.abspath(folder)
    for file in (str(file) for files in (builder.config.data_files or {}).values() for file in files):
        own = file.rpartition("::")[2]  # of a member of an archive: where the archive is
        if not own.startswith("hf://") and ("://" in own or not Path(os.path.abspath(own)).is_relative_to(inside)):
            raise InfraError(f"{name}: its README.md takes data from {own}, which lies outside of it: copy it there")


def _check_addresses(file: Path, name: str) -> None:
    """Check that the settings of a data set name no address: `datasets` would ask it for the file's size.

    `file`: its README.md, with the settings between two lines of ---, or a YAML file. `name`: the set's.

    Raises:
        InfraError: they name one, or can't be read.
    """
    if not file.is_file():
        return
    refuse_special(file, MOST_SETTINGS)
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".md":
        text = text.split("---")[1] if text.startswith("---") else ""
    try:
        found = _texts_under(yaml.compose(text, yaml.SafeLoader), "configs")
        addresses = [address for each in found for address in re.findall(r"[\w+]+://\S*", each)]
    except (yaml.YAMLError, RecursionError) as error:
        raise InfraError(f"{name}: the settings in its {file.name} can't be read: {one_line(error)}") from None
    if other := next((address for address in addresses if not address.startswith("hf://")), None):
        raise InfraError(f"{name}: its {file.name} takes data from {other}, an address: copy it there")


def _texts_under(node: yaml.Node | None, key: str) -> Iterator[str]:
    """Yield the texts below a key of a document; each node once, for its aliases may expand to billions."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    nodes, seen = [value for name, value in pairs if name.value == key], set[int]()
    while nodes:
        node = nodes.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.ScalarNode):
            yield str(node.value)
        elif isinstance(node, yaml.MappingNode):
            nodes += [part for pair in node.value for part in pair]
        else:
            nodes += node.value


def _settings_on_hub(spec: HubSet, name: str) -> Path | None:
    """Return a file with settings of a set of the hub, fetched as `datasets` fetches it; None where there is none."""
    import huggingface_hub

    # What can't be fetched can't be acted on either; the set itself then says why.
    with contextlib.suppress(Exception):
        return Path(huggingface_hub.hf_hub_download(spec.repository, name, repo_type="dataset", revision=spec.revision))
    return None


def _check_saved(path: Path) -> None:
    """Check that a set of `save_to_disk` is made of files in its own folder.

    Raises:
        InfraError: it names another, or can't be read.
        AnomalyError: what says so is no JSON.
    """
    splits = [_plain(path, name) for name in _field(path / "dataset_dict.json", "splits")]
    for split in ("", *splits):
        for file in _field(path / split / "state.json", "_data_files"):
            _plain(path, file.get("filename") if isinstance(file, dict) else file)


def _plain(path: Path, name: Any) -> str:
    if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:
        raise InfraError(f"{shown_path(path)}: it is made of {name!r}, which is no file of this folder")
    return name


def _field(file: Path, key: str) -> list[Any]:
    content = read_json(file, "a data set") if file.is_file() else None
    found = content.get(key) if isinstance(content, dict) else None
    return found if isinstance(found, list) else []


def _split_of(rows: Any, wanted: str | None) -> Any:
    name = wanted or ("train" if "train" in rows else next(iter(rows)))
    if name not in rows:
        raise InfraError(f"data.split: there is no split '{name}'; it has {', '.join(rows)}{did_you_mean(name, rows)}")
    return rows[name]


def _with_column(records: Records, column: str | None, data: Data, name: str) -> Records:
    """Return the records with their text under `text`; it comes from `column`, else from `text` or `messages`."""
    if not records:
        raise InfraError(f"{name}: there are no records")
    known = records[0]
    choices = [column or "text", *(["messages"] if data.chat_template else [])]
    found = next((choice for choice in choices if choice in known), None)
    if found is None:
        raise InfraError(
            f"{name}: there is no column '{choices[0]}'; it has {', '.join(known)}{did_you_mean(choices[0], known)}; "
            "set data.column"
        )
    kept = ["tools"] if data.chat_template and "tools" in known else []
    return [{"text": record[found], **{name: record.get(name) for name in kept}} for record in records]


def _unreachable(spec: HubSet, source: str, error: Exception) -> str:
    return (
        f"{source}: the data set {spec} is not in the cache {shown_path(cache_folder())}, and the hub can't be reached "
        f"({one_line(error)[:120]}): fetch it once where there is a network, {spec.fetch}, "
        "or give a copy of your own, data.source: custom:FOLDER"
    )


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Silence the progress bars and warnings of `datasets`, and restore them."""
    import datasets

    shown, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if shown:
            datasets.enable_progress_bars()
