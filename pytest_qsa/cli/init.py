"""`qsa init`: a first suite of a model, its bounds calibrated, each assertion with why it is there.

With an original, `--reference`, the suite also holds the model against it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common import AnomalyError, InfraError, shown_path
from .codes import OK
from .common import subject_of
from .sampling import add_sampling, data_text, lines_of, sample

if TYPE_CHECKING:
    from ..checkpoint import Compare
    from ..suite import Subject, SuiteFile
    from ..tools import Draft, Finding, Sampled

Sections = Mapping[str, Mapping[str, Any]]


def run(arguments: Sequence[str]) -> int:
    """Measure the model over parts of the data and write the suite.

    Raises:
        SuiteError: an option is wrong.
        InfraError: the model or data can't be had, or the file is there already.
    """
    from ..common import write_atomically
    from ..tools import calibrated, draft_text
    from .overrides import parse_with_overrides

    options, overrides = parse_with_overrides(_parser(), arguments)
    target = options.output or Path(f"{_name(options.model)}.qsa.yaml")
    if target.exists() and not options.force:
        raise InfraError(f"{shown_path(target)} exists: give --force to replace it, or another -o")
    file, sampled, drafts, told = _drafted(_sections(options, target), overrides, target, options)
    kept, findings, left = _calibrated(file, sampled, drafts, options.k)
    text = draft_text(_head(file, sampled, options.k), _relative(file.source.data, target), kept)
    proposals = {each.id: each.proposals for each in findings if each.proposals}
    write_atomically(target, calibrated(text, proposals, data_text(sampled, file))[0])
    print(
        "\n".join(
            [*lines_of(findings, sampled, file, stated=False), *told, *left, *_health(file), *_next(target, kept)]
        )
    )
    return OK


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qsa init", usage="qsa init MODEL [--reference ORIGINAL] [-o FILE.qsa.yaml] [options] [--KEY VALUE …]",
        description="Write a first suite of a model, whose bounds are what its numbers are over parts of the data, "
        "with room for how much they vary.",
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("model", metavar="MODEL", help="a checkpoint's folder, or a hub id")
    parser.add_argument("--reference", metavar="ORIGINAL", help="what the model was made from: hold it against that")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="default: the model's name, .qsa.yaml")
    add_sampling(parser)
    parser.add_argument("--force", action="store_true", help="replace the file if it is there")
    return parser


def _name(model: str) -> str:
    return Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]


def _sections(options: argparse.Namespace, target: Path) -> dict[str, dict[str, Any]]:
    """Return what the suite says of model and data unless the command line says otherwise."""
    from ..suite import Data

    model = {"name": _name(options.model), "path": _named(options.model, target)}
    if options.reference is not None:
        model["reference"] = _named(options.reference, target)
    return {"model": model, "data": Data().model_dump(include={"source", "num_samples", "seq_len", "seed"})}


def _named(model: str, target: Path) -> str:
    """Return a folder relative to the suite's, a hub id as it is."""
    path = Path(model).expanduser()
    return os.path.relpath(path, target.parent) if path.is_dir() else model


def _drafted(
    sections: Sections, overrides: Sequence[str], target: Path, options: argparse.Namespace
) -> tuple[SuiteFile, Sampled, list[Draft], list[str]]:
    """Draft what a pass answers, make it, and draft the rest of what is then known; say what can't be compared."""
    from ..engine import anatomy
    from ..suite import YamlSource, make_suite
    from ..tools import FILES, measured_drafts, sinks_of

    model, subject = subject_of(make_suite(YamlSource(target, sections), overrides, "--"))
    parts = anatomy(model, subject.path)
    unquantized, compare, told = _comparable(subject)
    drafts = measured_drafts(parts, compare)
    source = YamlSource(target, {**sections, "assertions": [draft.entry for draft in drafts]})
    file = make_suite(source, overrides, "--")
    sampled = sample(file, options)
    drafts = [FILES, *unquantized, *drafts, *sinks_of(sampled.whole, parts)]
    source = YamlSource(target, {**source.data, "assertions": [draft.entry for draft in drafts]})
    return make_suite(source), sampled, drafts, told


def _comparable(subject: Subject) -> tuple[list[Draft], Compare | None, list[str]]:
    """Return the static draft that compares, what can be compared (None without a reference), and what is to be said.

    Raises:
        InfraError: the reference is no checkpoint that is here.
    """
    from ..checkpoint import compare_norms, problems_of
    from ..suite import files_of, kept_reference
    from ..tools import COMPARED, UNQUANTIZED

    if subject.model is None or subject.model.reference is None:
        return [], None, []
    if kept_reference(subject) is not None:
        return [], "layers", []  # the pass says that it takes the model itself
    files = files_of(subject)
    assert files.reference is not None
    relation = compare_norms(files.folder, files.reference)
    told = [f"{relation.why}: {COMPARED[relation.compare]}"] if relation.why else []
    try:
        found = problems_of(files, "checkpoint_unquantized")[1]
    except AnomalyError as error:
        return [], relation.compare, [*told, f"left out: unquantized: {error}"]
    if not found:
        return [UNQUANTIZED], relation.compare, told
    first = f"left out: unquantized: {found[0].tensor}: {found[0].what}; if it is not meant so, mend it"
    return [], relation.compare, [*told, first]


def _calibrated(
    file: SuiteFile, sampled: Sampled, drafts: Sequence[Draft], k: float
) -> tuple[list[Draft], list[Finding], list[str]]:
    """Calibrate the open bounds; return the drafts that the model can be held to, and say which it can't."""
    kept, findings, left = [], [], []
    for draft, assertion in zip(drafts, file.assertions, strict=True):
        try:
            finding = sampled.finding(assertion, k)
        except AnomalyError as error:
            left.append(f"left out: {assertion.id}: {error}")
            continue
        kept.append(draft)
        if draft.open:
            findings.append(finding)
    return kept, findings, left


def _relative(data: Sections, target: Path) -> Sections:
    """Return the sections for the file, a path of the command line relative to its folder."""
    sections = {name: dict(data[name]) for name in ("model", "data", "memory") if name in data}
    source = sections["data"]["source"]
    if source.startswith("custom:"):
        sections["data"]["source"] = f"custom:{os.path.relpath(source.removeprefix('custom:'), target.parent)}"
    return sections


def _head(file: SuiteFile, sampled: Sampled, k: float) -> list[str]:
    assert file.suite.model is not None
    return [
        f"The gate of {file.suite.model.id}, a first one by `qsa init`: read it, change it, commit it.",
        f"A bound with `noise` beside it is mean ± {k:g} sigma over {data_text(sampled, file)}, rounded outward;",
        "none may be tighter. `qsa calibrate` measures them again.",
    ]


def _health(file: SuiteFile) -> Iterator[str]:
    """Say what the static checks find already: numbers of a broken checkpoint bound nothing."""
    from ..checkpoint import problems_of
    from ..suite import files_of

    files = files_of(subject_of(file)[1])
    for assertion in file.assertions:
        if assertion.metric.startswith("checkpoint_"):
            found = problems_of(files, assertion.metric, **assertion.parameters)[1]  # type: ignore[attr-defined]
            for finding in found[:3]:
                yield f"{assertion.id} fails: {finding.tensor}: {finding.what}; mend it, and run this again"


def _next(target: Path, drafts: Sequence[Draft]) -> Iterator[str]:
    shown = shown_path(target)
    baselines = [draft.keys["id"] for draft in drafts if "baseline" in draft.keys]
    yield f"{shown} is written: {len(drafts)} assertions. Next:"
    if baselines:
        yield f"  pytest {shown} --snapshot-update    # once, for the baselines of {', '.join(baselines)}; commit them"
    yield f"  pytest {shown}"
    yield f"  qsa selftest {shown}    # which faults it would catch"
