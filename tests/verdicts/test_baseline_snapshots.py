"""Baselines as syrupy's snapshots: where they lie, whose they are, and when a run may rewrite one."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pytest_qsa.captures import ModelProvenance
from pytest_qsa.common import BaselineError, InfraError, QsaWarning
from pytest_qsa.verdicts import (
    BASELINE_FOLDER,
    BASELINE_NAME,
    BaselineFile,
    Kind,
    QsaBaselineExtension,
    Tolerance,
    baseline_folder,
    judge_against_baseline,
    name_for_class,
    read_baseline,
)  # fmt: skip
from support.judged import capture_of

CPU = ModelProvenance(device="cpu", device_class="cpu")
GPU = ModelProvenance(device="cuda:0", device_class="sm_90")


def series(*values):
    return capture_of([[value] * 4 for value in values]).output("layers").magnitude(stat="top1", reduce_dim=-1)


@pytest.fixture
def location(tmp_path):
    """Return the location of a gate `drift` whose baselines lie in a folder of their own."""
    stash = {BASELINE_FOLDER: tmp_path / "qsa_baselines" / "llama" / "a", BASELINE_NAME: "drift"}
    item = SimpleNamespace(name="drift[one]", stash=stash)
    return SimpleNamespace(item=item, filepath=str(tmp_path / "a.qsa.yaml"))


class Snapshot:
    """As much of syrupy's assertion as a baseline needs: it compares, and writes where the run updates."""

    def __init__(self, location, *, update=False, error=None):
        self.extension, self.test_location, self.index = QsaBaselineExtension(), location, 0
        self.update_snapshots, self.error, self.executions = update, error, {}

    __hash__ = None

    def __eq__(self, text):
        file = Path(self.extension.get_location(test_location=self.test_location, index=self.index))
        self.executions[0] = SimpleNamespace(exception=self.error)
        matches = self.extension.matches(serialized_data=text, snapshot_data="")
        if self.update_snapshots and not matches and self.error is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return matches or (self.update_snapshots and self.error is None)


def judged(location, values, *, tolerance=0.1, made_with=CPU, **snapshot):
    return judge_against_baseline(
        series(*values), Tolerance(tolerance), Snapshot(location, **snapshot), None, made_with
    )


@pytest.fixture
def drift(location):
    """Return the file of the baseline of two layers, 1 and 2."""
    assert judged(location, [1, 2], update=True).kind is Kind.PASSED
    return location.item.stash[BASELINE_FOLDER] / "drift.json"


def test_a_baseline_is_made_by_an_update_and_met_within_its_tolerance(location, drift):
    made = BaselineFile.parse(drift.read_text())
    assert made.values == {"layers.0": 1.0, "layers.1": 2.0}
    assert judged(location, [1.05, 2]).kind is Kind.PASSED
    assert judged(location, [1.05, 2.5]).kind is Kind.REGRESSION
    assert BaselineFile.parse(drift.read_text()) == made


def test_an_update_rewrites_what_does_not_fit_and_nothing_else(location, drift):
    before = drift.read_text()
    judged(location, [1.05, 2], update=True)
    assert drift.read_text() == before
    assert judged(location, [1.05, 3], update=True).kind is Kind.PASSED
    assert BaselineFile.parse(drift.read_text()).values["layers.1"] == 3.0


def edited(file, change):
    """Change the JSON of a baseline by hand, and write it in another layout."""
    content = json.loads(file.read_text())
    change(content)
    file.write_bytes(json.dumps(content, indent=4, sort_keys=True).replace("\n", "\r\n").encode())


EDITS = {
    "a value": lambda content: content["values"].update({"layers.0": 1.01}),
    "a layer": lambda content: content["values"].update({"layers.2": 1.0}),
    "the query": lambda content: content["query"].update(stat="top2"),
    "the data": lambda content: content.update(data="sha256:0"),
    "the hash": lambda content: content.update(content="sha256:0"),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_a_baseline_that_was_edited_by_hand_is_told(drift, change):
    edited(drift, change)
    with pytest.warns(QsaWarning, match=r"drift\.json: the baseline was edited by hand or merged since"):
        read_baseline(drift)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda content: None,
        lambda content: content.pop("content"),
        lambda content: content["made_with"].update(torch="3"),
    ],
    ids=["another layout", "no hash, as in earlier versions", "what it was made with"],
)
def test_another_layout_or_no_hash_is_no_edit(location, drift, change):
    edited(drift, change)
    assert judged(location, [1, 2]).kind is Kind.PASSED


@pytest.mark.filterwarnings("error")
def test_an_edited_baseline_fails_nothing_and_is_written_anew_by_an_update(location, drift):
    edited(drift, EDITS["a value"])
    with pytest.warns(QsaWarning, match="edited by hand"):
        judgement = judged(location, [1, 2])
    assert judgement.kind is Kind.PASSED
    assert "edited by hand or merged" in judgement.since
    with pytest.warns(QsaWarning, match="edited by hand"):
        judged(location, [1, 2], update=True)
    assert BaselineFile.parse(drift.read_text()).values["layers.0"] == 1.0
    assert judged(location, [1, 2]).kind is Kind.PASSED


def test_without_a_baseline_there_is_nothing_to_hold_against(location):
    with pytest.raises(BaselineError, match=r"there is no baseline yet \(.*drift\.json\)"):
        judged(location, [1, 2])


def test_a_damaged_baseline_is_told_and_made_anew_by_an_update(location, drift):
    drift.write_bytes(b"<<<<<<< HEAD\xff")
    with pytest.raises(BaselineError, match="can't be read"):
        judged(location, [1, 2])
    assert judged(location, [1, 2], update=True).kind is Kind.PASSED
    assert BaselineFile.parse(drift.read_text()).values["layers.0"] == 1.0


def test_a_baseline_that_can_not_be_written_is_no_regression(location):
    with pytest.raises(InfraError, match=r"the baseline drift\.json can't be used: PermissionError: no"):
        judged(location, [1, 2], update=True, error=PermissionError("no"))


@pytest.mark.parametrize(
    ("suite", "folder"),
    [
        ("gates/a.qsa.yaml", "gates/qsa_baselines/llama/a"), ("a.qsa.yml", "qsa_baselines/llama/a"),
        ("test_a.py", "qsa_baselines/llama/test_a"), ("a.yaml", "qsa_baselines/llama/a"),
    ],
)  # fmt: skip
def test_baselines_lie_beside_their_suite(suite, folder):
    assert baseline_folder(Path(suite), "llama") == Path(folder)


def test_a_run_claims_the_baselines_of_its_own_suite_and_no_other_file(location, drift):
    extension = QsaBaselineExtension()
    (drift.parent / "notes.json").write_text("{}")
    other = drift.parent.parent / "b" / "drift.json"
    other.parent.mkdir()
    other.write_text(drift.read_text())
    claimed = {
        file.name: extension.owns_snapshot_collection(filepath=str(file), test_location=location)
        for file in (drift, drift.parent / "notes.json")
    }
    assert claimed == {"drift.json": True, "notes.json": False}
    assert not extension.owns_snapshot_collection(filepath=str(other), test_location=location)
    drift.with_name("drift@sm_90.json").write_text(drift.read_text())
    assert not extension.owns_snapshot_collection(filepath=str(drift), test_location=location)


@pytest.mark.parametrize(
    ("name", "own"), [("drift", True), ("drift.1", True), ("drift.x", False), ("drifts", False), ("drift[one]", False)]
)
def test_a_baseline_is_that_of_the_assertion_whatever_the_checkpoint(location, name, own):
    file = location.item.stash[BASELINE_FOLDER] / f"{name}.json"
    assert QsaBaselineExtension.matches_test_location(test_location=location, snapshot_location=str(file)) is own


def test_a_test_that_is_no_gate_owns_a_folder_that_can_not_be(location):
    plain = SimpleNamespace(item=SimpleNamespace(name="plain", stash={}), filepath=location.filepath)
    assert not Path(QsaBaselineExtension.dirname(test_location=plain)).exists()
    assert "∅" in QsaBaselineExtension.dirname(test_location=plain)


def named(drift, values, made_with, *, updating):
    return name_for_class(drift, series(*values), Tolerance(0.1), None, made_with, updating=updating)


@pytest.mark.parametrize(
    ("values", "made_with", "updating", "name"),
    [
        ([1, 2], GPU, True, "drift"),
        ([1, 3], GPU, True, "drift@sm_90"),
        ([1, 3], GPU, False, "drift"),
        ([1, 3], CPU, True, "drift"),
    ],
    ids=["it fits", "an update of what does not fit", "no update", "the class that made it"],
)
def test_another_class_of_devices_gets_a_baseline_of_its_own_where_the_shared_one_does_not_fit(
    drift, values, made_with, updating, name
):
    assert named(drift, values, made_with, updating=updating) == name


def test_a_class_that_has_a_baseline_of_its_own_keeps_it(drift):
    drift.with_name("drift@sm_90.json").write_text(drift.read_text())
    assert named(drift, [1, 2], GPU, updating=False) == "drift@sm_90"
    assert named(drift, [1, 2], CPU, updating=False) == "drift"


def test_a_damaged_baseline_is_made_anew_for_all_classes(drift):
    drift.write_text("{")
    assert named(drift, [1, 2], GPU, updating=True) == "drift"
