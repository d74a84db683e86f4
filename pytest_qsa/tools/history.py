"""A number over the releases, from what a repository keeps anyway: baselines at its git tags, and reports of runs."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..captures import Provenance
from ..common import BaselineError, InfraError, SuiteError, counted, did_you_mean, shown_path
from ..metrics import CHECKPOINT, METRICS
from ..report import History, Point, Track, read_report
from ..suite import Assertion, SuiteFile, subject_of
from ..verdicts import EDITED, BaselineFile, baseline_folder, read_baseline
from .revision import Revision, tags_of

MOST_TAGS = 200
"""The most tags that are read, the latest; each takes two starts of git."""


@dataclass
class _Found:
    """The points of an assertion on a subject, and what is known of the number."""

    points: list[Point] = field(default_factory=list)
    text: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Historian:
    """Reads the history of a suite. `id`: of one assertion, None for all. `layer`: whose number, None for the worst.

    `reports`: patterns of the paths of reports.
    """

    file: SuiteFile
    id: str | None = None
    layer: str | None = None
    reports: Sequence[str] = ()

    def read(self) -> History:
        """Return all that is known of the suite's numbers.

        Raises:
            SuiteError: the suite has no such assertion, or a pattern matches no report.
            InfraError: a report can't be read; or there is no number at all.
        """
        notes: list[str] = []
        results = list(self._results())
        found: dict[tuple[str, str], _Found] = {}
        own = self.file.suite.model.id if self.file.suite.model else "model"
        subjects = list(dict.fromkeys([own, *(result["subject"] for _, result in results)]))
        revisions = self._revisions(notes)
        for assertion in self._assertions():
            for subject in subjects:
                text = f"{assertion.query}, at {self.layer}" if self.layer else str(assertion.query)
                known = found.setdefault((assertion.id, subject), _Found(text=text, unit=assertion.query.unit))
                known.points += self._baselines(assertion, subject, revisions, notes)
                known.points += [
                    self._measured(session, result)
                    for session, result in results
                    if (result["id"], result["subject"]) == (assertion.id, subject) and self._rows(result)
                ]
        tracks = [
            Track(name, subject, sorted(of.points, key=lambda point: _time(point.when)), of.text, of.unit)
            for (name, subject), of in found.items()
            if of.points
        ]
        if not tracks:
            own_layer = f"no layer '{self.layer}' is in its baselines" if self.layer else ""
            why = "; ".join(filter(None, [own_layer, *notes])) or "no baseline of it is in git's tags or beside it"
            raise InfraError(
                f"{shown_path(self.file.path)}: no number to show: {why}; --reports GLOB names reports of runs"
            )
        return History(shown_path(self.file.path), tracks, list(dict.fromkeys(notes)))

    def _assertions(self) -> list[Assertion]:
        if self.id is None:
            return list(self.file.assertions)
        chosen = [each for each in self.file.assertions if each.id == self.id]
        if not chosen:
            known = [each.id for each in self.file.assertions]
            raise SuiteError(f"{shown_path(self.file.path)} has no assertion '{self.id}'{did_you_mean(self.id, known)}")
        return chosen

    def _revisions(self, notes: list[str]) -> list[tuple[Revision, str]]:
        """Return the commits of the tags with their time, oldest first; notes say what can't be seen."""
        try:
            tags, shallow = tags_of(self.file.path.parent)
        except InfraError as error:
            notes.append(f"no releases are shown: {error}")
            return []
        if shallow:
            notes.append(
                f"the clone is shallow and has {counted(len(tags), 'tag')}: `git fetch --unshallow --tags` brings the "
                "earlier releases"
            )
        elif not tags:
            notes.append("no git tag leads to this commit, so there are no releases to show")
        if len(tags) > MOST_TAGS:
            notes.append(f"of {len(tags)} tags the last {MOST_TAGS} were read")
        return [(Revision.of(name, self.file.path.parent), when) for name, when in tags[-MOST_TAGS:]]

    def _baselines(
        self, assertion: Assertion, subject: str, revisions: Iterable[tuple[Revision, str]], notes: list[str]
    ) -> Iterator[Point]:
        """Yield the baseline of each release, and the one in the working tree."""
        # An engine, or a rounded KV cache, has baselines of its own.
        own = replace(subject_of(self.file), name=subject).baseline_name if self.file.suite.model else subject
        path = baseline_folder(self.file.path, own) / f"{assertion.id}.json"
        for revision, when in revisions:
            text = revision.text(path)
            if text is None:
                continue
            try:
                baseline = BaselineFile.parse(text)
                point = self._kept(baseline, revision.name, when)
            except BaselineError as error:
                notes.append(f"{revision.name}: {path.name}: {error}")
                continue
            if baseline.edited:
                notes.append(f"{revision.name}: {path.name}: {EDITED}")
            yield from [point] if point else []
        if path.is_file():
            point = self._kept(read_baseline(path), "working tree", "")
            yield from [point] if point else []

    def _kept(self, baseline: BaselineFile, label: str, when: str) -> Point | None:
        definition = str(baseline.query.get("definition", ""))
        values = {name: value for name, value in baseline.values.items() if self.layer in (None, name)}
        if not values:
            return None
        layer = _worst(definition.partition("/")[0], values)
        tokens = "" if baseline.query.get("site") == "weight" else baseline.data or ""
        return Point(label, when, values, layer, compared=(definition, tokens))

    def _results(self) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
        """Yield each result of the suite in the reports with its session; copies of one run once."""
        seen: set[tuple[str, str]] = set()
        for pattern in self.reports:
            paths = sorted(glob.glob(pattern, recursive=True))
            if not paths:
                raise SuiteError(f"--reports '{pattern}': there is no such file")
            for path in map(Path, paths):
                report = read_report(path)
                if report is None:
                    raise SuiteError(f"{shown_path(path)}: no report.json of this program")
                try:
                    session = report["session"]
                    key = (str(session["started"]), str(session["command"]))
                    if key not in seen:
                        seen.add(key)
                        yield from ((session, each) for each in report["results"] if self._is_own(each))
                except (KeyError, TypeError, AttributeError, ValueError) as error:
                    text = f"a damaged report.json: {type(error).__name__}: {error}"
                    raise SuiteError(f"{shown_path(path)}: {text}") from None

    def _is_own(self, result: Mapping[str, Any]) -> bool:
        _ = result["id"], result["subject"], result["kind"], result["query"].get("definition")
        for row in result["rows"]:
            _ = row["layer"], float(row["value"]), row["low"], row["high"]
        return Path(str(result["nodeid"]).partition("::")[0]).name == self.file.path.name

    def _rows(self, result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
        return {row["layer"]: row for row in result["rows"] if self.layer in (None, row["layer"])}

    def _measured(self, session: Mapping[str, Any], result: Mapping[str, Any]) -> Point:
        rows, query = self._rows(result), result["query"]
        values = {name: float(row["value"]) for name, row in rows.items()}
        if query.get("site") == CHECKPOINT and not self.layer:
            # Of a static check all problems together are the number, as a comparison has it.
            name, row = next(iter(rows.items()))
            rows, values = {name: row}, {name: sum(values.values())}
        layer = _worst(query.get("metric", ""), values)
        row = rows[layer]
        tokens = Provenance.of(result.get("run") or {}).data.fingerprint if query.get("site") != "weight" else ""
        low, high = (None if row[end] is None else float(row[end]) for end in ("low", "high"))
        return Point(
            f"report {session['started'][11:16]}", str(session["started"]), values, layer, release=False,
            compared=(str(query.get("definition") or ""), tokens or ""), low=low, high=high, kind=result["kind"],
        )  # fmt: skip


def _worst(metric: str, values: Mapping[str, float]) -> str:
    known = METRICS.get(metric)
    lowest = known is not None and known.worst == "lowest"
    return (min if lowest else max)(values, key=lambda name: values[name])


def _time(when: str) -> datetime:
    """Return the key by which points are sorted; what has no time is of now."""
    if not when:
        return datetime.max.replace(tzinfo=UTC)
    found = datetime.fromisoformat(when)
    return found if found.tzinfo else found.replace(tzinfo=UTC)
