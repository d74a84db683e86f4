"""What the pass holds beside the model: peak resident memory of a capture against that of the bare forward.

`python benchmarks/memory.py`: SmolLM2 and a random Llama of hidden 2048, every site, all statistics; each in a process
of its own. The growth with the data is measured between 8 samples and 16.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from common import smollm2, token_batches, wide_llama

from pytest_qsa import capture

MODELS = {"SmolLM2": smollm2, "Llama 2048": wide_llama}
SITES = [(".", "input"), (".", "output")]


def main() -> None:
    """Print peaks and ratios, or run one case where it is named on the command line."""
    if len(sys.argv) > 1:
        run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
        return
    for name in MODELS:
        bare, few, many = (peak(name, *case) for case in (("bare", 8), ("capture", 8), ("capture", 16)))
        print(
            f"{name}: bare forward {bare:.0f} MB, capture {few:.0f} MB: {few / bare - 1:+.1%}; "
            f"8 samples more: {many - few:+.1f} MB"
        )


def run(name: str, case: str, samples: int) -> None:
    """Run one case and print this process's peak in MB, and the distinct token streams."""
    model, batches = MODELS[name](), [batch % 32000 for batch in token_batches(samples, 512)]
    capture(model, batches[:1], sites=[("down_proj", "input")])  # what is compiled and imported once
    if case == "capture":
        capture(model, batches, sites=SITES)  # type: ignore[arg-type]
    else:
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)
    status = Path("/proc/self/status").read_text(encoding="utf-8")  # `ru_maxrss` would begin with that of the parent
    print(float(status.partition("VmHWM:")[2].split()[0]) / 1024)


def peak(name: str, case: str, samples: int) -> float:
    """Return the peak of a case in a process of its own, MB."""
    done = subprocess.run(
        [sys.executable, __file__, name, case, str(samples)], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    main()
