"""The bar of a pass shows how many samples are done."""

from __future__ import annotations

from pytest_qsa.common import progress_bar


def test_the_bar_counts_samples(capsys):
    with progress_bar("tiny", disable=False) as progress:
        progress(1, 4)
        progress(4, 4)
    assert "qsa tiny" in capsys.readouterr().err


def test_without_a_terminal_there_is_no_bar(capsys):
    with progress_bar("tiny") as progress:
        progress(1, 1)
    assert capsys.readouterr().err == ""
