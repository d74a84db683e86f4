"""The exit codes of `qsa`: pytest's own."""

from __future__ import annotations

OK, FAILED, SUITE_IS_WRONG, USAGE = 0, 1, 2, 4
