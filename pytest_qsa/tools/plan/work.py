"""What a pass has to do: its tokens, its sites, and the sums that it keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...captures import Request, match_layers
from ...suite import Data
from .sizes import Sizes

WAVE = 256
"""Samples that wait at once when the weights stream (engine/streaming.py)."""


@dataclass(frozen=True)
class Work:
    """One pass over `samples` windows of `tokens`, `batch` at once.

    `sites`: how many tensors are reduced; `sums`: the bytes that are kept of them; `elements`: how many elements of
    them a token has.
    """

    samples: int
    tokens: int
    batch: int
    sites: int
    sums: int
    elements: int

    @property
    def batches(self) -> int:
        """How many forwards there are."""
        return -(-self.samples // self.batch)

    @classmethod
    def of(cls, data: Data, requests: Sequence[Request], sizes: Sizes) -> Work:
        """Count what the requests need, as far as the checkpoint's names tell which layers there are."""
        sites = {
            (layer, request.site): request.statistics
            for request in requests
            for layer in match_layers(sizes.layers, request.pattern, request.exclude)
            if request.site != "weight"
        }
        tokens = data.num_samples * data.seq_len
        widths = {site: _channels(site[0], site[1], sizes) for site in sites}
        sums = sum(
            statistic.kept_bytes(data.num_samples, tokens, widths[site])
            for site, statistics in sites.items()
            for statistic in statistics
        )
        return cls(data.num_samples, data.seq_len, data.batch_size, len(sites), sums, sum(widths.values()))

    def flops(self, sizes: Sizes) -> float:
        """Return the operations of the pass: 2 a parameter and token, 4 a pair of tokens and channel of attention.

        The head runs for the first sample, which goes through the whole model. Kaplan et al., arXiv 2001.08361, with
        attention as torch's flop counter has it: all pairs, whether a mask hides them or not.
        """
        trunk = 2 * sizes.trunk * self.tokens
        layers = sum(1 for unit in sizes.units if unit.rpartition(".")[2].isdigit())
        attention = 4 * self.tokens**2 * sizes.attention * layers
        head = 2 * sizes.vocabulary * sizes.hidden * self.tokens * self.batch
        return self.samples * (trunk + attention) + head


def _channels(layer: str, site: str, sizes: Sizes) -> int:
    """Return how many channels a site has: those of the MLP inside it, of the residual stream elsewhere."""
    inside = ("down_proj", "fc2", "act_fn") if site == "input" else ("up_proj", "gate_proj", "fc1", "act_fn")
    return sizes.intermediate if layer.endswith(inside) else sizes.hidden
