"""What an assertion allows: a bound that follows the last release, and bounds that noise leaves room for."""

import pytest

from pytest_qsa.common import SuiteError
from pytest_qsa.suite import Noise, Relative, load_suite

NOISE = Noise(mean=2.0, sigma=0.5, n=4, k=6)


@pytest.mark.parametrize(
    ("keys", "number", "words"),
    [
        ({}, 10.0, "1 × previous"),
        ({"times": 1.1}, 11.0, "1.1 × previous"),
        ({"times": 0.5, "plus": 1.0}, 6.0, "0.5 × previous +1"),
        ({"plus": -1.0}, 9.0, "1 × previous -1"),
        ({"times": 2.0, "at_most": 15.0}, 15.0, "2 × previous, at most 15"),
        ({"times": 0.1, "at_least": 3.0}, 3.0, "0.1 × previous, at least 3"),
        ({"times": 0.1, "at_least": 0.5, "at_most": 2.0}, 1.0, "0.1 × previous, at least 0.5, at most 2"),
        ({"at_least": 5.0, "at_most": 4.0}, 5.0, "1 × previous, at least 5, at most 4"),
    ],
)
def test_a_bound_follows_the_last_release_within_its_limits(keys, number, words):
    bound = Relative(of="previous", **keys)
    assert bound.number(10.0) == pytest.approx(number)
    assert str(bound) == words


def test_noise_leaves_a_floor_on_the_side_of_the_bound():
    assert (NOISE.floor("max"), NOISE.floor("min")) == (5.0, -1.0)
    assert NOISE.text("max") == "5 (mean 2 + 6 × sigma 0.5 over 4 parts)"
    assert NOISE.text("min") == "-1 (mean 2 − 6 × sigma 0.5 over 4 parts)"
    assert not NOISE.steady
    assert Noise(mean=2.0, sigma=0.0, n=4, k=6).steady


@pytest.fixture
def load(tmp_path):
    """Return a function that loads a suite of one assertion with these keys."""

    def load(keys):
        path = tmp_path / "a.qsa.yaml"
        path.write_text(
            f"model: {{path: x}}\nassertions:\n  - {{id: a, metric: rms, site: output, layers: x, {keys}}}\n"
        )
        return load_suite(path).assertions[0]

    return load


FLOOR = "noise: {max: {mean: 2, sigma: 0.5, n: 4, k: 6}}"
GROUPS = "noise: {max: {q_proj: {mean: 2, sigma: 0.5, n: 4, k: 6}}}"


@pytest.mark.parametrize(
    "keys", [f"max: 5, {FLOOR}", f"max: 9, {FLOOR}", f"max: {{q_proj: 5, default: 1}}, {GROUPS}"]
)  # fmt: skip
def test_a_bound_with_room_for_its_noise_is_taken(load, keys):
    noise = load(keys).noise
    assert list(noise.floors.values()) == [5.0]
    assert noise.steady == frozenset()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (f"max: 4.9, {FLOOR}", "max 4.9 is below the noise floor 5"),
        (f"max: {{q_proj: 4.9, default: 9}}, {GROUPS}", "max of 'q_proj' 4.9 is below the noise floor 5"),
        ("min: 2, noise: {min: {mean: 4, sigma: 0.5, n: 4, k: 6}}", "min 2 is above the noise floor 1"),
        (f"min: 0, {FLOOR}", "noise.max stands beside no max"),
        (f"max: {{q_proj: 9}}, {FLOOR}", "noise.max is of another form than max"),
        (f"max: {{k_proj: 9, default: 9}}, {GROUPS}", "noise.max is of another form than max"),
        ("max: {'scheme:int8': 3}", "'scheme:int8' names no scheme"),
        ("max: {'(': 3}", "'(' is not a regular expression"),
        ("max: {}", "max"),
        ("max: {times: 2}", "of"),
        ("max: {of: previous, times: 0}", "times"),
        ("max: .inf", "max"),
    ],
)
def test_a_bound_that_makes_no_sense_is_refused(load, keys, said):
    with pytest.raises(SuiteError) as caught:
        load(keys)
    assert said in str(caught.value)


@pytest.mark.parametrize("scheme", ["none", "mixed", "w8a8", "w4a16_int", "w8a8_fp"])
def test_a_group_may_be_a_scheme(load, scheme):
    assert load(f"max: {{'scheme:{scheme}': 3}}").max == {f"scheme:{scheme}": 3.0}


@pytest.mark.parametrize("until", ["2027-01-31", "'2027-01-31'"])
def test_a_waiver_ends_on_a_day(load, until):
    waiver = load(f"max: 1, waive: {{layers: q_proj, owner: me, reason: known, until: {until}}}").waive
    (waiver,) = waiver if isinstance(waiver, list) else [waiver]
    assert waiver.until.isoformat() == "2027-01-31"


@pytest.mark.parametrize("until", ["2027-01-31 10:00:00", "soon", "20", "2027-02-30"])
def test_a_day_that_is_none_is_refused(load, until):
    with pytest.raises(SuiteError, match=r"a\.qsa\.yaml:3: .*(write a day, such as 2027-01-31|day is out of range)"):
        load(f"max: 1, waive: {{layers: q_proj, owner: me, reason: known, until: {until}}}")
