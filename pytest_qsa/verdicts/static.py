"""The findings of a check against a budget → a Verdict, and what a reader wants to know of the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..captures import FilesProvenance, ModelProvenance, Provenance
from ..checkpoint import Files, Finding, Relation
from ..metrics import Bounds, Series
from .verdict import Kind, Verdict, judge_bounds


def judge_problems(
    series: Series, found: Sequence[Finding], bounds: Bounds | Sequence[Bounds], files: Files, text: str = ""
) -> Verdict:
    """Hold the number of problems of each layer against a budget; the verdict carries the findings.

    Raises:
        AnomalyError: there is no layer.
    """
    verdict = replace(judge_bounds(series, bounds, text), run=provenance(files))
    if not found:
        return replace(verdict, headline=f"{len(series.layers)} layers without a problem{_unseen(series, files)}")
    layers = {finding.layer for finding in found}
    many = f"{len(found)} problem{'s' if len(found) > 1 else ''} in {len(layers)} of {len(series.layers)} layers"
    headline = f"{many} ({verdict.bound}); the first: {found[0].tensor}: {found[0].what}"
    return replace(verdict, headline=headline, findings=tuple(found))


def _unseen(series: Series, files: Files) -> str:
    """Say what a passed health check did not look at."""
    if series.query.metric == "checkpoint_health" and files.reference is None:
        return "; settings were not compared, for the suite names no model.reference"
    return ""


def by_design(verdict: Verdict, relation: Relation, blocks: Sequence[str]) -> Verdict:
    """Say of layers that are out of bounds against the reference that they differ from it by design, where they do.

    Whole blocks of a smoothed model can be compared, so what is out of bounds there stays a regression.
    """
    failing = [row.layer for row in verdict.rows if row.excess]
    sound = relation.compare == "blocks" and any(layer in blocks for layer in failing)
    if relation.compare == "layers" or sound:
        return verdict
    text = f"by design single layers can't be held against model.reference: {relation.why} ({relation.kind})"
    kind = verdict.kind if verdict.kind is Kind.WARNED else Kind.ANOMALOUS
    return replace(verdict, kind=kind, headline=text, hints=[*verdict.hints, _INSTEAD[relation.compare]])


_INSTEAD = {
    "blocks": "compare whole blocks (sqnr at the output of the blocks) or predictions (kl_divergence, same_top)",
    "logits": "compare what the model predicts: kl_divergence, same_top, ln_ppl_ratio",
}


def provenance(files: Files) -> Provenance:
    """Return what the checks read: the folder, how many files and tensors, the declared format, the reference."""
    folder, quantization = files.folder, files.folder.quantization
    names = {tensor.file for tensor in folder.tensors.values()}
    form = quantization.get("format") or quantization.get("bits") or ""
    read = FilesProvenance(len(names), len(folder.tensors), f"{files.format.label} {form}".strip())
    return Provenance(
        ModelProvenance(str(folder.path), files=read),
        reference=ModelProvenance(str(files.reference.path)) if files.reference else None,
    )
