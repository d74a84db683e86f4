"""Baselines in git: small, sorted, rounded JSON whose diff is reviewed, read and written through syrupy.

syrupy finds a baseline's path, rewrites it on `--snapshot-update`, and reports unused files. It asks the class of an
extension for paths and passes it only the test, so the folder is put on the item's stash.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode

from ..captures import ModelProvenance, since_text
from ..common import BaselineError, InfraError, remove_unfinished, shown_path, write_atomically
from ..metrics import Series
from ..suite import Location
from .baseline_file import (
    BASELINES,
    EDITED,
    BaselineFile,
    Tolerance,
    check_comparable,
    is_baseline,
    read_baseline,
    readable,
    rounded,
)
from .judgement import NO_LENIENCY, Judgement, Leniency, interval_text, judged
from .verdict import Kind, Row

if TYPE_CHECKING:
    from syrupy.assertion import SnapshotAssertion
    from syrupy.data import SnapshotCollection
    from syrupy.location import PyTestLocation
    from syrupy.types import SerializedData, SnapshotIndex

BASELINE: Location = ("baseline",)
"""The key of an assertion that states its baseline."""
CLASS = re.compile(r"@(cpu|mps|xpu|sm_\d+|gfx\w+)$")
"""Matches the suffix of a baseline's name that names a class of devices; an assertion's id has no `@`."""
READ_WRONGLY = ("bitsandbytes", "fp8", "mxfp4", "mxfp8", "modelopt", "gptq", "awq", "auto-round")
"""The formats whose codes an earlier version took for weights, or multiplied by other scales."""
BASELINE_FOLDER = pytest.StashKey[Path]()
"""On an item: the folder of its baselines."""
BASELINE_NAME = pytest.StashKey[str]()
"""On an item: the name of its baselines, without the id of a checkpoint."""


class QsaBaselineExtension(SingleFileSnapshotExtension):
    """One JSON file for each assertion, under the suite's own folder and never among syrupy's own snapshots."""

    file_extension = "json"
    _write_mode = WriteMode.TEXT

    def __init__(self) -> None:
        super().__init__()
        self.accepts = False

    def matches(self, *, serialized_data: SerializedData, snapshot_data: SerializedData) -> bool:
        """Return whether the judgement passed: a baseline within its tolerance is not rewritten."""
        return self.accepts

    @classmethod
    def dirname(cls, *, test_location: PyTestLocation) -> str:
        """Return `<suite's folder>/qsa_baselines/<model.name>/<suite's name>`.

        syrupy asks this of every collected test, gates or not; one that has not run owns a folder that can't exist.
        """
        nowhere = Path(test_location.filepath).parent / BASELINES / "\N{EMPTY SET}" / "\N{EMPTY SET}"
        return str(test_location.item.stash.get(BASELINE_FOLDER, nowhere))

    @classmethod
    def discovery_dirname(cls, *, test_location: PyTestLocation) -> str:
        """Return the folder above: syrupy then leaves alone each file that `owns_snapshot_collection` doesn't claim."""
        return str(Path(cls.dirname(test_location=test_location)).parent)

    def owns_snapshot_collection(self, *, filepath: str, test_location: PyTestLocation) -> bool:
        """Claim the baselines directly in the folder of this suite and this model, and nothing else there.

        Those of device classes are never claimed: a run sees one class, and the files of the others are still in use.
        """
        path = Path(filepath)
        here = path.parent == Path(self.dirname(test_location=test_location))
        return here and is_baseline(path) and not _has_classes(path)

    @classmethod
    def get_snapshot_name(cls, *, test_location: PyTestLocation, index: SnapshotIndex = 0) -> str:
        """Return the assertion's id, whatever checkpoint stands in the test's own."""
        return test_location.item.stash.get(BASELINE_NAME, test_location.item.name) + (f".{index}" if index else "")

    @classmethod
    def matches_test_location(cls, *, test_location: PyTestLocation, snapshot_location: str) -> bool:
        """Relate a file to its test by folder and id."""
        name, location = cls.get_snapshot_name(test_location=test_location), Path(snapshot_location)
        numbered = location.stem.removeprefix(f"{name}.")
        same = location.stem == name or (location.stem.startswith(f"{name}.") and numbered.isdigit())
        return same and location.parent == Path(cls.dirname(test_location=test_location))

    def read_snapshot_data_from_location(
        self, *, snapshot_location: str, snapshot_name: str, session_id: str
    ) -> SerializedData | None:
        """Read whatever bytes are there, so that a damaged baseline can be made anew."""
        _tidy(Path(snapshot_location).parent)
        if not readable(Path(snapshot_location)):
            return None
        try:
            return Path(snapshot_location).read_bytes().decode("utf-8", "replace")
        except OSError:
            return None

    @classmethod
    def write_snapshot_collection(
        cls, *, snapshot_collection: SnapshotCollection, name_order: dict[str, int] | None = None
    ) -> None:
        """Write atomically."""
        write_atomically(Path(snapshot_collection.location), str(next(iter(snapshot_collection)).data))


@cache
def _tidy(folder: Path) -> None:
    """Remove what a killed update left, once a process: a run that only reads baselines writes nothing there."""
    remove_unfinished(folder)


def _has_classes(path: Path) -> bool:
    return bool(CLASS.search(path.stem)) or any(
        CLASS.search(other.stem) for other in path.parent.glob(f"{path.stem}@*")
    )


def name_for_class(
    shared: Path,
    series: Series,
    tolerance: Tolerance,
    data: str | None,
    made_with: ModelProvenance,
    *,
    updating: bool,
) -> str:
    """Return the name of the baseline of this run's device class: its own, or that which all classes share.

    A class gets one of its own by an update, where its numbers don't fit what another class has made.
    """
    own = f"{shared.stem}@{made_with.device_class}"
    if shared.with_name(f"{own}.json").exists():
        return own
    if updating and shared.exists():
        judgement, _ = _judgement(shared, series, tolerance, data, made_with)
        if (judgement is None or judgement.failed) and _class_of(shared) not in (None, made_with.device_class):
            return own
    return shared.stem


def _class_of(baseline: Path) -> str | None:
    """Return the device class that made a baseline; None for one that can't be read, which is made anew."""
    if not readable(baseline):
        return None
    try:
        made_with = BaselineFile.parse(baseline.read_text(encoding="utf-8")).made_with
    except (OSError, BaselineError):
        return None
    # A baseline that was made for all devices names its device, but no class.
    return made_with.device_class or ("cpu" if made_with.device == "cpu" else "another")


def within_baseline(
    series: Series,
    baseline: BaselineFile,
    tolerance: Tolerance,
    data: str | None,
    made_with: ModelProvenance,
    leniency: Leniency = NO_LENIENCY,
) -> Judgement:
    """Hold every layer against its own baseline. `data`: the hash of the present tokens; `made_with`: this model.

    Raises:
        AnomalyError: as `within_budget`.
        BaselineError: another definition, other tokens, or layers that appeared or vanished.
    """
    series.check()
    doubt = _doubt(series, baseline, made_with)
    try:
        check_comparable(series, baseline, data)
    except BaselineError as error:
        raise BaselineError(f"{error}{doubt}") from None
    rows = []
    for depth, (layer, exact) in enumerate(zip(series.layers, series.values.tolist(), strict=True)):
        # the baseline is rounded: an unrounded value would differ from its own baseline at a tolerance of 0
        value, kept = rounded(exact), baseline.values[layer]
        bounds, detail = tolerance.bounds(kept), interval_text(series, layer)
        rows.append(Row(layer, value, bounds.low, bounds.high, kept, bounds.excess(value), depth, detail=detail))
    since = since_text(baseline.made_with, made_with) + (f"; {EDITED}" if baseline.edited else "")
    found = judged(rows, series.query, str(tolerance), leniency)
    headline = found.headline + (doubt if found.kind is not Kind.PASSED else "")
    updatable = found.updatable or baseline.edited
    return replace(found, headline=headline, key=BASELINE, since=since, updatable=updatable)


def _doubt(series: Series, baseline: BaselineFile, made_with: ModelProvenance) -> str:
    """Say of a baseline of weights that an earlier version may have read them wrongly; empty for any other.

    Since all formats are read rightly, a baseline names that of its checkpoint.
    """
    if series.query.site != "weight" or baseline.made_with.format is not None:
        return ""
    form = (made_with.format or "").partition("_")[0]
    what = "without the adapter" if made_with.adapter else f"of {form} wrongly" if form in READ_WRONGLY else ""
    return f"; it was recorded by a version that read weights {what}: if these are right, update it" if what else ""


def judge_against_baseline(
    series: Series,
    tolerance: Tolerance,
    snapshot: SnapshotAssertion,
    data: str | None,
    made_with: ModelProvenance,
    leniency: Leniency = NO_LENIENCY,
) -> Judgement:
    """Hold a series against its baseline; with `--snapshot-update` the baseline follows where it doesn't fit.

    Raises:
        BaselineError: the baseline is missing, or can't be compared.
        InfraError: syrupy could not read or write it.
    """
    series.check()
    extension = snapshot.extension
    assert isinstance(extension, QsaBaselineExtension)
    location = Path(extension.get_location(test_location=snapshot.test_location, index=snapshot.index))
    existed = location.exists()
    judgement, problem = _judgement(location, series, tolerance, data, made_with, leniency)
    # One that was edited is written again by an update, though it fits.
    mended = judgement is not None and judgement.updatable and snapshot.update_snapshots
    extension.accepts = judgement is not None and judgement.kind is Kind.PASSED and not mended
    # comparing with a snapshot is what makes syrupy write it
    written = snapshot == BaselineFile.of(series, data, made_with).dump()
    if not extension.accepts and written:
        text = f"the baseline {location.name} was {'updated' if existed else 'created'}"
        uses = leniency.uses(())
        return Judgement(Kind.PASSED, text, series.query.plain(), bound=str(tolerance), key=BASELINE, waivers=uses)
    # syrupy keeps an error of reading or writing here, and only says that nothing is equal.
    failure = [*snapshot.executions.values()][-1].exception if not written else None
    if failure is not None:
        raise InfraError(f"the baseline {location.name} can't be used: {type(failure).__name__}: {failure}")
    if problem is not None:
        raise problem
    assert judgement is not None
    return judgement


def _judgement(
    location: Path,
    series: Series,
    tolerance: Tolerance,
    data: str | None,
    made_with: ModelProvenance,
    leniency: Leniency = NO_LENIENCY,
) -> tuple[Judgement | None, BaselineError | None]:
    try:
        return within_baseline(series, read_baseline(location), tolerance, data, made_with, leniency), None
    except (FileNotFoundError, NotADirectoryError):
        return None, BaselineError(
            f"there is no baseline yet ({shown_path(location)}); make one with --snapshot-update, and commit it"
        )
    except BaselineError as error:
        return None, error
