"""What the pass holds beside the model: peak resident memory of a capture against that of the bare forward.

`python benchmarks/memory.py`: SmolLM2 and a random Llama of hidden 2048, every site, all statistics; each in a process
of its own. The growth is that of resident memory from the 9th to the 32nd sample, a token and distinct tensor.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from common import smollm2, token_batches, wide_llama

from pytest_qsa import capture

MODELS = {"SmolLM2": smollm2, "Llama 2048": wide_llama}
SITES = [(".", "input"), (".", "output")]
FEW, MANY, LENGTH = 8, 32, 512


def main() -> None:
    """Print peaks, ratios and growth, or run one case where it is named on the command line."""
    if len(sys.argv) > 1:
        print(json.dumps(run(sys.argv[1], sys.argv[2])))
        return
    for name in MODELS:
        bare, held = one(name, "bare"), one(name, "capture")
        grown = (held["end"] - held["few"]) * 2**20 / ((MANY - FEW) * LENGTH * held["streams"])
        print(
            f"{name}: bare forward {bare['peak']:.0f} MB, capture {held['peak']:.0f} MB: "
            f"{held['peak'] / bare['peak'] - 1:+.1%}; {grown:.1f} bytes more a token and distinct tensor"
        )


def run(name: str, case: str) -> dict[str, float]:
    """Run one case; return this process's peak in MB, what it held after FEW and MANY samples, the distinct tensors."""
    model, windows = MODELS[name](), token_batches(FEW, LENGTH)
    batches = [windows[index % FEW].roll(index // FEW) % 32000 for index in range(MANY)]
    capture(model, batches[:1], sites=[("down_proj", "input")])  # what is compiled and imported once
    held = {}

    def told(samples: int, _: int) -> None:
        held[samples] = resident("VmRSS")

    if case == "bare":
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
        return {"peak": resident("VmHWM")}
    found = capture(model, batches, sites=SITES, progress=told)  # type: ignore[arg-type]
    streams = len({id(numbers) for numbers in found.sites.values()})
    return {"peak": resident("VmHWM"), "few": held[FEW], "end": held[MANY], "streams": streams}


def resident(which: str) -> float:
    """Return what this process holds in memory, MB; `ru_maxrss` would begin with that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(status.partition(f"{which}:")[2].split()[0]) / 1024


def one(name: str, case: str) -> dict[str, float]:
    """Run a case in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name, case], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
