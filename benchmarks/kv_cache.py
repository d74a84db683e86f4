"""What a quantized KV cache costs SmolLM2: its keys and values by layer, and the whole model by depth of the text.

`python benchmarks/kv_cache.py [--samples 2] [--tokens 2048]`; SmolLM2 takes 8,192 tokens. The states are those of the
shipped document; the model with each grid is compared with itself without (`model.reference: self`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, get_args

import numpy as np
from common import ROOT

import pytest_qsa
from pytest_qsa.captures import Request
from pytest_qsa.engine import capture_subject
from pytest_qsa.metrics import METRICS
from pytest_qsa.metrics.query import canonical_positions
from pytest_qsa.suite import Data, KvCache, Memory, Model, Subject

SMOLLM2 = str(ROOT / ".demo" / "smollm2")
ATTENTION = r"self_attn$"
GRIDS = (
    ("fp8_e4m3", "checkpoint", 0), ("fp8_e4m3", "token_head", 0), ("int8", "token_head", 0), ("int4", "tensor", 0),
    ("int4", "token_head", 0), ("int4", "channel", 0), ("int4", "group", 32),
)  # fmt: skip
"""Scheme, what shares a scale, the size of a group."""
DEEP = (("fp8_e4m3", "checkpoint", 0), ("int4", "token_head", 0), ("int4", "group", 32))
"""Those that are shown by depth."""
RANGES = ((0, 256), (256, 1024), (1024, 2048), (2048, 4096), (4096, 8192))


def parameters_of(scheme: str, by: str, size: int) -> dict[str, object]:
    """Return what `quantization_sqnr` is asked with."""
    return {"scheme": scheme, "by": by} | ({"group_size": size} if size else {})


def needs(metric: str, site: Any, parameters: dict[str, object]) -> frozenset[Any]:
    """Return the statistics that a metric needs."""
    return METRICS[metric].needs(site, "all", parameters)


def ranges_of(data: Data) -> list[tuple[int, int]]:
    """Return the ranges of positions that the windows reach."""
    return [(start, end) for start, end in RANGES if start < data.seq_len]


def captured(data: Data, requests: Iterable[Request], **model: object) -> pytest_qsa.Capture:
    """Capture SmolLM2."""
    spec = Model.model_validate({"path": SMOLLM2, **model})
    return capture_subject(Subject("smollm2", spec, data, Memory(), ROOT), list(requests))


def print_states(data: Data) -> None:
    """Print the SQNR of keys and values on each grid, for the first, the middle and the last third of the layers."""
    asked = [parameters_of(*grid) for grid in GRIDS]
    sites: tuple[Any, ...] = ("key", "value")
    requests = [
        Request(ATTENTION, site, None, needs("absmax", site, {}) | needs("quantization_sqnr", site, each))
        for site in sites
        for each in asked
    ]
    capture = captured(data, requests)
    for site in sites:
        own: Any = capture.select(ATTENTION, site)
        thirds = [values.max() for values in np.array_split(own.absmax().values, 3)]
        print(f"| {site} | largest |x| | {' | '.join(f'{value:.4g}' for value in thirds)} |")
        for each in asked:
            values = np.array_split(own.quantization_sqnr(**each).values, 3)
            low = " | ".join(f"{part.min():.1f} … {part.max():.1f}" for part in values)
            print(f"| {site} | {each['scheme']} by {each['by']} {each.get('group_size', '')} | {low} |", flush=True)


def print_depth(data: Data) -> None:
    """Print the SQNR of keys and values by range of positions, of the worst layer and of the median one."""
    sites: tuple[Any, ...] = ("key", "value")
    asked, ranges = (
        [parameters_of(*grid) for grid in DEEP],
        [{"from": start, "to": end} for start, end in ranges_of(data)],
    )
    requests = [
        Request(ATTENTION, site, None, METRICS["quantization_sqnr"].needs(site, canonical_positions(where), each))
        for site in sites
        for each in asked
        for where in ranges
    ]
    capture = captured(data, requests)
    for site in sites:
        own: Any = capture.select(ATTENTION, site)
        for each in asked:
            values = [own.quantization_sqnr(**each, positions=where).values for where in ranges]
            columns = " | ".join(f"{part.min():.1f}, {np.median(part):.1f}" for part in values)
            print(f"| {site} | {each['scheme']} by {each['by']} {each.get('group_size', '')} | {columns} |", flush=True)


def print_models(data: Data) -> None:
    """Print the KL divergence and the flips of the whole model with each grid, by depth."""
    statistics: frozenset[Any] = frozenset().union(*(needs(name, "logits", {}) for name in ("kl_divergence", "flips")))
    for grid in (each for each in get_args(KvCache) if each != "fp8_ds_mla"):  # which is of latent attention
        capture = captured(data, [Request("", "logits", None, statistics)], kv_cache=grid, reference="self")
        columns = []
        for start, end in ranges_of(data):
            where = {"from": start, "to": end}
            kl, flips = (
                getattr(capture.logits(), name)(positions=where).values[0] for name in ("kl_divergence", "flips")
            )
            columns.append(f"{kl:.4f}, {100 * flips:.1f} %")
        print(f"| `{grid}` | {' | '.join(columns)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=2048)
    given = parser.parse_args()
    data = Data(source="document", num_samples=given.samples, seq_len=given.tokens)
    print_models(data)
    print_states(data)
    print_depth(data)


if __name__ == "__main__":
    main()
