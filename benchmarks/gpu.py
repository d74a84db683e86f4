"""What a capture costs on CUDA beside the bare forward of the same modules: `python benchmarks/gpu.py`.

Random models, so that no checkpoint is needed: the wide Llama of the other benchmarks, and eight layers of the shape of
an 8B one. Each case is run in turns with the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, medians, random_llama, wide_llama
from overhead import EVERY, USUAL, bare
from torch import Tensor, nn

from pytest_qsa import capture

PAIR: dict[str, Any] = {
    "sites": [(r"layers\.", "output"), ("", "logits")],
    "statistics": [("sqnr", {"positions": "all"}), "kl_divergence"],
}


def eight_b_layers() -> nn.Module:
    """Make eight layers of the shape of a Llama of 8B parameters, random, in bfloat16."""
    with torch.device("cuda"):
        return random_llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=8, num_attention_heads=32)


def awaited(run: Callable[[], object]) -> Callable[[], None]:
    """Wait for the device after each run."""

    def waiting() -> None:
        run()
        torch.cuda.synchronize()

    return waiting


def measure(name: str, model: nn.Module, batches: list[Tensor], repeats: int) -> None:
    """Print the ratios for one model."""
    model.config.use_cache = False  # type: ignore[union-attr]
    trunk: nn.Module = model.model  # type: ignore[assignment]
    other = copy.deepcopy(model)
    cases: dict[str, Callable[[], object]] = {
        "trunk": bare(trunk, batches),
        "usual suite": lambda: capture(trunk, batches, **USUAL),
        "every site": lambda: capture(trunk, batches, **EVERY),
        "two models": lambda: (bare(model, batches)(), bare(other, batches)()),
        "pair": lambda: capture(other, batches, reference=model, **PAIR),
    }
    taken = medians({case: awaited(run) for case, run in cases.items()}, repeats)
    print(f"{name:<14} bare trunk {1e3 * taken['trunk']:.1f} ms, of two models {1e3 * taken['two models']:.1f} ms")
    for case, base in (("usual suite", "trunk"), ("every site", "trunk"), ("pair", "two models")):
        print(f"{name:<14} {case:<12} ÷ bare {base}: {taken[case] / taken[base]:.3f}", flush=True)


def main() -> None:
    """Measure both models."""
    options = arguments(__doc__ or "")
    print(torch.cuda.get_device_name(), torch.__version__)
    torch.manual_seed(0)
    batches = [torch.randint(0, 32000, (1, options.seq_len), device="cuda") for _ in range(options.samples)]
    measure("Llama 2048×4", wide_llama().to("cuda"), batches, options.repeats)
    long = [torch.cat([batch] * (2048 // options.seq_len), dim=1) for batch in batches]
    measure("Llama 4096×8", eight_b_layers(), long, options.repeats)


if __name__ == "__main__":
    main()
