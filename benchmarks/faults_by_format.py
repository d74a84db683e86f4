"""Mutation testing by format: every fault in each format that can hold it, and whether it is caught with its layer.

A small random model is put into each format of `FORMATS` (by `format_makers.py`), and `qsa init` writes its suite
against the original: of its files and weights, in four formats of a pass too. `qsa selftest` then puts every fault into
it at default strength. A line of JSON a fault is appended to the file, so that a later start goes on where an earlier
one ended.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from format_makers import RECIPES
from formats import Checkpoint, made
from platformdirs import user_cache_path

from pytest_qsa.checkpoint import open_folder
from pytest_qsa.common import QsaError
from pytest_qsa.suite import load_suite
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.run import Outcome, Selftest, makes_a_pass, perplexity_suite

PASSES = ("ct W8A8", "ct W4A16", "ct FP8_BLOCK", "ct NVFP4")
"""The formats whose suites run the model too."""
FORMATS = (
    *PASSES, "ct FP8 + kv", "gptq v2", "gptq asym", "awq gemm", "gguf Q8_0", "gguf Q4_0", "bnb int8", "bnb nf4",
    "ct W4A16 of experts",
)  # fmt: skip
GGUF_SUITE = """\
model: {{path: {path}, gguf_file: {file}, reference: {reference}, weights: files}}
assertions:
  - {{id: scales, metric: checkpoint_scales, max: 0}}
  - {{id: weights, metric: checkpoint_weights, max: 0}}
  - {{id: keys, metric: checkpoint_keys, max: 0}}
  - {{id: weights-close, metric: weight_sqnr, layers: '{matrices}', baseline: {{rel: 0.02}}}}
  - {{id: rows-close, metric: weight_sqnr, by: channel, layers: '{matrices}', baseline: {{rel: 0.02}}}}
  - {{id: groups-keep-their-size, metric: weight_gain, stat: room, layers: '{matrices}', max: 1}}
  - {{id: norms, metric: rms, layers: 'norm$', site: weight, baseline: {{rel: 0.01}}}}
"""
"""`qsa init` names the layers of a GGUF file as the model does, which a suite of its files alone can't."""
MATRICES = r"\.(attn_[qkv]|attn_output|ffn_(gate|up|down))$|^token_embd$"
DATA = ("--data.num_samples", "4", "--data.seq_len", "128")


def checkpoint_in(name: str, cache: Path) -> Checkpoint:
    """Make a checkpoint in a format, unless the cache has it.

    Raises:
        QsaError: it can't be made here.
    """
    recipe = RECIPES[name]
    return made(replace(recipe, source="settled") if recipe.source == "llama" else recipe, cache, small=False)


def suite_of(name: str, checkpoint: Checkpoint, folder: Path) -> Path:
    """Let `qsa init` write the suite of a checkpoint, and make its baselines."""
    suite = folder / f"{name.replace(' ', '_')}.qsa.yaml"
    if suite.exists():
        return suite
    gguf = next((file.name for file in checkpoint.folder.glob("*.gguf")), None)
    if gguf:
        text = GGUF_SUITE.format(path=checkpoint.folder, file=gguf, reference=checkpoint.original, matrices=MATRICES)
        suite.write_text(text, encoding="utf-8")
    else:
        _init(name, checkpoint, suite)
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", suite, "--snapshot-update", "--qsa-report=never"]
    subprocess.run([sys.executable, *map(str, pytest)], check=True)
    return suite


def _init(name: str, checkpoint: Checkpoint, suite: Path) -> None:
    of_files = () if name in PASSES else ("--model.weights", "files")
    command = ["-m", "pytest_qsa", "init", checkpoint.folder, "--reference", checkpoint.original, "-o", suite]
    options = [*of_files, *(DATA if name in PASSES else ())]
    subprocess.run([sys.executable, *map(str, [*command, *options])], check=True)


def outcomes(name: str, suite: Path, checkpoint: Checkpoint, known: set[str]) -> Iterator[Outcome]:
    """Yield what became of each fault that isn't known yet."""
    file = load_suite(suite)
    gguf = file.suite.model.gguf_file if file.suite.model else None
    perplexity = perplexity_suite(file) if name in PASSES and makes_a_pass(file) else ""
    folder = open_folder(checkpoint.folder, gguf_file=gguf)
    test = Selftest(suite, folder, allowed=file.boundary.allowed, bisect="none", perplexity=perplexity)
    left = [fault for fault in FAULTS.values() if fault.name not in known]
    if left:
        yield from test.run(left, lambda text: print(f"… {name}: {text}", file=sys.stderr, flush=True))


def line_of(name: str, outcome: Outcome) -> dict[str, Any]:
    """Return what is kept of an outcome."""
    return {
        "format": name,
        "fault": outcome.fault,
        "layer": outcome.layer,
        "skipped": outcome.skipped,
        "caught": [catch.test for catch in outcome.caught],
        "named": outcome.named,
        "perplexity": outcome.perplexity.caught if outcome.perplexity else None,
    }


def table(rows: list[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the table in Markdown: a row a fault, a column a format, and the shares below."""
    formats = [name for name in FORMATS if any(row["format"] == name for row in rows)]
    found = {(row["format"], row["fault"]): row for row in rows}
    yield f"| fault | {' | '.join(formats)} |"
    yield "|---" * (1 + len(formats)) + "|"
    for fault in FAULTS:
        cells = [_cell(found.get((name, fault))) for name in formats]
        if any(cells):
            yield f"| `{fault}` | {' | '.join(cells)} |"
    of = {name: [row for row in rows if row["format"] == name and not row["skipped"]] for name in formats}
    shares = [f"{sum(bool(row['caught']) for row in of[name])} of {len(of[name])}" for name in formats]
    yield f"| **caught** | {' | '.join(shares)} |"
    gates = [[row["perplexity"] for row in of[name] if row["perplexity"] is not None] for name in formats]
    yield f"| perplexity alone | {' | '.join(f'{sum(each)} of {len(each)}' if each else '' for each in gates)} |"


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None or row["skipped"]:
        return ""
    return ("yes" if row["named"] else "not named") if row["caught"] else "**no**"


def main() -> None:
    """Make what is missing, try the faults that are left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", choices=[[], *FORMATS], metavar="FORMAT", help="of FORMATS; all for none")
    parser.add_argument("--folder", type=Path, default=user_cache_path("pytest-qsa") / "faults")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / ".git").mkdir(exist_ok=True)  # the root of what a suite may read: the originals lie beside it
    file = options.folder / "faults.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for name in options.names or FORMATS:
        try:
            checkpoint = checkpoint_in(name, options.folder)
            suite = suite_of(name, checkpoint, options.folder)
            known = {row["fault"] for row in rows if row["format"] == name}
            for outcome in outcomes(name, suite, checkpoint, known):
                rows.append(line_of(name, outcome))
                with file.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
        except (QsaError, subprocess.CalledProcessError) as error:
            print(f"{name}: {error}", file=sys.stderr, flush=True)
    print(*table(rows), sep="\n")


if __name__ == "__main__":
    main()
