"""What the benchmarks share: the models, the tokens, and ratios of medians measured in turns within one run."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
SMOLLM2 = ROOT / ".demo" / "smollm2"


def usual_suite(path: Path | str, samples: int, length: int) -> str:
    """Return a suite of what most gates ask for, whose bounds hold whatever is measured."""
    return f"""
model: {{name: m, path: {path}}}
data: {{num_samples: {samples}, seq_len: {length}}}
assertions:
  - {{id: outliers, metric: outlier_tokens, layers: 'layers\\.\\d+$', site: output, max: 9999}}
  - {{id: drift, metric: magnitude, stat: median, layers: (o|up|down)_proj$, site: input, max: 9999}}
"""


def arguments(description: str, repeats: int = 5) -> argparse.Namespace:
    """Read the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    return parser.parse_args()


def smollm2(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Load SmolLM2-135M, which `make demo` or `example_suites/checkpoints.py fetch --into .demo` puts there."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model: nn.Module = AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=dtype)
    return model


def wide_llama(dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Make a random Llama of hidden 2048 with 4 layers."""
    return random_llama(dtype, hidden_size=2048, intermediate_size=5632, num_hidden_layers=4, num_attention_heads=16)


def random_llama(dtype: torch.dtype = torch.bfloat16, **shape: Any) -> nn.Module:
    """Make a random Llama of a shape, on torch's default device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model: nn.Module = LlamaForCausalLM(LlamaConfig(**{"num_key_value_heads": 8, "vocab_size": 32000, **shape}))
    return model.to(dtype).eval()


def token_batches(samples: int, length: int) -> list[Tensor]:
    """Return windows of SmolLM2's own tokens of the shipped text, [1, length] each."""
    from transformers import AutoTokenizer

    text = resources.files("pytest_qsa.suite.data").joinpath("sample.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(SMOLLM2)(text, verbose=False)["input_ids"]
    return [torch.tensor(ids[i * length : (i + 1) * length])[None] for i in range(samples)]


def in_turns(
    cases: Mapping[str, Callable[[], Any]], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Run the cases in turns, so that what else the machine does meets all of them, and return their seconds."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for case in cases.values():
        case()
    for _ in range(repeats):
        for name, case in cases.items():
            start = clock()
            case()
            times[name].append(clock() - start)
    return times


def medians(cases: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Run the cases in turns and return their median seconds by the clock."""
    return {name: statistics.median(taken) for name, taken in in_turns(cases, repeats).items()}
