"""A first suite of a model, drafted and calibrated: each assertion with its reason (`qsa init`)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .. import engine
from ..captures import KEY_AND_VALUE, LATENT_AND_ROPE_KEY, Capture, Site, exactly, found_by, is_kind
from ..checkpoint import Compare, Format, compare_norms, problems_of
from ..common import AnomalyError, InfraError
from ..suite import (
    SELF,
    Anatomy,
    Assertion,
    CheckpointAssertion,
    Generation,
    KvCache,
    MeasuredAssertion,
    NamedSubject,
    SuiteFile,
    YamlSource,
    files_of,
    kind_patterns,
    kinds_pattern,
    load_suite,
)
from .calibrate import Calibrated, Sampled
from .suite_text import calibrated, flow_yaml

PORTABLE = {"BLOCKS": "blocks", "LINEARS": "linears", "ATTENTION": "attention"}
"""What a draft calls its layers → the kind whose portable name a suite has for them."""
CLEAR = 2.0
"""A sink gets an assertion if its ratio is this many times the ratio that makes a token a sink."""


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


COMPARED_TEXT: Mapping[Compare, str] = {
    "layers": "every layer is compared",
    "blocks": "whole blocks are compared, not layers",
    "logits": "only predictions are compared",
}


def drafts_of(part: str, anatomy: Anatomy, *, smoothed: bool = False, grid: str = "") -> list[Draft]:
    """Return the drafts of a part of drafts.yaml, with the patterns of a model's own layers.

    `smoothed`: without those on sizes of layers, which a smoothing takes from its calibration. `grid`: that of the KV
    cache.
    """
    text = files("pytest_qsa.tools").joinpath("drafts.yaml").read_text(encoding="utf-8")
    layers = {
        "LINEARS": anatomy.linears,
        "LINEARS_AND_EXPERTS": [*anatomy.linears, *anatomy.experts],
        "WEIGHTS": anatomy.weights,
    }
    drafts = []
    for entry in yaml.safe_load(text)[part]:
        instead = {"layers": entry["smoothed"]} if smoothed and "smoothed" in entry else {}
        if instead.get("layers") == "none" or (grid and grid not in entry.get("grids", [grid])):
            continue
        keys = {**entry["keys"], **instead}
        named = keys.get("layers", "")
        own = layers.get(named, [])
        if named in PORTABLE:
            keys["layers"] = anatomy.portable(PORTABLE[named])
        elif named:
            outside = anatomy.outside if keys.get("site") != "weight" else ""
            own = [name for name in own if not (outside and re.match(outside, name))]
            keys |= {"layers": kinds_pattern(own) if own else anatomy.portable("blocks")}
            keys |= {"exclude": outside} if own and outside else {}
        groups = kind_patterns(own) if entry.get("each_kind") else ()
        drafts.append(Draft(entry["why"], keys, entry.get("open", ()), groups))
    return drafts


def measured_drafts(anatomy: Anatomy, compare: Compare | None = None, *, answers: bool = False) -> list[Draft]:
    """Return the assertions that a pass answers. `compare`: what can be compared with the reference, None without.

    `answers`: whether the data are the reference's own.
    """
    parts = {"layers": ("layers", "blocks", "logits"), "blocks": ("blocks", "logits"), "logits": ("logits",)}
    chosen, smoothed = ("model", *parts.get(compare or "", ()), *(["answers"] if answers else ())), compare == "blocks"
    if not anatomy.has_head:
        chosen = tuple("embeddings" if part == "logits" else part for part in chosen)
    return [draft for part in chosen for draft in drafts_of(part, anatomy, smoothed=smoothed)]


def cache_drafts(grid: KvCache, anatomy: Anatomy, sites: Sequence[Site], seq_len: int) -> list[Draft]:
    """Return the assertions of a model with a quantized KV cache. `sites`: what its attention keeps there.

    `seq_len`: tokens of a window.
    """
    found: list[Draft] = []
    for draft in drafts_of("cache", anatomy, grid=grid):
        keys = dict(draft.keys)
        if keys.get("positions") == "DEEP":
            keys["positions"] = {"from": seq_len // 2}
        if keys["metric"] == "quantization_sqnr":
            keys |= GRID_OF_STATES[grid]
        of_sites = sites if keys.get("site") == "SITE" else ()
        named = [keys | {"site": site, "id": keys["id"].replace("SITE", site.replace("_", "-"))} for site in of_sites]
        found += [replace(draft, keys=each) for each in (named if of_sites else [keys])]
    return found


def sinks_of(capture: Capture, anatomy: Anatomy) -> list[Draft]:
    """Return an assertion that every sample has its sink at the same channel, if all samples have a clear one there."""
    blocks = capture.output(anatomy.block_pattern)
    ratios, channels = blocks.sink_tokens("ratio").populations, blocks.sink_tokens("channel").populations
    clear = [layer for layer in blocks.layers if ratios[layer].min() >= CLEAR * 64]
    kept = sorted({float(channel) for layer in clear for channel in channels[layer]})
    # Sinks at several channels fit no `equals`.
    if len(kept) != 1:
        return []
    # The block pattern with the numbers of these blocks in the place of any number.
    numbers = [layer.rpartition(".")[2] for layer in clear]
    pattern = anatomy.block_pattern.replace(r"\d+$", rf"({'|'.join(dict.fromkeys(numbers))})$")
    (draft,) = drafts_of("sink", anatomy)
    return [replace(draft, keys={**draft.keys, "layers": pattern, "equals": int(kept[0])})]


@dataclass(frozen=True)
class FirstSuite:
    """A suite and what to say of it: its text, lines for the terminal, all ids, and those of the baselines."""

    text: str
    lines: Sequence[str]
    ids: Sequence[str]
    baselines: Sequence[str]


def first_suite(
    subject: NamedSubject,
    source: YamlSource,
    overrides: Sequence[str],
    parts: int,
    passes: int,
    k: float,
    *,
    allow_code: bool,
    generation: bool = True,
) -> FirstSuite:
    """Draft a suite, run the subject over parts of its data, and calibrate the bounds.

    With `model.weights: files` it has what the files and their weights say alone, and nothing is run. `generation`:
    whether both models answer prompts, where there is a reference and they can.

    `source`: the sections model and data of the suite to be written. `parts`, `passes`, `k`: as in `Sampled`.

    Raises:
        InfraError: the subject can't be run, or the reference is no checkpoint that is here.
    """
    layers = engine.anatomy(subject.model, subject.path, subject.base, subject.data, subject.folder)
    files, cached = subject.model.weights == "files", subject.model.reference == SELF
    static, compare, remarks = (["files"], None, []) if cached else _comparable(subject)
    if files:  # of no model, so that layers go by the files' own names
        layers = layers.renamed(files_of(subject).format.layers_of(layers.weights))
    drafts = measured_drafts(layers, compare, answers=subject.is_answered_by_reference)
    if generation and compare is not None and not files:
        asked = _drafted_answers(subject.generation)
        if silent := engine.why_no_answers(replace(subject, generation=asked)):
            remarks.append(f"left out: generation: {silent}")
        else:
            subject = replace(subject, generation=asked)
            source = replace(source, data={**source.data, "generation": asked.model_dump()})
            drafts += drafts_of("generation", layers)
    if cached and subject.model.kv_cache is not None:
        drafts = cache_drafts(subject.model.kv_cache, layers, _cache_sites(subject), subject.data.seq_len)
    if compare == "layers":
        drafts = [with_gain_bound(draft, layers, files_of(subject).format) for draft in drafts]
    if files:
        drafts = [draft for draft in drafts if draft.keys.get("site") == "weight"]
    file = load_suite(_with(source, drafts), overrides, "--")  # with 0 for the bounds that are still unknown
    sampled = Sampled.of(subject, file, parts, passes, allow_code=allow_code)
    # Only the pass shows whether there is a clear sink; static checks need none.
    drafts = [*(draft for part in static for draft in drafts_of(part, layers)), *drafts]
    drafts += [] if files or cached else sinks_of(sampled.whole, layers)
    drafts = [with_tolerance(draft, sampled.whole.schemes, layers.block_pattern) for draft in drafts]
    # The overrides are in the data of `file.source` already.
    file = load_suite(_with(file.source, drafts))
    kept, findings, left_out = _calibrated(file, sampled, drafts, k)
    data = sampled.data_text(file)
    sections = _sections(file)
    if layers.towers and not files:  # its layers may be quantized, and none of them runs
        sections["model"].setdefault("allow_idle", layers.outside)
        remarks.append(
            f"nothing in the data passes {', '.join(layers.towers)}: of it the weights alone are gated; "
            "--data.source pictures, or sounds, runs it"
        )
    text = draft_text(_head(subject.model.id, data, k), sections, kept)
    proposals = {each.id: each.proposals for each in findings if each.proposals}
    lines = [*sampled.lines(findings, file, stated=False), *remarks, *left_out, *_problems(file, subject)]
    baselines = [draft.keys["id"] for draft in kept if "baseline" in draft.keys]
    return FirstSuite(calibrated(text, proposals, data)[0], lines, [draft.keys["id"] for draft in kept], baselines)


GRID_OF_STATES: Mapping[KvCache, Mapping[str, Any]] = {
    "fp8_e4m3": {"scheme": "fp8_e4m3", "by": "checkpoint"},
    "fp8_per_token_head": {"scheme": "fp8_e4m3", "by": "token_head"},
    "fp8_ds_mla": {"scheme": "fp8_e4m3", "by": "group", "group_size": 128},
    "int8_per_token_head": {"scheme": "int8", "by": "token_head"},
    "int4_per_token_head": {"scheme": "int4", "by": "token_head"},
    "q8_0": {"scheme": "int8", "by": "group", "group_size": 32},
    "q4_0": {"scheme": "int4", "by": "group", "group_size": 32},
}
"""The grid of a KV cache → what `quantization_sqnr` is asked with: the same, but for rotations and zero points."""


def _cache_sites(subject: NamedSubject) -> tuple[Site, ...]:
    """Return what a model's attention keeps in its KV cache, by its configuration; what isn't rounded left out."""
    if "kv_lora_rank" not in files_of(subject).folder.text_config:
        return KEY_AND_VALUE
    return LATENT_AND_ROPE_KEY[:1] if subject.model.kv_cache == "fp8_ds_mla" else LATENT_AND_ROPE_KEY


DRAFTED_ANSWERS = {"num_prompts": 64, "max_new_tokens": 96}
"""The `generation` of a draft. Twice the usual prompts, of three quarters the length: of 32 a head row × 0.9 of SmolLM2
loses 0.22 of the ends, and a healthy quantization may lose 0.21 by chance."""


def _drafted_answers(given: Generation | None) -> Generation:
    """Return which prompts a draft asks, with what the user has said of them."""
    own = given.model_dump(exclude_unset=True) if given is not None else {}
    return Generation.model_validate({**DRAFTED_ANSWERS, **own})


FEW_BITS = re.compile(r"w[1-7](?!\d)")
"""The schemes with fewer than 8 bits a weight."""
DRIFT_OF_FEW_BITS = 0.3
"""Another rounding of SmolLM2 in W4A16 moves the median magnitude of an o_proj's outputs by up to 75 %, of a block's by
11 % (docs/benchmarks.md); W8A8 moves a layer's by 2.4 % (docs/metrics.md)."""


def with_tolerance(draft: Draft, schemes: Mapping[str, str] | None, blocks: str) -> Draft:
    """Return a draft whose baseline on activations leaves the room that another quantization in few bits needs.

    `blocks`: the pattern of the model's blocks, whose outputs move less than those of single layers.
    """
    if "baseline" not in draft.keys or draft.keys.get("site") == "weight":
        return draft
    few = any(FEW_BITS.match(scheme) for scheme in (schemes or {}).values())
    room: dict[str, Any] = {"layers": blocks, "baseline": {"rel": DRIFT_OF_FEW_BITS}}
    return replace(draft, keys={**draft.keys, **room}) if few else draft


GAIN_BOUNDS = {4: 1.25, 3: 2.0, 2: 4.0, 1: 4.0}
"""The bits of a weight → how many of the rooms of `weight_gain` a healthy scale group of SmolLM2 takes: 1.21 of 4 bits,
1.45 of 3, 3.5 of 2 (docs/benchmarks.md). From 5 bits on it is within the one."""
GAIN_OF_GPTQ = 1.6
"""The multiple of these that a group by GPTQ takes in 4 bits and fewer: of four times 1.7 million groups one reaches
1.5 rooms of 4 bits, and has no other error by which it could be told from a wrong scale."""


def with_gain_bound(draft: Draft, layers: Anatomy, form: Format) -> Draft:
    """Return a draft on `weight_gain` with the bound that the bits of its layers need, by kind where they differ."""
    if draft.keys["metric"] != "weight_gain":
        return draft
    kinds: dict[str, float] = {}
    for layer, own in form.layers_of(layers.weights).items():
        (kind,) = kind_patterns([layer])
        bound = GAIN_BOUNDS.get(form.weight_bits(own), 1.0)
        bound *= GAIN_OF_GPTQ if bound > 1 and form.folder.by_gptq else 1
        kinds[kind] = max(kinds.get(kind, 1.0), bound)
    stated = kinds if len({*kinds.values()}) > 1 else max(kinds.values(), default=1.0)
    return replace(draft, keys={**draft.keys, "max": stated})


def _with(source: YamlSource, drafts: Sequence[Draft]) -> YamlSource:
    return replace(source, data={**source.data, "assertions": [draft.entry for draft in drafts]}, places={})


def _comparable(subject: NamedSubject) -> tuple[list[str], Compare | None, list[str]]:
    """Return the parts of drafts.yaml on files, what a pass can compare (None without a reference), and remarks.

    Raises:
        InfraError: the reference is no checkpoint that is here.
    """
    if subject.reference is None:
        return ["files"], None, []
    if isinstance(subject.reference, Path):
        return ["files"], "layers", []  # the pass refuses a reference file: it needs the model itself
    checked = files_of(subject)
    assert checked.reference is not None
    relation = compare_norms(checked.folder, checked.reference)
    remarks = [f"{relation.why}: {COMPARED_TEXT[relation.compare]}"] if relation.why else []
    try:
        found = problems_of(checked, "checkpoint_unquantized")[1]
        problem = f"{found[0].tensor}: {found[0].what}; if it is not meant so, mend it" if found else ""
    except AnomalyError as error:
        problem = str(error)
    if problem:
        return ["files"], relation.compare, [*remarks, f"left out: unquantized: {problem}"]
    return ["files", "unquantized"], relation.compare, remarks


def _calibrated(
    file: SuiteFile, sampled: Sampled, drafts: Sequence[Draft], k: float
) -> tuple[list[Draft], list[Calibrated], list[str]]:
    """Calibrate the open bounds; return the drafts that the model can keep, and a line on each that it can't.

    A layer that can't have a number (it is never called, or sees no tokens) is left out of a draft by its name.
    """
    kept, findings, left_out = [], [], []
    for drafted, stated in zip(drafts, file.assertions, strict=True):
        draft, assertion = drafted, stated
        try:
            if odd := _unfit(assertion, sampled.whole):
                if not is_kind(draft.keys["layers"]):  # a portable name leaves them out by itself
                    draft = _without(draft, odd, sampled.whole.modules)
                    (assertion,) = load_suite(_with(file.source, [draft])).assertions
                left_out.append(f"left out of {assertion.id}: {_some(odd)}: the model never calls it with tokens")
            finding = sampled.finding(assertion, k)
        except (AnomalyError, InfraError) as error:
            left_out.append(f"left out: {assertion.id}: {error}")
            continue
        kept.append(draft)
        if draft.open:
            findings.append(finding)
    return kept, findings, left_out


def _unfit(assertion: Assertion, capture: Capture) -> list[str]:
    """Return the layers of an assertion that can have no number, where others of it can."""
    if not isinstance(assertion, MeasuredAssertion) or not assertion.layers:
        return []
    selection = capture.select(assertion.layers, assertion.site, assertion.exclude)
    odd = selection.unfit(assertion.metric, assertion.where, **assertion.parameters)
    return odd if len(odd) < len(selection.layers) else []


def _without(draft: Draft, odd: Sequence[str], modules: Sequence[str]) -> Draft:
    r"""Return a draft that excludes some layers: all of a kind, `\.dt_proj$`, or these alone."""
    whole = [kind for kind in kind_patterns(odd) if set(found_by(kind, modules)) <= {*odd}]
    single = [name for name in odd if not any(found_by(kind, [name]) for kind in whole)]
    parts = [draft.keys.get("exclude"), *whole, *([exactly(single)] if single else [])]
    groups = [group for group in draft.groups if group not in whole]
    return replace(draft, keys={**draft.keys, "exclude": "|".join(filter(None, parts))}, groups=groups)


def _some(layers: Sequence[str]) -> str:
    return f"{layers[0]}{f' (and {len(layers) - 1} more)' if layers[1:] else ''}"


def _problems(file: SuiteFile, subject: NamedSubject) -> Iterator[str]:
    """Yield what the static checks find already: bounds that are calibrated on a broken checkpoint mean nothing."""
    checked = files_of(subject)
    for assertion in file.assertions:
        if isinstance(assertion, CheckpointAssertion):
            found = problems_of(checked, assertion.metric, **assertion.parameters)[1]
            for finding in [each for each in found if not each.note][:3]:
                yield f"{assertion.id} fails: {finding.tensor}: {finding.what}; mend it, and run this again"


def _sections(file: SuiteFile) -> dict[str, dict[str, Any]]:
    """Return the sections to write; a path of the command line becomes relative to the suite's folder."""
    data = file.source.data
    sections = {name: dict(data[name]) for name in ("model", "data", "generation", "memory") if name in data}
    for name, key in (("data", "source"), ("generation", "prompts")):
        named = sections.get(name, {}).get(key, "")
        if named.startswith("custom:"):
            relative = os.path.relpath(named.removeprefix("custom:"), Path(file.path).parent)
            sections[name][key] = f"custom:{relative}"
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
