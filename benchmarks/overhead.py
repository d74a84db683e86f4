"""What a capture costs beside the bare forward of the same modules: `python benchmarks/overhead.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import arguments, medians, smollm2, token_batches, wide_llama
from torch import Tensor, nn

from pytest_qsa import capture

BLOCKS, LINEARS = r"layers\.\d+$", r"(q|o|up|down)_proj$"
USUAL: dict[str, Any] = {
    "sites": [(BLOCKS, "output"), (LINEARS, "input"), (LINEARS, "output")],
    "statistics": ["outlier_tokens", ("magnitude", {"reduce_dim": -1})],
}
EVERY: dict[str, Any] = {
    "sites": [(r"layers\.", "input"), (r"layers\.", "output")],
    "statistics": ["outlier_tokens", ("quantile", {"signed": False})],
}


def bare(model: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    """Return the forward without any hook."""

    def run() -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch)

    return run


def cases_of(model: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the forwards of a model and of its trunk, and what is captured of both."""
    model.config.use_cache = False  # type: ignore[union-attr]
    trunk: nn.Module = model.model  # type: ignore[assignment]
    return {
        "trunk": bare(trunk, batches),
        "trunk, usual suite": lambda: capture(trunk, batches, **USUAL),
        "trunk, every site": lambda: capture(trunk, batches, **EVERY),
        "whole": bare(model, batches),
        "whole, usual suite": lambda: capture(model, batches, **USUAL),
        "whole, every site": lambda: capture(model, batches, **EVERY),
    }


def measure(name: str, model: nn.Module, batches: list[Tensor], repeats: int) -> None:
    """Print the ratios for one model: against its trunk, and against the whole of it."""
    taken = medians(cases_of(model, batches), repeats)
    for base in ("trunk", "whole"):
        for case in ("usual suite", "every site"):
            print(f"{name:<22} {case:<12} ÷ bare {base}: {taken[f'{base}, {case}'] / taken[base]:.3f}", flush=True)


def main() -> None:
    """Measure SmolLM2 (hidden 576: little arithmetic for each element) and a wide Llama, in both dtypes."""
    options = arguments(__doc__ or "")
    batches = token_batches(options.samples, options.seq_len)
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        measure(f"SmolLM2-135M {name}", smollm2(dtype), batches, options.repeats)
        measure(f"Llama 2048×4 {name}", wide_llama(dtype), [batch % 32000 for batch in batches], options.repeats)


if __name__ == "__main__":
    main()
