"""What a gate takes on a machine that other programs keep busy: `python benchmarks/busy.py --busy 0 2 6`.

A gate on SmolLM2 (2 × 512 tokens, bfloat16, nothing cached) is a process of its own. Its wall time beside b processes
that only compute, ÷ the time that its share of the cores allows: the processor's seconds of the same gate on one
thread ÷ min(1, cores / (b + 1)). A third column has it with torch's own number of threads (OMP_NUM_THREADS = cores).
Other work of the machine counts as busy processes as well, so that the figures are right on a quiet machine only;
`--others N` tells how many more there are.

`--forwards` prints one forward of 512 tokens on one thread and on all instead, and whether their bits are equal.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common import SMOLLM2, usual_suite

SPIN = "while True: pass"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Keep so many cores busy meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def gate(suite: Path, threads: int | None) -> tuple[float, float]:
    """Run a gate; return the seconds by the clock and by the processor. `threads`: None lets the gate choose."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    words = [sys.executable, "-m", "pytest", "-q", str(suite), "--qsa-no-cache", "--qsa-report=never", "--qsa-jobs=99"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(words, env=environment, check=True, capture_output=True)
    taken, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return taken, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def print_forwards(repeats: int) -> None:
    """Print a forward's medians on one thread and on all cores, and whether the bits of all hidden states are equal."""
    import torch
    from common import smollm2, token_batches
    from pair import smollm2_int8

    models = {"bfloat16": smollm2(), "float32": smollm2(torch.float32), "int8": smollm2_int8()}
    [batch], cores = token_batches(1, 512), torch.get_num_threads()
    print("| SmolLM2 | one thread | processor | all threads | processor | bits |\n|---|---|---|---|---|---|")
    for name, model in models.items():
        states, cells = [], []
        for threads in (1, cores):
            torch.set_num_threads(threads)
            times = []
            with torch.no_grad():
                model(batch)
                for _ in range(repeats):
                    began, used = time.perf_counter(), time.process_time()
                    found = model(batch, output_hidden_states=True, use_cache=False)
                    times.append((time.perf_counter() - began, time.process_time() - used))
            states.append([found.logits, *found.hidden_states])
            cells += [f"{statistics.median(each):.2f}" for each in zip(*times, strict=True)]
        equal = all(torch.equal(one, other) for one, other in zip(*states, strict=True))
        print(f"| {name} | {' | '.join(cells)} | {'equal' if equal else 'other'} |", flush=True)


def main() -> None:
    """Print a row for each number of busy processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2, 6])
    parser.add_argument("--others", type=float, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--forwards", action="store_true", help="forwards instead of gates")
    options = parser.parse_args()
    if options.forwards:
        return print_forwards(options.repeats)
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder, "a.qsa.yaml")
        suite.write_text(usual_suite(SMOLLM2, 2, 512), encoding="utf-8")
        print("| busy | seconds | of the processor, one thread | wall ÷ share | the same with torch's threads |")
        print("|---|---|---|---|---|")
        for count in options.busy:
            with busy(count):
                share = min(1.0, cores / (count + options.others + 1))
                chosen = [gate(suite, None)[0] for _ in range(options.repeats)]
                one = statistics.median(gate(suite, 1)[1] for _ in range(options.repeats))
                torchs = statistics.median(gate(suite, cores)[0] for _ in range(options.repeats))
            taken = statistics.median(chosen)
            ratios = f"{taken / one * share:.2f} | {torchs / one * share:.2f}"
            print(f"| {count} | {taken:.1f} | {one:.1f} | {ratios} |", flush=True)
    return None


if __name__ == "__main__":
    main()
