"""The report: results → report.json for machines, report.html for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common import write_atomically
from .plain import SCHEMA, builtins_of, strict_json


def write_report(results: Sequence[Mapping[str, Any]], folder: Path, session: Mapping[str, Any]) -> Path:
    """Write report.json and report.html into a folder; return the path of the page. Only the page has histograms.

    `results`: what `to_plain` returns for each verdict. `session`: command, started, duration_s, counts, version.

    Raises:
        OSError: the folder can't be written.
    """
    from .page import render_page

    content = builtins_of({"schema": SCHEMA, "session": session, "results": results})
    told = [{key: value for key, value in result.items() if key != "histograms"} for result in content["results"]]
    write_atomically(folder / "report.json", strict_json(content | {"results": told}))
    page = folder / "report.html"
    write_atomically(page, render_page(content["results"], content["session"]))
    return page
