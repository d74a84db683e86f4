"""Whether a pass has become dearer than the committed table says: `make bench-check`, or `python benchmarks/check.py`.

Each ratio is of the processor's seconds on one thread, measured in turns, the median of the ratios of each turn. So
other work of the machine lengthens both sides alike. One that is more than 5 % above the table, and above the largest
of its turns as well, fails. `--write` makes the table anew (benchmarks/table.json), on an idle machine. It takes about
four minutes there; `overhead.py` and `pair.py` measure more models, by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import overhead
import pair
import torch
from common import in_turns, smollm2, token_batches, wide_llama

TABLE = Path(__file__).with_name("table.json")
WORSE = 1.05
Cases = Mapping[str, Callable[[], object]]
OVERHEAD = {
    f"{case} ÷ {base}": (f"{base}, {case}", (base,))
    for base in ("trunk", "whole")
    for case in ("usual suite", "every site")
}
WIDE = {name: case for name, case in OVERHEAD.items() if name.endswith("trunk")}
PAIR = {"every site and KL ÷ both forwards": ("propagated", ("model", "reference")),
        "with local error ÷ both forwards": ("local", ("model", "reference"))}  # fmt: skip
KEPT = {"recorded reference ÷ forward, head and softmax": ("kept", ("model", "head and softmax"))}
"""The name of a ratio → its case, and those that it is held against, together."""


def measured(repeats: int, samples: int) -> Iterator[tuple[str, list[float]]]:
    """Yield the name of each ratio, and its values in the turns."""
    batches = token_batches(samples, 512)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        yield from _ratios(f"SmolLM2 {name}", overhead.cases_of(smollm2(dtype), batches), OVERHEAD, repeats)
    ids = [batch[:, :256] % 32000 for batch in batches]
    yield from _ratios("Llama 2048 bfloat16", overhead.cases_of(wide_llama(), ids), WIDE, repeats)
    model, reference = pair.smollm2_int8(), smollm2()
    yield from _ratios("SmolLM2 int8", pair.cases_of(model, reference, batches), PAIR, repeats)
    with tempfile.TemporaryDirectory() as folder:
        yield from _ratios("SmolLM2 int8", pair.kept_cases(model, reference, batches, Path(folder)), KEPT, repeats)


def _ratios(
    model: str, cases: Cases, wanted: Mapping[str, tuple[str, tuple[str, ...]]], repeats: int
) -> Iterator[tuple[str, list[float]]]:
    used = {name for case, bases in wanted.values() for name in (case, *bases)}
    times = in_turns({name: cases[name] for name in cases if name in used}, repeats, time.process_time)
    for name, (case, bases) in wanted.items():
        bare = [sum(parts) for parts in zip(*(times[base] for base in bases), strict=True)]
        yield f"{model}: {name}", [each / one for each, one in zip(times[case], bare, strict=True)]


def processor() -> str:
    """Return what computes here; ratios of other processors are others."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    """Print the table; return 1 where a ratio has worsened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write the table")
    options = parser.parse_args()
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"ratios": {}}
    if table.get("processor", processor()) != processor():
        print(f"the table is of another processor, {table['processor']}: only --write says something here")
    found, worse = {}, []
    print("| ratio | now | turns | table | |\n|---|---|---|---|---|")
    for name, turns in measured(options.repeats, options.samples):
        now, known = statistics.median(turns), table["ratios"].get(name)
        found[name] = [round(value, 3) for value in (now, min(turns), max(turns))]
        out = known is not None and now > max(known[0] * WORSE, known[2])
        worse += [name] * out
        verdict = "worse" if out else "" if known is not None else "new"
        least, most = found[name][1:]
        print(
            f"| {name} | {now:.3f} | {least:.3f} to {most:.3f} | {known[0] if known else ''} | {verdict} |", flush=True
        )
    if options.write:
        TABLE.write_text(json.dumps({"processor": processor(), "ratios": found}, indent=1) + "\n", encoding="utf-8")
    return int(bool(worse) and not options.write)


if __name__ == "__main__":
    raise SystemExit(main())
