"""Reports from the field: what the gate says of each checkpoint that was reported broken, and of sound ones.

`field_cases.py` makes the checkpoints. The suite is the one that `qsa init` writes for the sound one and its original,
4 × 128 tokens, as it is written; pytest runs it, as CI does, on each. A line of JSON a checkpoint is appended to the
file, so that a later start goes on where an earlier one ended.

How well a failure says what happened, by the first line of the first test that fails:
5: the layer, kind or file, and what was done to it; 4: the layer, kind or file; 3: both, but elsewhere in the run;
2: red, and no more; 1: green.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from field_cases import CASES, HEALTHY, INT8, REPORTS, SMOLLM2, Case, Pair

SUITE = "gate.qsa.yaml"
SIZE = ("--data.num_samples", "4", "--data.seq_len", "128")
SETTINGS = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


MOST_SHOWN = 160
"""The letters of a first line that the table shows."""
COUNTED = re.compile(r"\d+ problems? in \d+ of \d+ layers \(max 0\); the first: ")
"""What many first lines say before they say what happened; the table has an ellipsis there."""
FILES = """# gate.qsa.yaml
model:
  path: {model}
  reference: {reference}
  weights: files
assertions:
  - {{id: files, metric: checkpoint_health, tensor_parallel: {ranks}}}
  - {{id: unquantized, metric: checkpoint_unquantized}}
  - {{id: weights-close, metric: weight_sqnr, layers: _proj$, min: 15}}
  - {{id: groups-keep-their-size, metric: weight_gain, layers: _proj$, max: 1.25}}
"""
"""The suite for a format that no library here loads."""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a module of Python in a folder."""
    call = [sys.executable, "-m", *words]
    return subprocess.run(call, cwd=folder, env=SETTINGS, capture_output=True, text=True, check=False)


def drafted(pair: Pair, cache: Path) -> Path:
    """Return the folder with the suite that `qsa init` writes for a pair's sound checkpoint, and its baselines."""
    folder = cache / f"suite-{pair.suite}"
    if not (folder / "qsa_baselines").exists():
        folder.mkdir(parents=True, exist_ok=True)
        original = SMOLLM2 if pair.healthy == INT8 else pair.reference
        # what is in 16 bits itself is held against its own copy
        copy = ("--model.reference_is_copy", "true") if pair.healthy == pair.reference else ()
        words = (
            "init",
            str(pair.healthy),
            "--reference",
            str(original),
            "-o",
            SUITE,
            "--force",
            "--no-answers",
            *SIZE,
            *copy,
        )
        for call in (("pytest_qsa", *words), ("pytest", SUITE, "--snapshot-update")):
            done = run(folder, *call)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
    return folder


def judged(case: Case, cache: Path, work: Path) -> dict[str, Any]:
    """Make a case's checkpoint, run the gate on it, and return what failed."""
    pair = case.make(work)
    if pair.suite == "files":
        text = FILES.format(model=pair.model, reference=pair.reference, ranks=pair.ranks)
    else:
        suite = drafted(pair, cache)
        text = (suite / SUITE).read_text(encoding="utf-8")
        for key, path in {"path": pair.model, "reference": pair.reference}.items():
            text = re.sub(rf"^  {key}: .*$", f"  {key}: {path}", text, count=1, flags=re.MULTILINE)
        shutil.copytree(suite / "qsa_baselines", work / "qsa_baselines")
    (work / SUITE).write_text(text, encoding="utf-8")
    start = time.perf_counter()
    options = ("-p", "no:randomly", "-p", "no:cacheprovider", "--color=no", "--qsa-report=always", "--qsa-output=out")
    done = run(work, "pytest", SUITE, *options)
    seconds = round(time.perf_counter() - start, 1)
    (work / "terminal.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    report = work / "out" / "report.json"
    if not report.exists():
        return {
            "code": done.returncode,
            "seconds": seconds,
            "failures": [["none", "no report", done.stdout[-500:], ""]],
        }
    results = json.loads(report.read_text(encoding="utf-8"))["results"]
    failed = [each for each in results if each["failed"]]
    failures = [[each["kind"], each["id"], each["headline"], str(each["findings"])] for each in failed]
    return {"code": done.returncode, "seconds": seconds, "failures": failures}


def grade(case: Case, row: Mapping[str, Any]) -> int:
    """Say how well the failure says what happened, from 1 (green) to 5."""
    if not row["failures"]:
        return 1
    first = row["failures"][0][2]
    said = [re.search(case.place, first) is not None, re.search(case.cause, first) is not None]
    if said[0]:
        return 4 + said[1]
    everything = "\n".join(f"{headline} {findings}" for _, _, headline, findings in row["failures"])
    return 3 if re.search(case.place, everything) and re.search(case.cause, everything) else 2


def table(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the tables in `docs/benchmarks-field.md`; a report is told once, for its first checkpoint."""
    told_already = set()
    yield "| what happened, and where it was told | checkpoint | red | first line | quality |"
    yield "|---|---|---|---|---|"
    for name, case in CASES.items():
        if name in rows:
            what, sources = REPORTS[case.row]
            failures = rows[name]["failures"]
            first = re.sub(r"(?<!\S)/\S*/", "", f"{failures[0][0]} {failures[0][2]}") if failures else "green"
            first = COUNTED.sub("… ", first)
            by = f"{failures[0][1]}, {len(failures)} in all" if failures else "none"
            more = "…" if len(first) > MOST_SHOWN else ""
            told = f"`{first[:MOST_SHOWN]}{more}`"
            report = "" if case.row in told_already else f"{what} ({sources})"
            told_already.add(case.row)
            cells = (report, name.replace("_", " "), by, told, grade(case, rows[name]))
            yield "| " + " | ".join(str(cell).replace("|", r"\|") for cell in cells) + " |"
    yield ""
    yield "| sound checkpoint | red |"
    yield "|---|---|"
    for name, case in HEALTHY.items():
        if name in rows:
            red = "; ".join(f"{identity}: {headline}" for _, identity, headline, _ in rows[name]["failures"])
            yield f"| {case.row} | {red or 'none'} |"


def main() -> None:
    """Judge what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="beginnings of checkpoints' names; all where there is none")
    parser.add_argument("--cache", type=Path, default=Path("build/field"), help="the drafted suites and field.jsonl")
    parser.add_argument("--again", action="store_true", help="judge the named ones again")
    parser.add_argument("--keep", action="store_true", help="keep each checkpoint, its run and its report in the cache")
    options = parser.parse_args()
    cache = options.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    file = cache / "field.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = {row["name"]: row for row in map(json.loads, lines)}
    for name, case in (CASES | HEALTHY).items():
        if not name.startswith(tuple(options.names or [""])) or (name in rows and not options.again):
            continue
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            work = cache / "kept" / name if options.keep else Path(folder) / name
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            rows[name] = {"name": name, **judged(case, cache, work)}
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(rows[name]) + "\n")
        print(
            f"{name}: {grade(case, rows[name]) if case.place else rows[name]['failures'] or 'green'}", file=sys.stderr
        )
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
