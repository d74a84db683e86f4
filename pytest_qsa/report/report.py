"""Verdicts → report.json and report.html. As builtins they also cross from a pytest-xdist worker to its controller."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from pathlib import Path
from typing import Any

from ..common import (
    BLANK,
    NO_CHECKSUM,
    InfraError,
    check_checksum,
    parsed_json,
    refuse_special,
    remark,
    shown_path,
    with_checksum,
    write_atomically,
)
from ..verdicts import Verdict

REPORT_SCHEMA = "qsa-report/1"
PAGE_ONLY = frozenset({"histograms", "curves"})
"""What of a result the page alone has: it would make report.json many times larger."""
MOST_BYTES = 1_000_000_000
"""The largest report.json that is read; one of 100,000 layers, each with a problem, has 65 MB."""
MARKER = ".qsa-run"
"""The file that says that a folder is a run's, and may be removed."""
MOST_RUNS = 10
"""How many runs are kept, this one among them."""

PlainVerdict = Mapping[str, Any]
"""A verdict as builtins: what `to_plain` returns."""


def to_plain(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as builtins only, with `used` for each row, and `failed`."""
    apart = ("rows", "evidence", "findings", "waivers", "limits")
    names = (field.name for field in dataclasses.fields(verdict) if field.name not in apart)
    fields = {name: getattr(verdict, name) for name in names}
    content: dict[str, Any] = builtins_of(fields | {"run": verdict.run.plain(), "where": str(verdict.where or "")})
    # Not `asdict`, which copies each value deeply: there may be hundreds of thousands of layers.
    content["rows"] = [builtins_of({**vars(row), "used": row.used}) for row in verdict.rows]
    content["evidence"] = [builtins_of(dataclasses.asdict(token)) for token in verdict.evidence]
    content["findings"] = [dict(vars(finding)) for finding in verdict.findings]
    content["waivers"] = [builtins_of({**dataclasses.asdict(use), "text": str(use)}) for use in verdict.waivers]
    content["limits"] = [builtins_of(dataclasses.asdict(limit)) for limit in verdict.limits]
    content["failed"] = verdict.failed
    return content


def write_report(results: Sequence[PlainVerdict], folder: Path, session: Mapping[str, Any]) -> Path:
    """Write report.json and report.html into a folder; return the path of the page. Only the page has `PAGE_ONLY`.

    `results`: what `to_plain` returns for each verdict. `session`: command, started, duration_s, counts, version.

    Raises:
        OSError: the folder can't be written.
    """
    # Imported here: page.py imports this module, and jinja2 is loaded only where a report is written.
    from .page import render_page

    content = {"checksum": BLANK, "schema": REPORT_SCHEMA, "session": builtins_of(session), "results": results}
    smaller = [{key: value for key, value in result.items() if key not in PAGE_ONLY} for result in content["results"]]
    text = strict_json(content | {"results": smaller})
    write_atomically(folder / "report.json", with_checksum(text.encode()))
    page = folder / "report.html"
    write_atomically(page, render_page(content["results"], content["session"]))
    return page


def write_run(results: Sequence[PlainVerdict], run: Path, session: Mapping[str, Any]) -> Path:
    """Write the report of a run into its folder, and copies beside all runs as the latest; return the latest page.

    Of the runs that have our marker the newest are kept; any other folder is left alone.

    Raises:
        OSError: a folder can't be written.
    """
    latest = run.parent.parent
    write_report(results, run, session)
    write_atomically(run / MARKER, "")
    for name in ("report.json", "report.html"):
        write_atomically(latest / name, (run / name).read_bytes())
    # Their names begin with the time.
    runs = sorted(path.parent for path in run.parent.glob(f"*/{MARKER}") if path.parent != run)
    for old in runs[: max(len(runs) + 1 - MOST_RUNS, 0)]:
        if not old.is_symlink():
            shutil.rmtree(old, ignore_errors=True)
    return latest / "report.html"


def read_report(path: Path) -> dict[str, Any] | None:
    """Read a report.json; None for a file of another kind. A warning tells of one of an earlier version.

    Raises:
        InfraError: it can't be read, was damaged, or was changed after it was written.
    """
    refuse_special(path, MOST_BYTES)
    try:
        content = path.read_bytes()
        report = parsed_json(content)
    except OSError as error:
        raise InfraError(f"{shown_path(path)}: can't be read: {error.strerror}") from None
    except ValueError:
        return None
    if not isinstance(report, dict) or not str(report.get("schema", "")).startswith(REPORT_SCHEMA):
        return None
    if "checksum" not in report:
        remark(f"{shown_path(path)} {NO_CHECKSUM}")
        return report
    try:
        check_checksum(content, report["checksum"])
    except InfraError as error:
        raise InfraError(f"{shown_path(path)}: {error}") from None
    return report


_BUILTINS = frozenset({bool, int, float, type(None)})
"""What most values of a report are: a call less for each of them halves the time of one of 100,000 layers."""


def builtins_of(value: Any) -> Any:
    """Return a value as str, int, float, bool, None, list and dict; any other object becomes its text."""
    kind = type(value)
    if kind in _BUILTINS or (kind is str and value.isascii()):
        return value
    if isinstance(value, Enum):  # before str: Kind is a StrEnum, which execnet can't serialize
        return builtins_of(value.value)
    if isinstance(value, str):
        return str(value).encode("utf-8", "backslashreplace").decode()  # a lone surrogate can't be written
    if isinstance(value, Mapping):
        # The key through `builtins_of` too: a name of a layer or file may hold what can't be written as
        # UTF-8.
        items = ((key if type(key) is str and key.isascii() else builtins_of(str(key)), value[key]) for key in value)
        return {key: item if type(item) in _BUILTINS else builtins_of(item) for key, item in items}
    if isinstance(value, Set):
        return sorted((builtins_of(item) for item in value), key=str)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [item if type(item) in _BUILTINS else builtins_of(item) for item in value]
    # Numbers and arrays of numpy, which execnet can't serialize.
    if hasattr(value, "tolist"):
        return builtins_of(value.tolist())
    return str(value)


def strict_json(content: Mapping[str, Any], *, compact: bool = False) -> str:
    """Write JSON that every parser reads: NaN and the infinities are the strings NaN, Infinity and -Infinity.

    `compact`: in ASCII, without indents, which cost bytes and take Python's own encoder ten times as long.
    """
    plain = builtins_of(content)
    form: dict[str, Any] = {"separators": (",", ":")} if compact else {"indent": 1}
    encoder = json.JSONEncoder(ensure_ascii=compact, allow_nan=False, **form)
    try:
        text = encoder.encode(plain)
    except ValueError:  # a number that JSON doesn't have
        text = encoder.encode(_named(plain))
    return text if compact else f"{text}\n"


def _named(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return value
