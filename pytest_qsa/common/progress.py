"""What a run does at the moment, and how much is left: on a terminal one line that changes, in a log a line every 30 s.

Whoever shows it opens a `Status`; whoever works says what by `phase` and `step`, which do nothing where none is open.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .text import visible

EVERY = 30.0
"""Seconds between two lines in a log."""
TICK = 0.5
"""Seconds between two looks at the clock, and between two states of the line on a terminal."""
STEP_PAUSE = 5.0
"""Seconds from the last line in a log before the next step is a line of its own."""
OPEN_LINE, NEW_LINE, CLOSE_LINE = "\x1bD\x1b[A\x1b7\x1b[B", "\r\x1b[2K", "\r\x1b[2K\x1b8"
"""Of a terminal (DEC VT100): go to the line below and remember where one was; empty it; empty it and go back."""
Progress = Callable[[int, int], None]
"""A callback that gets how much is done and how much there is in all."""


def shown_time(seconds: float) -> str:
    """Write `12 s`, `3 min`, `1.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Status:
    """The state of a run, shown by `write`: `smollm2: pass, 3 of 8 samples, 12 s, about 20 s left`.

    `live`: write one line of a terminal again and again; else whole lines, after `every` seconds of work each.
    """

    def __init__(self, write: Callable[[str], None], *, live: bool, every: float = EVERY) -> None:
        self._write, self._live, self._every = write, live, every
        self._name = self._step = self._phase = self._unit = ""
        self._began = self._told = time.monotonic()
        self._done = self._total = 0
        self._working = threading.Event()
        self._writing = threading.Lock()
        self._watching = self._shown = False

    @contextmanager
    def of(self, name: str) -> Iterator[Progress]:
        """Show what is done for a subject; yield the callback that counts. Inside of another one this is part of it."""
        if _OPEN:
            yield _OPEN[-1].count
            return
        self._name, self._step = name, ""
        self._told = time.monotonic()
        self.begin("")
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, name="qsa-status", daemon=True).start()
        _OPEN.append(self)
        self._working.set()
        try:
            yield self.count
        finally:
            _OPEN.remove(self)
            self._working.clear()
            self.hide()

    def hide(self) -> None:
        """Take the line off a terminal: something else is to be written there."""
        with self._writing:
            if self._shown:
                self._write(CLOSE_LINE)
                self._shown = False

    def begin(self, phase: str, unit: str = "") -> None:
        """Begin a phase, of which nothing is done yet. `unit`: what is counted in it."""
        self._phase, self._unit = phase, unit
        self._done = self._total = 0
        self._began = time.monotonic()

    def begin_step(self, number: int, count: int) -> None:
        """Begin a step of several; in a log it is a line, unless one was written just now."""
        self._step = f"[{number}/{count}] "
        if not self._live and time.monotonic() - self._told > STEP_PAUSE:
            self._tell()

    def count(self, done: int, total: int) -> None:
        """Take how much of the phase is done."""
        self._done, self._total = done, total

    @property
    def text(self) -> str:
        """The state in words."""
        seconds = time.monotonic() - self._began
        parts = [f"{self._step}{self._phase or 'working'}"]
        if self._total:
            parts.append(f"{self._done} of {self._total}{self._unit and ' ' + self._unit}")
        parts.append(shown_time(seconds))
        if 0 < self._done < self._total:
            parts.append(f"about {shown_time(seconds / self._done * (self._total - self._done))} left")
        return visible(f"{self._name}: {', '.join(parts)}")

    def _watch(self) -> None:
        while True:
            self._working.wait()
            time.sleep(TICK)
            with self._writing:
                if self._working.is_set() and (self._live or time.monotonic() - self._told >= self._every):
                    self._tell()

    def _tell(self) -> None:
        self._told = time.monotonic()
        with suppress(OSError, ValueError):  # nobody reads any more
            if self._live:
                line = f"qsa: {self.text}"[: shutil.get_terminal_size().columns - 1]
                self._write(f"{'' if self._shown else OPEN_LINE}{NEW_LINE}{line}")
                self._shown = True
            else:
                self._write(f"qsa: {self.text}\n")


_OPEN: list[Status] = []


def phase(text: str, unit: str = "") -> None:
    """Say what is done from now on: `loading smollm2`. `unit`: what its progress counts."""
    if _OPEN:
        _OPEN[-1].begin(text, unit)


def step(number: int, count: int) -> None:
    """Say which of several steps begins: `[2/16]`."""
    if _OPEN:
        _OPEN[-1].begin_step(number, count)


@contextmanager
def status(name: str, *, live: bool = True) -> Iterator[Progress]:
    """Show on stderr what is done for a subject; yield the callback that counts.

    `live`: on a terminal in one line that changes. Without it, as where lines are printed on the way, as in a log.
    """
    stream = sys.stderr  # as it is now: what loads a model turns it away

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    with Status(write, live=live and stream.isatty() and _moves_cursor()).of(name) as progress:
        yield progress


def lasting_stderr() -> tuple[Callable[[str], None], bool]:
    """Return what writes to the present stderr whatever replaces it later, and whether that is a terminal."""
    stream = sys.stderr
    try:
        descriptor = os.dup(stream.fileno())
    except (OSError, ValueError):  # it is none of the system's
        return lambda text: print(text, end="", file=stream, flush=True), False
    return lambda text: _written(descriptor, text), os.isatty(descriptor) and _moves_cursor()


def _moves_cursor() -> bool:
    return os.environ.get("TERM", "dumb") != "dumb" and sys.platform != "win32"


def _written(descriptor: int, text: str) -> None:
    os.write(descriptor, text.encode())
