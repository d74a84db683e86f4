"""What very many modules, and very many samples, cost.

`python benchmarks/scale.py`: `--qsa-plan` of a suite on a random Qwen3-MoE of 10,088 layers, against that of one block
of it: the processor seconds of the whole process, in which torch and transformers are imported.

`python benchmarks/scale.py --samples 10000 --seq-len 32`: the usual suite on a random Llama (hidden 512, four blocks,
bfloat16), against its forward in the same process, in turns; and how far the process's memory grows, with the
capture's file. `--batch`: samples of one forward, as `data.batch_size`. `--model DIR`: another model.
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
from pathlib import Path
from typing import Any

SUITE = """
model: {{path: {path}}}
data: {{source: sample, num_samples: 2, seq_len: 32}}
assertions:
  - {{id: weights, metric: rms, site: weight, layers: '_proj$', max: 100}}
  - {{id: outputs, metric: absmax, site: output, layers: '_proj$', max: 100000}}
"""


def mixture(folder: Path, blocks: int, experts: int) -> None:
    """Save a random mixture of experts, whose sizes are as small as can be."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    counts = {"num_hidden_layers": blocks, "num_experts": experts, "num_experts_per_tok": min(8, experts)}
    config: Any = Qwen3MoeConfig
    Qwen3MoeForCausalLM(config(**sizes, **counts, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(folder)


def planned(blocks: int, experts: int) -> float:
    """Return the processor seconds of a process that plans a suite on such a mixture."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mixture(folder / "model", blocks, experts)
        (folder / "scale.qsa.yaml").write_text(SUITE.format(path=folder / "model"))
        words = ["pytest", "-q", "-p", "pytest_qsa.plugin", "-p", "syrupy", "--qsa-plan", "scale.qsa.yaml"]
        environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def many_samples(samples: int, length: int, batch: int, folder: str, repeats: int) -> None:
    """Print what a pass over many short samples costs beside their forward, and how far memory grows."""
    import torch
    from common import in_turns, random_llama
    from growth import USUAL
    from transformers import AutoModelForCausalLM

    from pytest_qsa.engine.run.run_pass import run_pass

    small: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4}
    load = AutoModelForCausalLM.from_pretrained
    model: Any = load(folder, dtype=torch.bfloat16) if folder else random_llama(num_attention_heads=8, **small)
    windows = torch.randint(0, model.config.vocab_size, (samples, length))
    batches = list(torch.split(windows, batch))
    run_pass(model, batches[:2], USUAL)  # compiles the kernels
    before, grown = _peak(anew=True), []

    def forward() -> None:
        with torch.inference_mode():
            for each in batches:
                model.model(each)

    def usual() -> None:
        with tempfile.TemporaryDirectory() as name:
            run_pass(model, batches, USUAL).save(Path(name) / "many.qsa")
            grown.append(_peak() - before)

    usual()
    times = in_turns({"forward": forward, "usual": usual}, repeats, time.process_time)
    alone, suite = (statistics.median(times[name]) for name in ("forward", "usual"))
    print(f"{samples} × {length} tokens, {batch} a forward: {alone:.1f} s; the usual suite {suite / alone:.3f} × that")
    print(f"memory grows by {grown[0] / 1e6:.0f} MB, with the capture's file")


def _peak(*, anew: bool = False) -> int:
    """Return the most bytes that were resident since the last call with `anew`, as Linux counts them."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    """Print what both plans take, or what the samples do."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--seq-len", type=int, default=32)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--model", default="")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.samples:
        many_samples(options.samples, options.seq_len, options.batch, options.model, options.repeats)
        return
    few, many = planned(1, 2), planned(26, 128)
    print(f"plan of 10,088 layers: {many:.1f} s, of one block {few:.1f} s: {many - few:+.1f} s")


if __name__ == "__main__":
    main()
