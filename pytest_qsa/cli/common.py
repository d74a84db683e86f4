"""What the commands have in common: the model of a configuration, what its pictures need, and keeping a capture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..common import InfraError, SuiteError, shown_path

if TYPE_CHECKING:
    from ..captures import Capture
    from ..suite import Model, Subject, SuiteFile
    from ..tools import Analysis


def subject_of(file: SuiteFile) -> tuple[Model, Subject]:
    """Return the model section of a file, and the subject that it stands for.

    Raises:
        SuiteError: there is none.
    """
    from ..suite import Subject

    suite = file.suite
    if suite.model is None:
        raise SuiteError(f"{shown_path(file.path)}:1: there is no section 'model'")
    return suite.model, Subject(suite.model.id, suite.model, suite.data, suite.memory, file.path.parent)


def planned(file: SuiteFile, names: Sequence[str]) -> Analysis:
    """Return the pictures that a file enables, with their layers among a model's `names`.

    Raises:
        SuiteError: nothing is enabled, a pattern finds no layer, or there is no such sample; at its line.
    """
    from ..tools import PatternError, plan_pictures

    visualization, data = file.suite.visualization, file.suite.data
    if visualization.enabled.heatmap_3d and visualization.heatmap_3d.sample_idx >= data.num_samples:
        raise file.source.error(
            ("visualization", "heatmap_3d", "sample_idx"),
            f"sample_idx {visualization.heatmap_3d.sample_idx}: the {data.num_samples} samples begin with 0",
        )
    try:
        analysis = plan_pictures(visualization, names)
    except PatternError as error:
        raise file.source.error(error.location, str(error)) from None
    if not analysis.pictures:
        raise file.source.error(("visualization", "enabled"), "nothing is enabled: there is nothing to draw")
    return analysis


def keep(capture: Capture, file: Path) -> None:
    """Write a capture where the user wants it.

    Raises:
        InfraError: it can't be written there.
    """
    try:
        capture.save(file)
    except OSError as error:
        raise InfraError(f"{shown_path(file)} can't be written: {error.strerror or error}") from None
