"""How often does a calibrated suite fail a healthy model on other windows of its texts? Never, it should be.

`qsa init MODEL --reference ORIGINAL` writes such a suite. Both models are loaded once; each run captures windows that
the calibration didn't see, and holds every bound against them: budgets and assertions against the reference. First come
the windows beside the calibrated ones, once each, then windows cut at random places. A line of JSON a run is
appended to the file, so that a later start goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pytest_qsa.captures import merge_requests
from pytest_qsa.captures.capture import Capture
from pytest_qsa.checkpoint import capture_weights
from pytest_qsa.engine.load.models import load_model
from pytest_qsa.engine.load.sources import read_texts
from pytest_qsa.engine.subject import capture_loaded, load_reference
from pytest_qsa.suite import SIDES, Data, MeasuredAssertion, NamedSubject, SuiteFile, files_of, load_suite, subject_of
from pytest_qsa.verdicts.budgets import budget_of
from pytest_qsa.verdicts.judgement import checked_series, within_budget
from pytest_qsa.verdicts.verdict import failing


def bounded(file: SuiteFile) -> list[MeasuredAssertion]:
    """Return what varies with the text: baselines are held on their own."""
    return [a for a in file.assertions if isinstance(a, MeasuredAssertion) and a.stated]


def windows(data: Data, tokenizer: Any, folder: Path, parts: int) -> Iterator[torch.Tensor]:
    """Yield [num_samples, seq_len] for run after run, of text that calibrating on so many parts didn't use."""
    stream = [token for text in read_texts(data, folder) for token in tokenizer(text, verbose=False)["input_ids"]]
    ids, length, each = torch.tensor(stream), data.seq_len, data.num_samples
    available = len(stream) // length
    seen = np.random.default_rng(data.seed).choice(available, min(parts * each, available), replace=False)
    fresh = [index * length for index in range(available) if index not in set(seen.tolist())]
    for first in range(0, len(fresh) - each + 1, each):
        yield torch.stack([ids[start : start + length] for start in fresh[first : first + each]])
    chance = np.random.default_rng(data.seed + 1)
    while True:
        starts = chance.integers(0, len(stream) - length, each).tolist()
        yield torch.stack([ids[start : start + length] for start in starts])


def verdict(assertion: MeasuredAssertion, capture: Capture) -> dict[str, Any]:
    """Return what is out of bounds, and how much of the room from the noise's mean to the bound is used, and where."""
    series = checked_series(assertion, capture)
    budget = budget_of(assertion.stated, series.layers, capture.schemes)
    out = failing(within_budget(series, budget).rows)
    used, where = 0.0, ""
    for side in SIDES:
        noise = getattr(assertion.noise, side) if assertion.noise else None
        for layer, value, own in zip(series.layers, series.values.tolist(), budget.bounds, strict=True):
            if noise is None:
                continue
            figures = noise[budget.keys[layer, side][1]] if isinstance(noise, dict) else noise
            room = getattr(own, side) - figures.mean
            share = (value - figures.mean) / room if room and figures.sigma else 0.0
            used, where = max((used, where), (share, layer))
    return {"failing": [[row.layer, row.value] for row in out], "used": round(used, 4), "where": where}


def run(subject: NamedSubject, asked: list[MeasuredAssertion], parts: int, runs: int, file: Path) -> None:
    """Capture and judge what is missing of so many runs."""
    done = len(file.read_text().splitlines()) if file.exists() else 0
    loaded = load_model(subject.model, subject.path, subject.memory, allow_code=False)
    reference = load_reference(subject, allow_code=False)
    requests = merge_requests(assertion.request for assertion in asked)
    of_pass = [request for request in requests if request.site != "weight"]
    # weights don't vary with the text
    weights = capture_weights(files_of(subject), [request for request in requests if request.site == "weight"])
    source = windows(subject.data, loaded.tokenizer, subject.folder, parts)
    for number, batch in zip(range(runs), source, strict=False):
        if number < done:
            continue
        start = time.perf_counter()
        capture = capture_loaded(subject, loaded, [batch], of_pass, reference=reference)
        row: dict[str, Any] = {"run": number, "seconds": round(time.perf_counter() - start, 1)}
        for assertion in asked:
            row[assertion.id] = verdict(assertion, weights if assertion.request.site == "weight" else capture)
        with file.open("a") as out:
            out.write(json.dumps(row) + "\n")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("suite", type=Path)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--file", type=Path, default=Path("false_alarms.jsonl"))
    options = parser.parse_args()
    suite = load_suite(options.suite)
    asked = bounded(suite)
    parts = max(n.n for a in asked if a.noise for n in (a.noise.min, a.noise.max) if n and not isinstance(n, dict))
    torch.set_grad_enabled(False)
    run(subject_of(suite), asked, parts, options.runs, options.file)
    rows = [json.loads(line) for line in options.file.read_text().splitlines()]
    alarms = [[row["run"], a.id, *row[a.id]["failing"][0]] for row in rows for a in asked if row[a.id]["failing"]]
    print(f"{len(rows)} runs of {len(asked)} assertions: {len({alarm[0] for alarm in alarms})} with a false alarm")
    for alarm in alarms:
        print("  run {}: {} at {}: {:.4g}".format(*alarm))
    for assertion in asked:
        used, where = max((row[assertion.id]["used"], row[assertion.id]["where"]) for row in rows)
        print(f"  {assertion.id:<30} at most {used:4.0%} of the room between mean and bound was used {where}")


if __name__ == "__main__":
    main()
