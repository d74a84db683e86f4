"""What 20,000 weight sites cost: `python benchmarks/experts.py`.

A random Qwen3-MoE of 52 blocks with 128 experts of three layers each, which are small, so that what is measured is the
cost of a site and not of its numbers: the capture, the series of an assertion, and the capture's file.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import arguments
from torch import nn

from pytest_qsa import Capture, capture
from pytest_qsa.captures import Site

PATTERN = r"_proj$|\.gate$"


def mixture(seed: int) -> nn.Module:
    """Return a mixture of experts whose weights are random."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    counts = {"num_hidden_layers": 52, "num_experts": 128, "num_experts_per_tok": 8}
    config: Any = Qwen3MoeConfig
    return Qwen3MoeForCausalLM(config(**sizes, **heads, **counts, tie_word_embeddings=False))


@contextmanager
def timed(what: str) -> Iterator[Callable[[str], None]]:
    """Print the seconds of a CPU that something takes, and by how much the peak of the memory grows."""
    details: list[str] = []
    peak, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    yield details.append
    seconds = time.process_time() - began
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1e3
    print(f"{what:<28}{seconds:6.2f} s  peak +{more:.0f} MB  {' '.join(details)}", flush=True)


def main() -> None:
    """Measure a metric of weights, one against a reference, and the local error."""
    options = arguments(__doc__ or "")
    model, reference = mixture(0), mixture(1)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 64, (1, options.seq_len), generator=generator) for _ in range(options.samples)]
    for metric in ("rms", "magnitude", "weight_sqnr", "local_sqnr"):
        site: Site = "output" if metric == "local_sqnr" else "weight"
        other = reference if metric.endswith("_sqnr") else None
        with timed(f"{metric}: pass"):
            found = capture(model, batches, sites=[(PATTERN, site)], statistics=[metric], reference=other)
        with timed(f"{metric}: series") as detail:
            positions = {"positions": "all"} if site == "output" else {}
            detail(f"{len(getattr(found.select(PATTERN, site), metric)(**positions).layers):,} layers")
        with timed(f"{metric}: file") as detail:
            content = found.to_bytes()
            detail(f"{len(content) / 1e6:.0f} MB")
        with timed(f"{metric}: file read"):
            Capture.from_bytes(content)


if __name__ == "__main__":
    main()
