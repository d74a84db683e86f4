"""How many cores are free: idle ones and those of this process, within what its affinity and its quota allow."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from pytest_qsa.common import cores

STAT = """cpu  0 0 0 9999999 0 0 0 0 0 0
cpu0 100 0 0 {idle} {waiting} 0 0 0 0 0
cpu1 100 0 0 {idle} {waiting} 0 0 0 0 0
intr 1 2
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[cores.Reading]:
    """A machine of two cores whose clocks read what the list holds; computing takes no time."""
    readings: list[cores.Reading] = []
    monkeypatch.setattr(cores, "read_clocks", lambda: readings.pop(0))
    monkeypatch.setattr(cores, "allowed_cores", lambda: 2.0)
    monkeypatch.setattr(cores, "_compute", lambda seconds: None)
    return readings


def test_idle_cores_and_the_own_work_are_free(machine: list[cores.Reading]) -> None:
    machine += [cores.Reading(0.0, 10.0, 1.0), cores.Reading(4.0, 10.8, 2.2)]
    watched = cores.Cores()
    watched.watch()
    assert watched.free() == pytest.approx((0.8 + 1.2) / 4)


def test_no_more_cores_are_free_than_the_process_may_use(machine: list[cores.Reading]) -> None:
    machine += [cores.Reading(0.0, 0.0, 0.0), cores.Reading(3.0, 90.0, 3.0)]
    watched = cores.Cores()
    watched.watch()
    assert watched.free() == 2


def test_what_began_long_ago_is_watched_again(machine: list[cores.Reading]) -> None:
    machine += [cores.Reading(0.0, 0.0, 0.0), cores.Reading(100.0, 200.0, 0.0), cores.Reading(102.0, 201.0, 0.0)]
    watched = cores.Cores()
    watched.watch()
    assert watched.free() == pytest.approx(0.5)


def test_a_process_that_has_imported_nothing_competes_for_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "WINDOW", 0.1)
    began = time.process_time()
    cores.Cores().free()
    assert time.process_time() > began


def test_clocks_are_those_of_the_allowed_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stat"
    file.write_text(STAT.format(idle=300, waiting=100))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {1})
    reading = cores.read_clocks(file)
    assert reading is not None
    assert reading.idle == 4.0


def test_a_system_without_clocks_tells_nothing(tmp_path: Path) -> None:
    assert cores.read_clocks(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("files", "quota"),
    [({"cpu.max": "150000 100000"}, [1.5]), ({"cpu.max": "max 100000"}, []),
     ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, [2.0]),
     ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, [])],
)  # fmt: skip
def test_a_container_has_the_cores_of_its_quota(files: dict[str, str], quota: list[float], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    found = cores._quotas(tmp_path, own=Path("/"))
    assert found == quota
