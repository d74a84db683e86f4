"""Records of data sets, through `datasets`: from the hub, from a copy in the cache, from a folder or parquet file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ...common import InfraError, did_you_mean, shown_path
from ...suite import DOCUMENTS, Data, HubSet, cache_folder

Records = list[dict[str, Any]]


def read_hub(spec: HubSet, data: Data) -> Records:
    """Return the first documents of a set: streamed if it is large and no copy lies in the cache.

    Raises:
        InfraError: it is neither in the cache nor to be reached, or has no such subset, split or column.
    """
    import datasets
    from huggingface_hub import constants

    arguments = {
        "path": spec.repository, "name": spec.subset, "split": spec.split, "revision": spec.revision,
        "data_files": spec.files, "cache_dir": str(cache_folder()),
    }  # fmt: skip
    offline = bool(constants.HF_HUB_OFFLINE)
    streamed = spec.large and not offline and not spec.copies
    try:
        with _quiet():
            rows = datasets.load_dataset(**arguments, streaming=streamed)
            return _with_column(list(islice(_plain(rows), DOCUMENTS)), spec.column, data, str(spec))
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise InfraError(_unreachable(spec, data.source, error)) from None
    except (ValueError, RuntimeError) as error:  # no such subset or split, a set that is a script
        raise InfraError(f"{data.source}: {spec} can't be read: {_one_line(error)}") from None


def read_folder(path: Path, data: Data) -> Records:
    """Return the records of a data set's folder (`save_to_disk`, or files by split) or of a parquet file.

    Raises:
        InfraError: it can't be read, or has no such split or column.
    """
    import datasets

    split = data.split or "train"
    try:
        with _quiet():
            if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
                rows = datasets.load_from_disk(str(path))
                rows = _split_of(rows, data.split) if isinstance(rows, datasets.DatasetDict) else rows
            elif path.is_dir():
                rows = datasets.load_dataset(str(path), data.subset, split=split, streaming=True)
            else:
                rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
            return _with_column(list(_plain(rows)), data.column or data.custom.text_column, data, shown_path(path))
    except InfraError:
        raise
    except Exception as error:  # pyarrow's, fsspec's and the loaders' own
        raise InfraError(f"{shown_path(path)}: can't be read as data: {_one_line(error)}") from None


def _split_of(rows: Any, wanted: str | None) -> Any:
    name = wanted or ("train" if "train" in rows else next(iter(rows)))
    if name not in rows:
        raise InfraError(f"data.split: there is no split '{name}'; it has {', '.join(rows)}{did_you_mean(name, rows)}")
    return rows[name]


def _plain(rows: Any) -> Iterable[dict[str, Any]]:
    return (dict(row) for row in rows)


def _with_column(records: Records, column: str | None, data: Data, name: str) -> Records:
    """Put the column that holds the text under `text`; without one, it is `text`, or `messages` of a conversation."""
    if not records:
        raise InfraError(f"{name}: there are no records")
    known = records[0]
    choices = [column] if column else ["text", *(["messages"] if data.chat_template else [])]
    found = next((choice for choice in choices if choice in known), None)
    if found is None and data.chat_template and "messages" in known:
        found = "messages"
    if found is None:
        raise InfraError(
            f"{name}: there is no column '{choices[0]}'; it has {', '.join(known)}{did_you_mean(choices[0], known)}; "
            "set data.column"
        )
    return [{"text": record[found]} for record in records]


def _unreachable(spec: HubSet, source: str, error: Exception) -> str:
    return (
        f"{source}: the data set {spec} is not in the cache {shown_path(cache_folder())}, and the hub can't be reached "
        f"({_one_line(error)[:120]}): fetch it once where there is a network, {spec.fetch}, "
        "or give a copy of your own, data.source: custom:FOLDER"
    )


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the progress bars and remarks of `datasets` away, and put them back."""
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
