"""A file of results → scores: those of lm-eval's tasks, or a number that a JSON Pointer finds in any JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..captures import match_layers
from ..common import AnomalyError, InfraError, did_you_mean, shown_path

LATEST = "results_*.json"
"""What lm-eval calls its files, with the time of the run, so that the last name is the latest."""
LOWER = re.compile(r"perplexity|ppl|bits_per_byte|loss|brier|(^|_)(wer|cer|ter)$")
"""Scores of which less is better, where the file doesn't say so."""
CONDITIONS = {"versions": "version", "n-shot": "n-shot", "n-samples": "samples"}
"""What lm-eval says of each task, and two results must share to be compared."""


@dataclass(frozen=True)
class Score:
    """One result. `stderr`: its standard error; None where the file has none. `higher`: whether more is better.

    `conditions`: under which it was measured.
    """

    name: str
    value: float
    stderr: float | None
    higher: bool
    conditions: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """Which results: of lm-eval's tasks that a regex finds, or where a pointer leads. `higher`: None for as it is.

    `score`: `metric`, or `metric,filter`; of a pointer nothing.
    """

    tasks: str = "."
    exclude: str | None = None
    score: str | None = None
    pointer: str | None = None
    stderr: str | None = None
    higher: bool | None = None


def read_scores(path: Path, wanted: Wanted) -> list[Score]:
    """Read results, in the order of the file. A folder stands for the latest of lm-eval's files below it.

    Raises:
        InfraError: there is no such file, or it is no JSON.
        AnomalyError: it has no such task, score or key, or what is there is no finite number.
    """
    file = _latest(path) if path.is_dir() else path
    content = _read(file)
    if wanted.pointer is not None:
        return [_pointed(content, wanted, file)]
    return _of_tasks(content, wanted, file)


def _latest(folder: Path) -> Path:
    files = sorted(folder.rglob(LATEST), key=lambda file: file.name)
    if not files:
        raise InfraError(f"{shown_path(folder)}: there is no {LATEST} of lm-eval below this folder")
    return files[-1]


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InfraError(f"{shown_path(file)}: there is no such file of results; run the eval first") from None
    except OSError as error:
        raise InfraError(f"{shown_path(file)}: can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InfraError(f"{shown_path(file)}: is no JSON: {str(error)[:120]}") from None


def _of_tasks(content: Any, wanted: Wanted, file: Path) -> list[Score]:
    results = content.get("results") if isinstance(content, dict) else None
    if not isinstance(results, dict) or not all(isinstance(task, dict) for task in results.values()):
        raise AnomalyError(
            f"{shown_path(file)} has no results of tasks as lm-eval writes them: of another JSON name the number's "
            "place, pointer: /scores/gsm8k"
        )
    tasks = match_layers(list(results), wanted.tasks, wanted.exclude)
    if not tasks:
        near = did_you_mean(wanted.tasks.strip("^$"), results)
        some = ", ".join(list(results)[:5])
        raise AnomalyError(f"{shown_path(file)} has no task that '{wanted.tasks}' finds{near}; it has {some or 'none'}")
    return [_of_task(content, task, wanted, file) for task in tasks]


def _of_task(content: Mapping[str, Any], task: str, wanted: Wanted, file: Path) -> Score:
    results = content["results"][task]
    key = _key(results, task, wanted.score or "", file)
    metric, _, kind = key.partition(",")
    error = results.get(f"{metric}_stderr,{kind}" if kind else f"{metric}_stderr")
    where = f"{shown_path(file)}: {task} {key}"
    higher = _mapping(_mapping(content, "higher_is_better"), task).get(metric)
    if wanted.higher is not None or not isinstance(higher, bool):
        higher = not LOWER.search(metric) if wanted.higher is None else wanted.higher
    said = {name: _mapping(content, section).get(task) for section, name in CONDITIONS.items()}
    if isinstance(said["samples"], dict):
        said["samples"] = said["samples"].get("effective")
    conditions = {name: value for name, value in said.items() if value is not None}
    return Score(task, _number(results[key], where), _stderr(error, where), higher, conditions)


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}


def _key(results: Mapping[str, Any], task: str, score: str, file: Path) -> str:
    """Return the key of a score; `metric` alone stands for `metric,filter` where there is one filter."""
    keys = [key for key in results if key == score or key.partition(",")[0] == score]
    if score in keys:
        return score
    known = [key for key, value in results.items() if "_stderr" not in key and not isinstance(value, str)]
    if not keys:
        hint = did_you_mean(score, known) or f"; it has {', '.join(known) or 'none'}"
        raise AnomalyError(f"{shown_path(file)}: {task} has no score '{score}'{hint}")
    if len(keys) > 1:
        raise AnomalyError(f"{shown_path(file)}: {task} has '{score}' by several filters: write {' or '.join(keys)}")
    return keys[0]


def _pointed(content: Any, wanted: Wanted, file: Path) -> Score:
    assert wanted.pointer is not None
    value = _number(_at(content, wanted.pointer, file), f"{shown_path(file)}: {wanted.pointer}")
    error = None if wanted.stderr is None else _at(content, wanted.stderr, file)
    name = wanted.pointer.rpartition("/")[2] or wanted.pointer
    higher = not LOWER.search(name) if wanted.higher is None else wanted.higher
    return Score(wanted.pointer, value, _stderr(error, f"{shown_path(file)}: {wanted.stderr}"), higher)


def _at(content: Any, pointer: str, file: Path) -> Any:
    """Follow a JSON Pointer (RFC 6901)."""
    here = content
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(here, list) and key.isdecimal() and int(key) < len(here):
            here = here[int(key)]
        elif isinstance(here, dict) and key in here:
            here = here[key]
        else:
            keys: Sequence[str] = list(here) if isinstance(here, dict) else []
            hint = did_you_mean(key, keys) or (f"; there are {', '.join(keys[:5])}" if keys else "")
            raise AnomalyError(f"{shown_path(file)}: {pointer} leads nowhere: there is no '{key}'{hint}")
    return here


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise AnomalyError(f"{where} is no number: {json.dumps(value)[:60]}")
    if not math.isfinite(value):
        raise AnomalyError(f"{where} is {value}: the eval saw nothing sound")
    return float(value)


def _stderr(value: Any, where: str) -> float | None:
    """Return a standard error; lm-eval writes N/A where it knows none."""
    if value is None or value == "N/A":
        return None
    error = _number(value, f"the standard error of {where}")
    if error < 0:
        raise AnomalyError(f"the standard error of {where} is negative: {error:g}")
    return error
