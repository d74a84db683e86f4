"""How many cores of this machine other programs leave free: those that a pass can use without waiting for its share."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

WINDOW = 2.0
"""Seconds over which cores are watched, at least."""
STALE = 30.0
"""Seconds after which a beginning says too little about now."""
BACKGROUND = 0.3
"""The part of a core that may be busy and still counts as free: a second thread wins more than it waits."""
GROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, all in seconds: the time, how long the cores had nothing to do, and our own work."""

    time: float
    idle: float
    own: float

    def free_cores(self, later: Reading) -> float:
        """Return how many cores were idle from now until later, or busy with this process."""
        return (later.idle - self.idle + later.own - self.own) / (later.time - self.time)


def read_clocks(stat: Path = Path("/proc/stat")) -> Reading | None:
    """Read the clocks of the cores that this process may run on; None where the system doesn't tell."""
    try:
        lines = stat.read_text(encoding="ascii").splitlines()
        tick, allowed = os.sysconf("SC_CLK_TCK"), os.sched_getaffinity(0)
    except (OSError, AttributeError, ValueError):  # not Linux
        return None
    own = os.times()
    cores = (line.split() for line in lines if line.startswith("cpu") and line[3].isdigit())
    # The fourth and fifth column: idle, and waiting for a disk.
    idle = sum(int(core[4]) + int(core[5]) for core in cores if int(core[0][3:]) in allowed)
    return Reading(time.monotonic(), idle / tick, own.user + own.system)


def allowed_cores() -> float:
    """Return how many cores this process may use: those of its affinity, or less by the quota of its control group."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([float(own), *_quotas(GROUPS)])


def _quotas(groups: Path, own: Path | None = None) -> list[float]:
    """Return the cores that each control group around this process allows, of version 2 and of version 1.

    `own`: the name of the group that the process is in; without one the system is asked.
    """
    found: list[float] = []
    with suppress(OSError, ValueError, IndexError):
        lowest = groups / str(own or _own_group()).strip("/")
        files = [folder / "cpu.max" for folder in (lowest, *lowest.parents)]
        limits = [file.read_text(encoding="ascii").split() for file in files if file.is_file()]
        found += [int(quota) / int(period) for quota, period in limits if quota != "max"]
    with suppress(OSError, ValueError):
        quota, period = (int((groups / "cpu" / f"cpu.cfs_{part}_us").read_text()) for part in ("quota", "period"))
        found += [quota / period] if quota > 0 else []
    return found


def _own_group() -> str:
    lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    return next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "")


def _compute(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@dataclass
class Cores:
    """Watches the cores from `watch` on, which costs nothing, until somebody asks how many are free."""

    _began: Reading | None = field(default=None)

    def watch(self) -> None:
        """Begin to watch; what a run loads and imports meanwhile is the time that is watched."""
        self._began = self._began or read_clocks()

    def free(self) -> float | None:
        """Return how many cores are free for this process, of those that it may use; None where nothing tells.

        Where the cores were watched for less than `WINDOW` seconds, computes for the rest: of cores that are all busy a
        process that sleeps gets nothing, and one that computes its share.
        """
        now = read_clocks()
        if now is None:
            return None
        if self._began is None or now.time - self._began.time > STALE:
            self._began = now
        if (missing := WINDOW - (now.time - self._began.time)) > 0:
            _compute(missing)
            now = read_clocks() or now
        return min(self._began.free_cores(now), allowed_cores())


own_cores = Cores()
"""The cores that this process may run on."""
