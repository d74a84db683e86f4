"""What is known of a model → the assertions of a first suite, each with why it is there; and their text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ..captures import Capture
from ..checkpoint import Compare
from ..suite import Anatomy

DRIFT = {"rel": 0.1}
"""What the median of a layer may move. W8A8 moves it by 2.4 % at most, a scale × 1.25 by 27 % (docs/metrics.md)."""
CLEAR = 2.0
"""A sink is gated where it stands out at least so many times as far as it has to, to count as one."""


@dataclass(frozen=True)
class Draft:
    """One assertion. `why`: the comment above it; `keys`: its keys in order, those of `open` are bounds to be found.

    `groups`: the regexes of layers that have a bound each; none for one bound for all.
    """

    why: str
    keys: Mapping[str, Any]
    open: Sequence[str] = ()
    groups: Sequence[str] = ()

    @property
    def entry(self) -> dict[str, Any]:
        """The assertion as a suite has it, with 0 for each bound that is to be found."""
        return {**self.keys, **{side: dict.fromkeys(self.groups, 0) if self.groups else 0 for side in self.open}}


FILES = Draft(
    "What the files say, before any forward: scales, packed weights, keys, and settings beside a reference.",
    {"id": "files", "metric": "checkpoint_health"},
)
UNQUANTIZED = Draft(
    "What is not quantized, norms and embeddings above all, is the original's to the last bit.",
    {"id": "unquantized", "metric": "checkpoint_unquantized"},
)
COMPARED: Mapping[Compare, str] = {
    "layers": "every layer is compared",
    "blocks": "whole blocks are compared, not layers",
    "logits": "only predictions are compared",
}


def measured_drafts(anatomy: Anatomy, compare: Compare | None = None) -> list[Draft]:
    """Return the assertions that a pass answers, in the order in which they read best.

    `compare`: what can be held against a reference; None without one.
    """
    compared = _against(anatomy, compare) if compare else []
    return [*_activations(anatomy), *_weights(anatomy), *compared]


def _against(anatomy: Anatomy, compare: Compare) -> list[Draft]:
    """Return what holds a model against its original, from what is read in the files to what comes out."""
    drafts = [*(_alone(anatomy) if compare == "layers" else ()), *(_blocks(anatomy) if compare != "logits" else ())]
    return [*drafts, *_predictions()]


def _alone(anatomy: Anatomy) -> list[Draft]:
    kinds, weights = anatomy.linear_groups, {"layers": anatomy.linear_pattern, "site": "weight"}
    return [
        Draft(
            "Each dequantized weight against the original's, before any forward.",
            {"id": "weights-close", "metric": "weight_sqnr", **weights},
            ("min",),
            kinds,
        ),
        Draft(
            "The same of its worst row: one scale that is off is one row in hundreds, and hardly moves the whole.",
            {"id": "rows-close", "metric": "weight_sqnr", "by": "channel", **weights},
            ("min",),
            kinds,
        ),
        Draft(
            "What each layer adds of its own: it gets the original's input, so this names the layer where it begins.",
            {"id": "layers-alone", "metric": "local_sqnr", "layers": anatomy.linear_pattern},
            ("min",),
            kinds,
        ),
    ]


def _blocks(anatomy: Anatomy) -> list[Draft]:
    blocks = {"layers": anatomy.block_pattern}
    return [
        Draft(
            "The error that has come together up to each block, the attention sinks left out.",
            {"id": "blocks-close", "metric": "sqnr", **blocks},
            ("min",),
        ),
        Draft(
            "Outlier tokens that the original has not.",
            {"id": "new-outliers", "metric": "new_outliers", **blocks, "threshold": 64},
            ("max",),
        ),
    ]


def _predictions() -> list[Draft]:
    return [
        Draft(
            "How far the predictions are from the original's.",
            {"id": "predictions-close", "metric": "kl_divergence", "stat": "mean"},
            ("max",),
        ),
        Draft(
            "The worst hundredth: a fault that only some tokens meet is lost in the mean.",
            {"id": "predictions-close-everywhere", "metric": "kl_divergence", "stat": "p99"},
            ("max",),
        ),
        Draft("How often both find the same token likeliest.", {"id": "same-words", "metric": "same_top"}, ("min",)),
        Draft(
            "ln of the ratio of the perplexities; sigma is no less than the standard error of the paired differences.",
            {"id": "perplexity", "metric": "ln_ppl_ratio"},
            ("max",),
        ),
    ]


def _activations(anatomy: Anatomy) -> list[Draft]:
    blocks = {"layers": anatomy.block_pattern, "site": "output"}
    return [
        Draft(
            "NaN and Inf anywhere in the residual stream.",
            {"id": "finite", "metric": "nonfinite", **blocks, "max": 0},
        ),
        Draft(
            "Tokens far above the others, sinks included: a new one takes the range of a whole tensor.",
            {"id": "residual-outliers", "metric": "outlier_tokens", **blocks, "threshold": 64},
            ("max",),
        ),
        Draft(
            "The same beside the sinks, as a multiple of the median: what counts the sinks is blind to the rest.",
            {"id": "outliers-beside-the-sinks", "metric": "outlier_ratio", **blocks, "positions": "no_sink"},
            ("max",),
        ),
        Draft(
            "The median of the magnitudes follows the model, the largest one the text: a scale that is off shows\n"
            "here, at its layer. Against the numbers of today, which git keeps.",
            {
                "id": "drift", "metric": "magnitude", "stat": "median", "layers": anatomy.linear_pattern,
                "site": "output", "baseline": DRIFT,
            },
        ),
    ]  # fmt: skip


def _weights(anatomy: Anatomy) -> list[Draft]:
    weights = {"layers": anatomy.linear_pattern, "site": "weight"}
    return [
        Draft(
            "The size of each dequantized weight: a scale that is off shows before any activation does.",
            {"id": "weight-scales", "metric": "rms", **weights, "baseline": {"rel": 0.02}},
        ),
        Draft(
            "Weights have hardly a mean: a zero point that is off by one moves all of a layer's by its scale.",
            {"id": "weights-without-bias", "metric": "mean", **weights},
            ("min", "max"),
        ),
    ]


def sinks_of(capture: Capture, anatomy: Anatomy) -> list[Draft]:
    """Return an assertion that every sample keeps its sink at its channel, if all have one in some blocks."""
    blocks = capture.output(anatomy.block_pattern)
    ratios, channels = blocks.sink_tokens("ratio").populations, blocks.sink_tokens("channel").populations
    clear = [layer for layer in blocks.layers if ratios[layer].min() >= CLEAR * 64]
    kept = sorted({float(channel) for layer in clear for channel in channels[layer]})
    if len(kept) != 1:
        return []
    numbers = [layer.rpartition(".")[2] for layer in clear]
    pattern = anatomy.block_pattern.replace(r"\d+$", rf"({'|'.join(dict.fromkeys(numbers))})$")
    why = (
        "The attention sink of every sequence, where it is clear: a sound quantization keeps it, and at its channel.\n"
        "The mean is that channel only if no sample has another, or none."
    )
    keys = {
        "id": "sink-keeps-its-channel", "metric": "sink_tokens", "stat": "channel", "layers": pattern,
        "site": "output", "reduce": "mean", "equals": int(kept[0]),
    }  # fmt: skip
    return [Draft(why, keys)]


def draft_text(head: Sequence[str], sections: Mapping[str, Mapping[str, Any]], drafts: Sequence[Draft]) -> str:
    """Write a suite: comment lines, its sections, and its assertions, each below why it is there."""
    lines = [*(f"# {line}".rstrip() for line in head)]
    for name, keys in sections.items():
        lines += [f"{name}:", *(f"  {key}: {_written(value)}" for key, value in keys.items())]
    lines += ["", "assertions:"]
    for draft in drafts:
        lines += [f"  # {line}" for line in draft.why.splitlines()]
        dashed = [f"{key}: {_written(value)}" for key, value in draft.entry.items()]
        lines += [f"  - {dashed[0]}", *(f"    {line}" for line in dashed[1:]), ""]
    return "\n".join(lines[:-1]) + "\n"


def _written(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=1 << 20, sort_keys=False).strip()[1:-1]
