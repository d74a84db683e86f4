"""A pass with a quantized KV cache: every state is rounded on its way in, those of the present token too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from ...captures import CACHE_SCALE, LATENT_AND_ROPE_KEY, NO_CACHE, Capture, Site, SiteKey, SiteNumbers
from ...checkpoint import CacheScale
from ...common import AnomalyError
from ...suite import KvCache
from ..modules import caching_layers, layers_of
from .cache_grids import rounded
from .kv_cache import States, emulated_cache, watched
from .participant import Need, Participant, Pass

Scales = Mapping[str, tuple[CacheScale, CacheScale]]
"""Layer → its scales of keys and values in the checkpoint, for `fp8_e4m3`; 1 for a layer that isn't named."""


class RoundedCache(Participant):
    """Rounds what the model puts into its KV cache, whatever else is measured.

    transformers' own quantized cache returns the first forward as it came, which would be the whole pass.
    """

    needs = Need.NOTHING
    uses_cache = True

    def __init__(self, grid: KvCache, scales: Scales, reference: nn.Module | None) -> None:
        self._grid, self._scales, self._reference = grid, scales, reference
        self._seen: set[str] = set()

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Take both models' own emulation of a quantized cache out: the grid alone is to be seen."""
        self._model = run.model
        for model in filter(None, (run.model, self._reference)):
            exits.enter_context(plain_cache(model))

    def begin(self, exits: ExitStack) -> None:
        """Begin an attempt."""
        self._seen.clear()
        exits.enter_context(cache_rounded(self._model, self._grid, self._scales, self._seen))

    def complete(self, capture: Capture) -> Capture:
        """Check that something was rounded: else the model would be compared with itself.

        Raises:
            AnomalyError: nothing was.
        """
        if not self._seen and any(site != "weight" for _, site in capture.sites):
            raise AnomalyError(f"model.kv_cache: {NO_CACHE}")
        return capture


class CacheScales(Participant):
    """Adds the checkpoint's scales to the numbers of the sites that ask for them."""

    needs = Need.NOTHING

    def __init__(self, scales: Scales) -> None:
        self._scales = scales

    def prepare(self, run: Pass, exits: ExitStack) -> None:
        """Note which sites do."""
        self._sites = [site for site, statistics in run.wanted.items() if CACHE_SCALE in statistics]

    def contribute(self, numbers: dict[SiteKey, SiteNumbers]) -> None:
        """Add them."""
        for layer, site in self._sites:
            key, value = self._scales.get(layer, (1.0, 1.0))
            scale = np.atleast_1d(np.array(value if site == "value" else key, dtype=np.float64))
            numbers[layer, site] = numbers[layer, site].having({CACHE_SCALE}, {"cache_scale": scale})


@contextmanager
def cache_rounded(model: nn.Module, grid: KvCache, scales: Scales, seen: set[str] | None = None) -> Iterator[None]:
    """While it is open, round what a model puts into its KV cache. `seen` gets the names of the layers that do.

    Raises:
        AnomalyError: when the model runs: no engine keeps such a state on the grid.
    """
    modules = layers_of(model)
    names = caching_layers(modules)
    takes = {name: partial(_round, name, grid, scales.get(name, (1.0, 1.0)), seen) for name in names}
    with watched(modules, takes, last=True):
        yield


def _round(
    name: str,
    grid: KvCache,
    scales: tuple[CacheScale, CacheScale],
    seen: set[str] | None,
    sites: tuple[Site, Site],
    states: States,
) -> States:
    if seen is not None:
        seen.add(name)
    if sites == LATENT_AND_ROPE_KEY:  # both lie in one tensor of the engine's, with the scale of keys
        scales = (scales[0], scales[0])
    first, second = (rounded(grid, *each) for each in zip(states, sites, scales, strict=True))
    return first, second


@contextmanager
def plain_cache(model: nn.Module) -> Iterator[None]:
    """While it is open, keep compressed-tensors from rounding keys and values as the checkpoint declares it."""
    modules: list[Any] = [module for module in model.modules() if emulated_cache(module) is not None]
    before = [getattr(module, "quantization_enabled", True) for module in modules]
    for module in modules:
        module.quantization_enabled = False
    try:
        yield
    finally:
        for module, was in zip(modules, before, strict=True):
            module.quantization_enabled = was
