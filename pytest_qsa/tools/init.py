"""A first suite of a model: assertions that fit its layers, their bounds calibrated, each with why it is there."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..captures import Capture
from ..checkpoint import Compare, compare_norms, problems_of
from ..common import AnomalyError
from ..suite import Anatomy, CheckpointAssertion, Subject, SuiteFile, YamlSource, files_of, kept_reference, make_suite
from .calibrate import Finding, Sampled
from .edit_suite import calibrated, flow_yaml

Sections = Mapping[str, Mapping[str, Any]]

DRIFT = {"rel": 0.1}
"""How far the median of a layer may move. W8A8 moves it by 2.4 % at most, a scale × 1.25 by 27 % (docs/metrics.md)."""
CLEAR = 2.0
"""A sink is gated where its ratio is at least this multiple of the ratio from which on a token counts as a sink."""


@dataclass(frozen=True)
class Draft:
    """One assertion. `why`: the comment above it. `keys`: its keys in order. `open`: the bounds that calibration finds.

    `groups`: the regexes of the layers that have a bound each; none for one bound for all layers.
    """

    why: str
    keys: Mapping[str, Any]
    open: Sequence[str] = ()
    groups: Sequence[str] = ()

    @property
    def entry(self) -> dict[str, Any]:
        """The assertion as a suite has it, with 0 for each bound that calibration finds."""
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

    `compare`: what can be compared with the reference; None without one.
    """
    drafts = [*_activations(anatomy), *_weights(anatomy)]
    if compare == "layers":
        drafts += _alone(anatomy)
    if compare in ("layers", "blocks"):
        drafts += _blocks(anatomy)
    return [*drafts, *(_predictions() if compare else ())]


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
    """Return an assertion that every sample has its sink at the same channel, if all samples have a clear one there."""
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


@dataclass(frozen=True)
class FirstSuite:
    """A suite and what to say of it: its text, lines for the terminal, all ids, and those of the baselines."""

    text: str
    lines: Sequence[str]
    ids: Sequence[str]
    baselines: Sequence[str]


def first_suite(
    subject: Subject,
    source: YamlSource,
    overrides: Sequence[str],
    parts: int,
    passes: int,
    k: float,
    *,
    allow_code: bool,
) -> FirstSuite:
    """Draft a suite, run the subject over parts of its data, and calibrate the bounds.

    `source`: the sections model and data of the suite to be written. `parts`, `passes`, `k`: as in `Sampled`.

    Raises:
        InfraError: the subject can't be run, or the reference is no checkpoint that is here.
    """
    from ..engine import anatomy

    assert subject.model is not None
    layers = anatomy(subject.model, subject.path)
    unquantized, compare, remarks = _comparable(subject)
    drafts = measured_drafts(layers, compare)
    file = make_suite(_with(source, drafts), overrides, "--")
    sampled = Sampled.of(subject, file, parts, passes, allow_code=allow_code)
    # What a sink is known by is only known after the pass; the files are checked in any case.
    drafts = [FILES, *unquantized, *drafts, *sinks_of(sampled.whole, layers)]
    file = make_suite(_with(file.source, drafts))
    kept, findings, left_out = _calibrated(file, sampled, drafts, k)
    data = sampled.data_text(file)
    text = draft_text(_head(subject.model.id, data, k), _sections(file), kept)
    proposals = {each.id: each.proposals for each in findings if each.proposals}
    lines = [*sampled.lines(findings, file, stated=False), *remarks, *left_out, *_problems(file, subject)]
    baselines = [draft.keys["id"] for draft in kept if "baseline" in draft.keys]
    return FirstSuite(calibrated(text, proposals, data)[0], lines, [draft.keys["id"] for draft in kept], baselines)


def _with(source: YamlSource, drafts: Sequence[Draft]) -> YamlSource:
    return YamlSource(source.path, {**source.data, "assertions": [draft.entry for draft in drafts]})


def _comparable(subject: Subject) -> tuple[list[Draft], Compare | None, list[str]]:
    """Return the static draft that compares, what a pass can compare (None without a reference), and remarks.

    Raises:
        InfraError: the reference is no checkpoint that is here.
    """
    if subject.model is None or subject.model.reference is None:
        return [], None, []
    if kept_reference(subject) is not None:
        return [], "layers", []  # the pass checks that the file is of the same model
    files = files_of(subject)
    assert files.reference is not None
    relation = compare_norms(files.folder, files.reference)
    remarks = [f"{relation.why}: {COMPARED[relation.compare]}"] if relation.why else []
    try:
        found = problems_of(files, "checkpoint_unquantized")[1]
    except AnomalyError as error:
        return [], relation.compare, [*remarks, f"left out: unquantized: {error}"]
    if not found:
        return [UNQUANTIZED], relation.compare, remarks
    first = f"left out: unquantized: {found[0].tensor}: {found[0].what}; if it is not meant so, mend it"
    return [], relation.compare, [*remarks, first]


def _calibrated(
    file: SuiteFile, sampled: Sampled, drafts: Sequence[Draft], k: float
) -> tuple[list[Draft], list[Finding], list[str]]:
    """Calibrate the open bounds; return the drafts that the model can keep, and lines on those that it can't."""
    kept, findings, left_out = [], [], []
    for draft, assertion in zip(drafts, file.assertions, strict=True):
        try:
            finding = sampled.finding(assertion, k)
        except AnomalyError as error:
            left_out.append(f"left out: {assertion.id}: {error}")
            continue
        kept.append(draft)
        if draft.open:
            findings.append(finding)
    return kept, findings, left_out


def _problems(file: SuiteFile, subject: Subject) -> Iterator[str]:
    """Yield what the static checks find already: bounds that are calibrated on a broken checkpoint mean nothing."""
    files = files_of(subject)
    for assertion in file.assertions:
        if isinstance(assertion, CheckpointAssertion):
            for finding in problems_of(files, assertion.metric, **assertion.parameters)[1][:3]:
                yield f"{assertion.id} fails: {finding.tensor}: {finding.what}; mend it, and run this again"


def _sections(file: SuiteFile) -> Sections:
    """Return the sections to write; a path of the command line becomes relative to the suite's folder."""
    data = file.source.data
    sections = {name: dict(data[name]) for name in ("model", "data", "memory") if name in data}
    source = sections["data"]["source"]
    if source.startswith("custom:"):
        relative = os.path.relpath(source.removeprefix("custom:"), Path(file.path).parent)
        sections["data"]["source"] = f"custom:{relative}"
    return sections


def _head(name: str, data: str, k: float) -> list[str]:
    return [
        f"The gate of {name}, a first one by `qsa init`: read it, change it, commit it.",
        f"A bound with `noise` beside it is mean ± {k:g} sigma over {data}, rounded outward;",
        "none may be tighter. `qsa calibrate` measures them again.",
    ]


def draft_text(head: Sequence[str], sections: Mapping[str, Mapping[str, Any]], drafts: Sequence[Draft]) -> str:
    """Return the text of a suite: comment lines, its sections, and its assertions, each below its comment."""
    lines = [*(f"# {line}".rstrip() for line in head)]
    for name, keys in sections.items():
        lines += [f"{name}:", *(f"  {key}: {flow_yaml(value)}" for key, value in keys.items())]
    lines += ["", "assertions:"]
    for draft in drafts:
        lines += [f"  # {line}" for line in draft.why.splitlines()]
        dashed = [f"{key}: {flow_yaml(value)}" for key, value in draft.entry.items()]
        lines += [f"  - {dashed[0]}", *(f"    {line}" for line in dashed[1:]), ""]
    return "\n".join(lines[:-1]) + "\n"
