"""Captures compared to the last bit; never in an assert, whose text would take minutes."""

from dataclasses import replace

from pytest_qsa.captures import UNKNOWN_RUN, Statistic


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
