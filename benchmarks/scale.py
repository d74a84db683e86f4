"""What the plan of very many modules costs: `python benchmarks/scale.py`.

`--qsa-plan` of a suite on a random Qwen3-MoE of 10,088 layers, against that of one block of it: the processor seconds
of the whole process, in which torch and transformers are imported.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
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


def main() -> None:
    """Print what both plans take."""
    few, many = planned(1, 2), planned(26, 128)
    print(f"plan of 10,088 layers: {many:.1f} s, of one block {few:.1f} s: {many - few:+.1f} s")


if __name__ == "__main__":
    main()
