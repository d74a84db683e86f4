"""The last release, which a bound may follow: its numbers, of a capture, of baselines, or of a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from ..captures import Capture
from ..common import AnomalyError, BaselineError
from ..metrics import Series
from ..suite import Subject
from .baseline_file import BaselineFile
from .baselines import baseline_folder
from .verdict import check_comparable

Measure = Callable[[Capture], Series]


def kept_release(subject: Subject, suite: Path) -> Path | None:
    """Return where the last release's numbers are kept: a capture's file or a folder of baselines; None for neither."""
    assert subject.model is not None
    assert subject.model.previous is not None
    named = subject.folder / subject.model.previous
    if named.is_dir():
        return None
    folder = baseline_folder(suite, subject.model.previous)
    return named if named.is_file() else folder if folder.is_dir() else None


def previous_values(
    series: Series,
    data: str | None,
    name: str,
    kept: Path | None,
    id: str,
    measure: Measure,
    run: Callable[[], Capture],
) -> Mapping[str, float]:
    """Return layer → value of the last release. `run`: returns its capture, of a file or of a pass.

    Raises:
        AnomalyError: it has no such number, or one of another definition, other tokens or other layers.
        InfraError: its capture can't be read or made.
    """
    if kept is not None and kept.is_dir():
        release, exact = _baseline(kept / f"{id}.json", name), None
    else:
        capture = run()
        exact = measure(capture)
        release = BaselineFile.of(exact, capture.provenance.data.fingerprint)
    try:
        check_comparable(series, release, data)
    except BaselineError as error:
        text = str(error).replace("the baseline", "the last release", 1)
        raise AnomalyError(f"model.previous '{name}': {text}") from None
    return release.values if exact is None else dict(zip(exact.layers, exact.values.tolist(), strict=True))


def _baseline(file: Path, name: str) -> BaselineFile:
    try:
        return BaselineFile.parse(file.read_text(encoding="utf-8"))
    except OSError:
        raise AnomalyError(
            f"model.previous '{name}' has no baseline {file.name}: give the assertion a baseline and make "
            "that release's with --snapshot-update, or name its capture or checkpoint"
        ) from None
    except BaselineError as error:
        raise AnomalyError(f"model.previous '{name}': {error}") from None
