"""The last release, which a bound may follow: its numbers, of a capture, of baselines, or of a pass of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..captures import Capture
from ..common import AnomalyError, BaselineError, InfraError
from ..metrics import Series
from ..suite import Subject
from .baseline_file import BaselineFile, check_comparable
from .baselines import baseline_folder


@dataclass(frozen=True)
class Release:
    """The last release. `name`: as `model.previous` writes it. `kept`: its capture, or its folder of baselines.

    `capture`: returns its capture, from the kept file or from a pass of its own; not called for baselines.
    """

    name: str
    kept: Path | None
    capture: Callable[[], Capture]

    def values(
        self, series: Series, data: str | None, id: str, measure: Callable[[Capture], Series]
    ) -> Mapping[str, float]:
        """Return layer → its value in the last release. `data`: the hash of the present tokens.

        `id`: the assertion's, which names its baseline. `measure`: computes the same series of another capture.

        Raises:
            AnomalyError: it has no such number, or one of another definition, other tokens or other layers.
            InfraError: its capture can't be read or made.
        """
        if self.kept is not None and self.kept.is_dir():
            release, exact = self._baseline(self.kept / f"{id}.json"), None
        else:
            capture = self.capture()
            exact = measure(capture)
            release = BaselineFile.of(exact, capture.provenance.data.fingerprint)
        try:
            check_comparable(series, release, data)
        except BaselineError as error:
            text = str(error).replace("the baseline", "the last release", 1)
            raise AnomalyError(f"model.previous '{self.name}': {text}") from None
        # a baseline holds rounded values; a capture gives exact ones
        return release.values if exact is None else dict(zip(exact.layers, exact.values.tolist(), strict=True))

    def _baseline(self, file: Path) -> BaselineFile:
        try:
            return BaselineFile.parse(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise AnomalyError(
                f"model.previous '{self.name}' has no baseline {file.name}: give the assertion a baseline and make "
                "that release's with --snapshot-update, or name its capture or checkpoint"
            ) from None
        except OSError as error:
            raise InfraError(f"model.previous '{self.name}': {file.name} can't be read: {error.strerror}") from None
        except BaselineError as error:
            raise AnomalyError(f"model.previous '{self.name}': {error}") from None


def kept_release(subject: Subject, suite: Path) -> Path | None:
    """Return where the last release's numbers are kept: a capture's file or a folder of baselines; None for neither."""
    assert subject.model is not None
    assert subject.model.previous is not None
    named = subject.folder / subject.model.previous
    if named.is_dir():
        return None
    folder = baseline_folder(suite, subject.model.previous)
    return named if named.is_file() else folder if folder.is_dir() else None
