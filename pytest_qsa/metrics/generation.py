"""What two models answer to the same prompts: how far alike, how long, whether they end, repeat, keep their markup.

Near ties make greedy answers part ways without harm, so that answers are compared by their kind, not word by word, in
differences by prompt: what the subject has less often than its reference. numpy only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..captures import GENERATED, GENERATION_NAMES, SiteNumbers, padded
from ..common import AnomalyError
from .intervals import mean_by_window, newcombe, ratio_by_window
from .registry import Estimate, metric
from .view import View

Floats = NDArray[np.float64]
GenerationStat = Literal["ended", "length_ratio", "repetition", "valid_json", "markup_kept", "diverged_at"]

GRAM = 4
"""The tokens of a phrase whose repetition counts."""
TAG = re.compile(r"<[/|]?[A-Za-z][\w|:-]*>|```")
"""Markup in a text: tags, special tokens as `<|name|>`, and the fences of code."""
_THOUGHT = re.compile(r"^[\s\S]*</(?:think|thinking|reasoning)>", re.IGNORECASE)
_AROUND = re.compile(r"^\s*(?:```\w*|<[/|]?[A-Za-z][\w|:-]*>)|(?:```|<[/|]?[A-Za-z][\w|:-]*>)\s*$")


@dataclass(frozen=True)
class Answer:
    """What a model answers to a prompt. `ended`: by itself, not where it had to stop.

    `tokens`: their ids, the one that ends it among them. `text`: without that one. `markup`: the kinds that a server
    has parsed out of it; in the text they are found.
    """

    tokens: Sequence[int]
    text: str
    ended: bool
    markup: frozenset[str] = field(default=frozenset())

    @property
    def marks(self) -> frozenset[str]:
        """The kinds of its markup."""
        return self.markup | frozenset(TAG.findall(self.text))

    @property
    def is_json(self) -> bool:
        """Whether it is one JSON object or list, perhaps after a thought, inside a tag or the fences of code."""
        text = _THOUGHT.sub("", self.text)
        while (bare := _AROUND.sub("", text)) != text:
            text = bare
        text = text.strip()
        if not self.ended or not text.startswith(("{", "[")):
            return False
        try:
            json.loads(text)
        except (ValueError, RecursionError):
            return False
        return True

    @property
    def repetition(self) -> float:
        """The share of its 4-grams that it had written before: 1 − different ones / all of them.

        seq-rep-4 of Welleck et al., arXiv 1908.04319. 0 of an answer that is too short to have two.
        """
        grams = [tuple(self.tokens[at : at + GRAM]) for at in range(len(self.tokens) - GRAM + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


def answered(own: Sequence[Answer], reference: Sequence[Answer]) -> SiteNumbers:
    """Return the numbers of the answers of two models to the same prompts, a population a prompt."""
    count = len(own)
    rows = [_row(one, other) for one, other in zip(own, reference, strict=True)]
    return SiteNumbers(
        dtype="float64",
        shape=(),
        token_axis=False,
        statistics=frozenset({GENERATED}),
        sample=np.arange(count, dtype=np.int32),
        call=np.zeros(count, dtype=np.int32),
        lengths=np.zeros(count, dtype=np.int64),
        arrays={
            "generation": np.array(rows, dtype=np.float64),
            "answers": padded([np.array(each.tokens, dtype=np.int32) for each in own]),
            "reference_answers": padded([np.array(each.tokens, dtype=np.int32) for each in reference]),
        },
    )


def _row(own: Answer, reference: Answer) -> list[float]:
    """Return `GENERATION_NAMES` of two answers to one prompt."""
    equal = next(
        (at for at, pair in enumerate(zip(own.tokens, reference.tokens, strict=False)) if len({*pair}) > 1), -1
    )
    equal = min(len(own.tokens), len(reference.tokens)) if equal < 0 else equal
    parsed = [own.is_json, reference.is_json]
    marks = own.marks | reference.marks
    kept = [own.marks == marks, reference.marks == marks]
    row: list[float] = [equal, len(own.tokens), len(reference.tokens), own.ended, reference.ended]
    row += [own.repetition, reference.repetition]
    row += parsed if any(parsed) else [np.nan, np.nan]
    return row + (kept if marks else [np.nan, np.nan])


DIFFERENCE, RATIO = (-1.0, 1.0), (0.0, math.inf)
SPANS = {"ended": DIFFERENCE, "valid_json": DIFFERENCE, "markup_kept": DIFFERENCE, "repetition": DIFFERENCE}
PERFECT = {**dict.fromkeys(SPANS, 0.0), "length_ratio": 1.0}


@metric(
    GENERATED,
    reduce=None,
    per="logits",
    against=True,
    worst="lowest",
    counts="prompts",
    perfect=PERFECT,
    span={**SPANS, "length_ratio": RATIO, "diverged_at": RATIO},
)
def generation(view: View, *, stat: GenerationStat = "ended") -> Estimate:
    """Compare greedy answers with the reference's own, over the prompts of the suite's `generation`.

    `ended`, `valid_json`, `markup_kept`: the share of answers that end by themselves, are JSON, have the markup, less
    the reference's share: −0.1 where the model loses it in one of ten. JSON and markup: of the prompts where either
    model's answer has it. `repetition`: the share of 4-grams that were written before (arXiv 1908.04319), less the
    reference's. `length_ratio`: tokens ÷ the reference's, where both end. `diverged_at`: how many first tokens are
    equal, a mean, for looking (openvino's who-what-benchmark). Each with its 95 % interval by prompt.
    """
    table = dict(zip(GENERATION_NAMES, view.numbers.arrays["generation"].T, strict=True))
    if stat == "diverged_at":
        return _mean(table["equal"])
    if stat == "repetition":
        return _mean(table["repetition"] - table["reference_repetition"])
    if stat == "length_ratio":
        both = (table["ended"] == 1) & (table["reference_ended"] == 1)
        if not both.any():
            raise AnomalyError(
                f"of {len(both)} prompts none has an answer that ends in both models, so their lengths say nothing: "
                "raise generation.max_new_tokens, or look at stat: ended"
            )
        own, reference = table["length"][both], table["reference_length"][both]
        return ratio_by_window(own, reference)
    column = {"ended": "ended", "valid_json": "json", "markup_kept": "markup"}[stat]
    return _paired(table[column], table[f"reference_{column}"], stat)


def _paired(own: Floats, reference: Floats, stat: GenerationStat) -> Estimate:
    """Return the difference of two shares of the prompts that both have, with Newcombe's interval."""
    known = ~np.isnan(own)
    has, had = own[known] == 1, reference[known] == 1
    if not had.any():  # what the reference hasn't can't be lost
        what, mend = {
            "ended": ("ends", "raise generation.max_new_tokens"),
            "valid_json": ("is JSON", "take prompts that ask for it (generation.prompts)"),
            "markup_kept": ("has all the markup", "take prompts that ask for it (generation.prompts)"),
        }[stat]
        raise AnomalyError(f"of {len(known)} prompts none has an answer of the reference that {what}: {mend}")
    counts = (int(np.sum(each)) for each in (has & had, ~has & had, has & ~had, ~has & ~had))
    low, high = newcombe(*counts)  # of the reference's share minus the subject's
    share = float(np.mean(had))
    return Estimate(float(np.mean(has)) - share, -high, -low, int(known.sum()), -share)


def _mean(values: Floats) -> Estimate:
    return mean_by_window(values, np.arange(len(values), dtype=np.int64))
