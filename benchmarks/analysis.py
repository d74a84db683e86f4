"""What an analysis with everything enabled takes from command to report: `python benchmarks/analysis.py`.

The goal is 1.6 × the bare forward of the same samples + 12 s. The program runs as a user starts it; the bare forward is
the trunk's, timed in a process of its own between two runs of the program: what else the machine does meets both.
Of each, wall time and CPU time: on a machine that is not idle only the latter says much.
"""

from __future__ import annotations

import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import SMOLLM2, arguments

SECTIONS = (
    "magnitude_input", "magnitude_output", "magnitude_weight", "outlier_layer_wise", "outlier_position",
    "outlier_token", "heatmap_3d", "distribution", "percentile_range",
)  # fmt: skip
BARE = """
import sys, time, torch
sys.path.insert(0, {here!r})
from common import smollm2, token_batches
trunk, batches = smollm2().model, token_batches({samples}, {length})
with torch.inference_mode():
    trunk(batches[0])
    started, used = time.perf_counter(), time.process_time()
    for batch in batches:
        trunk(batch)
print(time.perf_counter() - started, time.process_time() - used)
"""


def main() -> None:
    """Print both times, their ratio to the goal, and the slowest pictures."""
    options = arguments(__doc__ or "", repeats=3)
    bare, whole = [], []
    pictures: dict[str, list[float]] = {}
    for _ in range(options.repeats):
        bare.append(_bare(options.samples, options.seq_len))
        taken, told = _analysis(options.samples, options.seq_len)
        whole.append(taken)
        for name, seconds in re.findall(r"^(\S+): ([\d.]+) s$", told, flags=re.MULTILINE):
            pictures.setdefault(name, []).append(float(seconds))
    for index, kind in enumerate(("wall", "CPU")):
        forward, run = (statistics.median(each[index] for each in times) for times in (bare, whole))
        print(f"{kind}: bare forward {forward:.1f} s, analysis {run:.1f} s, goal {1.6 * forward + 12:.1f} s")
    slowest = sorted(pictures, key=lambda name: -statistics.median(pictures[name]))[:3]
    print("slowest pictures: " + ", ".join(f"{name} {statistics.median(pictures[name]):.2f} s" for name in slowest))


def _bare(samples: int, length: int) -> tuple[float, float]:
    code = BARE.format(here=str(Path(__file__).parent), samples=samples, length=length)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    wall, cpu = map(float, done.stdout.split()[-2:])
    return wall, cpu


def _analysis(samples: int, length: int) -> tuple[tuple[float, float], str]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "all.yaml"
        enabled = "\n".join(f"    {name}: true" for name in SECTIONS)
        config.write_text(
            f"model: {{path: {SMOLLM2}}}\n"
            f"data: {{source: sample, num_samples: {samples}, seq_len: {length}}}\n"
            f"visualization:\n  output: {{formats: [png, html, csv, json]}}\n  enabled:\n{enabled}\n"
        )
        return _timed(
            [sys.executable, "-m", "pytest_qsa", "analyze", "--config", str(config), "--qsa-no-cache", "--verbose"]
        )


def _timed(words: Sequence[str]) -> tuple[tuple[float, float], str]:
    before, started = _children(), time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return (time.perf_counter() - started, _children() - before), done.stdout


def _children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
