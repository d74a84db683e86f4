"""Captures compared to the last bit; never in an assert, whose text would take minutes."""

import json
from dataclasses import replace

from pytest_qsa.captures import UNKNOWN_RUN, Statistic
from pytest_qsa.common import BLANK, with_checksum


def statistics(*texts):
    """Return the statistics of these texts."""
    return frozenset(map(Statistic.parse, texts))


def same(one, other):
    return one.to_bytes() == other.to_bytes()


def differing(one, other):
    """Return the sites whose numbers differ in a bit; never compared in an assert, whose text would take minutes."""
    sites = [site for site in one.sites if site not in other.sites]
    for site in one.sites.keys() & other.sites.keys():
        (a, head), (b, other_head) = one.sites[site].to_arrays(), other.sites[site].to_arrays()
        same = a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
        sites += [] if same and head == other_head else [site]
    return sites if sites or one.to_bytes() == other.to_bytes() else ["the files differ"]


def assert_equal(found, whole):
    """Compare to the last bit; never the bytes in an assert, whose text would take minutes."""
    found, whole = (replace(capture, provenance=UNKNOWN_RUN) for capture in (found, whole))
    assert differing(whole, found) == []
    equal = same(found, whole)
    assert equal


def with_header(content, change):
    """Return a capture or a kept reference whose header a function changed; its checksum, if it keeps one, fits."""
    size = int.from_bytes(content[:8], "little")
    head = json.loads(content[8 : 8 + size])
    header = json.loads(head["__metadata__"]["qsa"])
    header["checksum"] = BLANK
    change(header)
    head["__metadata__"]["qsa"] = json.dumps(header, sort_keys=True)
    text = json.dumps(head).encode()
    text += b" " * (-len(text) % 8)
    made = len(text).to_bytes(8, "little") + text + content[8 + size :]
    return with_checksum(made) if "checksum" in header else made


def without_checksum(content):
    """Return a capture or a kept reference as an earlier version wrote it."""
    return with_header(content, lambda header: header.pop("checksum"))


def flipped(content, at):
    """Return a file with one bit of one byte changed."""
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]
