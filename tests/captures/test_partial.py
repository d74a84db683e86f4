"""What an interrupted pass leaves: it is taken up for the same plan only, and only where it is whole."""

import pytest

from pytest_qsa.captures import COUNTS, TOKENS, Capture, PartialSums, Request

PLAN = (Request("a", "output", None, frozenset({TOKENS})),)


def half(plan=PLAN):
    return Capture(sites={}, modules=("a",), plan=plan)


@pytest.fixture
def file(tmp_path):
    """Return the file of a pass that was stopped."""
    file = tmp_path / "sums.partial"
    PartialSums(file, every=0).keep(half)
    return file


def test_a_pass_goes_on_from_what_was_kept(file):
    assert PartialSums(file).load(list(PLAN)).to_bytes() == half().to_bytes()
    PartialSums(file).discard()
    assert PartialSums(file).load(PLAN) is None
    PartialSums(file).discard()


def test_another_plan_begins_anew(file):
    assert PartialSums(file).load([Request("a", "output", None, frozenset({COUNTS}))]) is None


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:40] + bytes([b[40] ^ 1]) + b[41:], lambda b: b[:32]],
    ids=["empty", "cut short", "a bit", "a header alone"],
)  # fmt: skip
def test_damaged_sums_are_not_gone_on_from(file, damage):
    file.write_bytes(damage(file.read_bytes()))
    assert PartialSums(file).load(PLAN) is None


def test_it_is_written_at_intervals_and_a_full_disk_ends_the_keeping(tmp_path, monkeypatch):
    made = []
    sums = PartialSums(tmp_path / "sums.partial", every=3600)
    sums.keep(lambda: made.append(1) or half())
    assert made == []
    assert not sums.file.exists()
    full = PartialSums(tmp_path / "full.partial", every=0)

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("pytest_qsa.captures.cache.write_atomically", fail)
    for _ in range(2):
        full.keep(lambda: made.append(1) or half())
    assert made == [1]
