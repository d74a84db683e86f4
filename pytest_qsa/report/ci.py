"""What CI systems show beside a test: its plots and its numbers, each where its plugin or service is active."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from ..verdicts import Verdict


def properties_of(verdict: Verdict) -> list[tuple[str, str | float]]:
    """Return a verdict as the properties of a JUnit test case; builtins only, for pytest-xdist."""
    properties: list[tuple[str, str | float]] = [
        ("qsa_kind", str(verdict.kind)), ("qsa_verdict", verdict.headline), ("qsa_bound", verdict.bound),
        ("qsa_where", verdict.where),
    ]  # fmt: skip
    if verdict.rows:
        worst = verdict.rows[0]
        properties += [("qsa_worst_layer", worst.layer), ("qsa_value", float(worst.value))]
        if worst.used is not None:
            properties.append(("qsa_used", float(worst.used)))
    return [(name, value) for name, value in properties if value != ""]


def attach(item: pytest.Item, report: pytest.TestReport, results: Sequence[Mapping[str, Any]]) -> None:
    """Give the plots of a test to pytest-html, to Allure and to GitLab, as far as they are there."""
    config = item.config
    pictures = list(_pictures(config.invocation_params.dir, results))
    if not pictures:
        return
    if config.getoption("htmlpath", None):
        report.extras = [*getattr(report, "extras", ()), *(_extra(title, path) for title, path in pictures)]  # type: ignore[attr-defined]
    if config.pluginmanager.hasplugin("allure_listener"):
        _attach_to_allure(pictures)
    if os.environ.get("GITLAB_CI"):
        # pytest writes system-out from the report of the teardown, or of the call if it leaves out passing tests.
        line = f"[[ATTACHMENT|{_in_project(pictures[0][1])}]]"
        report.sections.append(("Captured stdout call", line))
        item.add_report_section("call", "stdout", line)


def _pictures(folder: Path, results: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    for result in results:
        for title, path in result["artefacts"].items():
            if path.endswith(".png") and (folder / path).is_file():
                yield f"{result['id']}: {title}", folder / path


def _extra(title: str, path: Path) -> dict[str, str | None]:
    """Return what pytest-html shows; plain values, so that it crosses from a worker of pytest-xdist."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"name": title, "format_type": "image", "content": content, "mime_type": "image/png", "extension": "png"}


def _attach_to_allure(pictures: Sequence[tuple[str, Path]]) -> None:
    import allure

    for title, path in pictures:
        allure.attach.file(str(path), name=title, attachment_type=allure.attachment_type.PNG)


def _in_project(path: Path) -> str:
    """Return a path as GitLab wants it: relative to the project's folder."""
    try:
        return str(path.resolve().relative_to(Path(os.environ.get("CI_PROJECT_DIR", ".")).resolve()))
    except ValueError:
        return str(path)
