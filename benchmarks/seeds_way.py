"""The seed's default analysis done the seed's way, a forward for each pattern and statistic, against one capture.

`python benchmarks/seeds_way.py`. Counts and magnitudes of both are compared as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from common import arguments, medians, smollm2, token_batches
from torch import Tensor, nn

from pytest_qsa import capture
from pytest_qsa.captures import SITES, Site

MAGNITUDES = [r"mlp\.down_proj", r"mlp\.up_proj", r"self_attn\.q_proj", r"self_attn\.o_proj"]
BLOCKS = r"layers\.\d+$"


def with_hooks(
    model: nn.Module, batches: list[Tensor], pattern: str, site: str, statistic: Callable[[Tensor], Tensor]
) -> dict[str, list[Tensor]]:
    """Run the whole data set with hooks at one pattern that keep every activation on the CPU, as the seed does."""
    import re

    layers = {name: module for name, module in model.named_modules() if re.search(pattern, name)}
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for batch in batches:
        kept: dict[str, Tensor] = {}

        def keep(name: str, kept: dict[str, Tensor] = kept) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
                value = args[0] if site == "input" else output if isinstance(output, Tensor) else output[0]
                kept[name] = value.detach().cpu().clone()

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in layers.items()]
        with torch.no_grad():
            model(batch)
        for handle in handles:
            handle.remove()
        for name, value in kept.items():
            found[name].append(statistic(value))
    return found


def top_and_median(x: Tensor) -> Tensor:
    """Return the seed's five rows of a layer: top1, top2, top3, median, min of the token-wise maxima."""
    maxima = x.float().abs().amax(dim=-1).flatten().sort(descending=True).values
    return torch.stack([maxima[0], maxima[1], maxima[2], maxima.median(), maxima[-1]])


def outlier_count(x: Tensor) -> Tensor:
    """Return the number of tokens above 64 × the median."""
    maxima = x.float().abs().amax(dim=-1).flatten()
    return (maxima / maxima.median() > 64).sum()


def main() -> None:
    """Time both, and compare their numbers."""
    options = arguments(__doc__ or "", repeats=3)
    model, batches = smollm2(), token_batches(options.samples, options.seq_len)
    model.config.use_cache = False  # type: ignore[union-attr]

    def seeds() -> dict[str, list[Tensor]]:
        for pattern in MAGNITUDES:
            for site in ("input", "output"):
                with_hooks(model, batches, pattern, site, top_and_median)
        for _ in ("layer-wise", "position", "token"):
            counts = with_hooks(model, batches, BLOCKS, "output", outlier_count)
        return counts

    sites: list[tuple[str, Site]] = [(pattern, site) for pattern in MAGNITUDES for site in SITES[:2]]
    sites.append((BLOCKS, "output"))

    def ours() -> object:
        return capture(model, batches, sites=sites, statistics=["outlier_tokens", ("magnitude", {"reduce_dim": -1})])

    taken = medians({"seed": seeds, "one capture": ours}, options.repeats)
    print(f"11 forwards of the data ÷ one capture: {taken['seed'] / taken['one capture']:.1f}")
    cap = capture(model, batches, sites=sites, statistics=["outlier_tokens", "magnitude"])
    counts = [float(torch.stack(values).float().mean()) for values in seeds().values()]
    print("equal outlier counts:", np.array_equal(cap.output(BLOCKS).outlier_tokens(reduce="mean").values, counts))
    theirs = with_hooks(model, batches, MAGNITUDES[0], "input", top_and_median)
    for row, stat in enumerate(("top1", "top2", "top3", "median", "min")):
        expected = [float(torch.stack(values).double().mean(dim=0)[row]) for values in theirs.values()]
        got = cap.input(MAGNITUDES[0]).magnitude(stat).values  # type: ignore[arg-type]
        print(f"{stat}: largest relative difference {np.max(np.abs(got / expected - 1)):.1e}")


if __name__ == "__main__":
    main()
