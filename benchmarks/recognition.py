"""How long it takes to recognize what the weights of a checkpoint are in their reference.

Copies of SmolLM2 in int8 with one fault each, made by `field_cases.py`: seconds by the clock and of processors until
the suspicion is known, of all 210 layers, from files that are in the page cache.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from field_cases import CASES

from pytest_qsa.checkpoint import Files, open_folder, suspicions_of

FAULTS = (
    "stage_repeated",
    "interleaved_rows",
    "rows_of_another_count_of_heads",
    "gate_and_up_exchanged",
    "every_weight_doubled",
    "kv_heads_rolled",
)


def measured(model: Path, reference: Path) -> tuple[float, float, str]:
    """Return the seconds by the clock and of processors, and the first suspicion."""
    files = Files(open_folder(model), open_folder(reference))
    clock, processors = time.perf_counter(), time.process_time()
    found = suspicions_of(files, files.folder.layers)
    return time.perf_counter() - clock, time.process_time() - processors, found[0].what


def main() -> None:
    """Print a row for each fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=3, help="medians of so many runs, after one that isn't counted")
    options = parser.parse_args()
    print("| fault | by the clock, s | of processors, s | recognized as |\n|---|---|---|---|")
    for name in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            pair = CASES[name].make(Path(folder))
            runs = [measured(pair.model, pair.reference) for _ in range(options.repeats + 1)][1:]
            clock, processors = statistics.median(run[0] for run in runs), statistics.median(run[1] for run in runs)
            print(f"| {name.replace('_', ' ')} | {clock:.2f} | {processors:.2f} | {runs[0][2]} |", flush=True)


if __name__ == "__main__":
    main()
