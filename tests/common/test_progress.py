"""What a run does is told: on a terminal in a line that goes again, in a log by lines with what is left."""

from __future__ import annotations

import os
import pty
import time

import pytest

from pytest_qsa.common import Status, lasting_stderr, phase, status, step
from pytest_qsa.common.progress import CLOSE_LINE, OPEN_LINE


@pytest.fixture
def quick(monkeypatch):
    """Let the clock be looked at a hundred times a second."""
    monkeypatch.setattr("pytest_qsa.common.progress.TICK", 0.01)


def until(lines, count=1):
    """Wait until so many lines are written."""
    deadline = time.monotonic() + 20
    while len(lines) < count and time.monotonic() < deadline:
        time.sleep(0.01)


def test_a_log_gets_a_line_for_each_stretch_of_work_with_what_is_left(quick):
    lines = []
    with Status(lines.append, live=False, every=0.05).of("tiny") as progress:
        phase("pass", "samples")
        progress(2, 8)
        step(2, 3)
        until(lines, 2)
    assert lines[-1].startswith("qsa: tiny: [2/3] pass, 2 of 8 samples, ")
    assert lines[-1].endswith(" left\n")
    count = len(lines)
    time.sleep(0.2)
    assert len(lines) == count


def test_short_work_leaves_no_line(quick):
    lines = []
    with Status(lines.append, live=False).of("tiny") as progress:
        progress(1, 1)
        time.sleep(0.05)
    assert lines == []


def test_a_terminal_shows_one_line_and_gets_its_own_back(quick):
    written = []
    with Status(written.append, live=True).of("tiny"):
        phase("loading \x1b[31m")
        until(written)
    assert written[0].startswith(OPEN_LINE)
    assert r"qsa: tiny: loading \x1b[31m, 0 s" in written[0]
    assert written[-1] == CLOSE_LINE


def test_work_inside_of_work_is_part_of_it(quick):
    outer, inner = [], []
    with Status(outer.append, live=False, every=0.01).of("outer"):
        with Status(inner.append, live=False, every=0.01).of("inner") as progress:
            progress(1, 2)
            until(outer)
        phase("judging")
    assert outer
    assert inner == []


def test_nothing_is_shown_where_nobody_asks():
    phase("loading")
    step(1, 2)


def test_stderr_outlasts_what_takes_its_place(monkeypatch, capfd):
    write, terminal = lasting_stderr()
    monkeypatch.setattr("sys.stderr", None)
    write("still here\n")
    assert capfd.readouterr().err == "still here\n"
    assert not terminal


def test_a_command_shows_its_state_on_a_terminal_only_while_it_works(quick, monkeypatch):
    main, side = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(side, "w") as stream:
        monkeypatch.setattr("sys.stderr", stream)
        with status("tiny"):
            phase("reading")
            time.sleep(0.2)
        shown = ""
        while not shown.endswith(CLOSE_LINE):
            shown += os.read(main, 10_000).decode()
    os.close(main)
    assert "qsa: tiny: reading" in shown
