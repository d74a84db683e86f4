"""Captures of disjoint samples merge to the capture of all of them, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pytest_qsa import Capture, capture
from pytest_qsa.captures import TOKENS, SiteNumbers
from pytest_qsa.captures.merging import merge
from pytest_qsa.captures.provenance import DataProvenance, ModelProvenance, Provenance, SampleRange
from pytest_qsa.captures.statistics import LAYOUTS
from pytest_qsa.common.errors import InfraError
from support import models

SITES = [(".", "input"), (".", "output"), (r"q_proj|norm", "weight")]
BUILDERS = {
    "llama": lambda: models.llama(torch.bfloat16, sink=True),
    "mixtral": models.mixtral,
    "albert": models.albert,
}


def batches(count=6):
    lengths = [16, 5, 40, 16, 9, 24]
    return [models.token_batch(1, lengths[index % 6], seed=index, bos=True) for index in range(count)]


def of_subject(weights, path, seed):
    return Provenance(ModelProvenance(path, weights=weights), DataProvenance(seed=seed))


def told(part, first, end, total):
    """Say which samples a capture holds, as `qsa capture --samples` and the ranks of torchrun do."""
    return replace(part, provenance=replace(part.provenance, samples=SampleRange(first, end, total)))


def assert_same_bytes(one, other):
    same = one.to_bytes() == other.to_bytes()
    assert same  # a capture's repr takes minutes


@pytest.fixture(scope="module", params=BUILDERS)
def parts_and_whole(request):
    model = BUILDERS[request.param]()
    return [capture(model, [batch], sites=SITES) for batch in batches()], capture(model, batches(), sites=SITES)


@settings(max_examples=10, deadline=None, database=None)
@given(cuts=st.sets(st.integers(1, 5)), seed=st.integers(0, 99))
def test_any_split_merges_to_the_bytes_of_one_pass(parts_and_whole, cuts, seed):
    parts, whole = parts_and_whole
    edges = [0, *sorted(cuts), 6]
    groups = [told(merge(parts[start:stop]), start, stop, 6) for start, stop in pairwise(edges)]
    shuffled = [groups[index] for index in np.random.default_rng(seed).permutation(len(groups))]
    assert_same_bytes(merge(shuffled), whole)


def test_samples_that_say_nothing_of_their_place_are_numbered_in_the_order_given(parts_and_whole):
    parts, whole = parts_and_whole
    assert_same_bytes(merge(parts), whole)


ASKED_FOR = [
    "channel_band",
    "int8_outlier_features",
    ("quantization_sqnr", {"scheme": "int4", "by": "group", "group_size": 12}),
]


def expert(*samples, shape=(1, 4)):
    """Return the numbers of a layer that saw a token of these samples alone."""
    numbers = np.array(samples, np.int32)
    maxima = {"token_max": numbers.astype(np.float32), "peaks": numbers[:, None], "peak_channels": numbers[:, None]}
    return SiteNumbers(
        "float32", shape, True, frozenset({TOKENS}), numbers, 0 * numbers, np.ones(len(numbers), int), maxima
    )


def test_samples_that_a_layer_did_not_see_count_all_the_same_and_what_is_last_is_of_the_last_part():
    ids = np.arange(3, dtype=np.int32)
    first = Capture({("e", "output"): expert(0)}, ("e",), tokens=(ids, ids), pieces={5: "five", 2: "two"})
    last = Capture({("e", "output"): expert(0, shape=(2, 4))}, ("e",), tokens=(ids,), pieces={3: "three"})
    merged = merge([first, last])
    assert merged.sites["e", "output"].sample.tolist() == [0, 2]
    assert merged.sites["e", "output"].shape == (2, 4)
    assert list(merged.pieces) == [2, 3, 5]


def test_the_reference_of_parts_that_merge_says_nothing_of_samples():
    parts = [told(Capture({}, reference=Capture({})), *span, 3) for span in ((0, 2), (2, 3))]
    assert merge(parts).reference.provenance.samples is None
    assert merge(parts[:1]).reference.provenance.samples is None


def test_what_only_the_sites_that_ask_for_it_have_merges_as_well():
    model = models.llama(torch.bfloat16, sink=True)
    parts = [capture(model, [batch], sites=SITES[:2], statistics=ASKED_FOR) for batch in batches(3)]
    assert_same_bytes(merge(parts), capture(model, batches(3), sites=SITES[:2], statistics=ASKED_FOR))


def test_an_incomplete_merge_says_which_samples_it_holds(parts_and_whole):
    parts, _ = parts_and_whole
    merged = merge([told(parts[1], 1, 2, 6), told(parts[0], 0, 1, 6)])
    assert merged.provenance.samples == (0, 2, 6)


@pytest.mark.parametrize(
    ("samples", "text"),
    [([[0, 2, 6], [1, 3, 6]], "overlap"), ([[0, 1, 6], [3, 6, 6]], "the samples 1:3 are in none")],
)
def test_samples_that_overlap_or_are_missing_are_refused(parts_and_whole, samples, text):
    parts, _ = parts_and_whole
    with pytest.raises(InfraError, match=text):
        merge([told(part, *place) for part, place in zip(parts, samples, strict=False)])


def test_captures_of_different_subjects_are_refused(parts_and_whole):
    parts, _ = parts_and_whole
    one = replace(parts[0], provenance=of_subject("sha256:1", "a", seed=0))
    with pytest.raises(InfraError, match="their weights differ"):
        merge([one, replace(one, provenance=of_subject("sha256:2", "b", seed=0))])
    with pytest.raises(InfraError, match="their data differ"):
        merge([one, replace(one, provenance=of_subject("sha256:1", "a", seed=1))])
    other = capture(models.llama(torch.bfloat16), batches(1), sites=[("q_proj", "input")])
    with pytest.raises(InfraError, match=r"modules differ|plan differ"):
        merge([parts[0], other])


def test_captures_made_in_different_precision_are_refused():
    halves = [
        capture(models.llama(dtype), batches(1), sites=[("q_proj", "input")])
        for dtype in (torch.bfloat16, torch.float32)
    ]
    with pytest.raises(InfraError, match="bfloat16 and in float32"):
        merge(halves)


def test_captures_made_on_other_numbers_of_threads_are_merged():
    one, other = (
        Capture({}, provenance=Provenance(ModelProvenance("a", threads=threads))) for threads in ("2", "1 of 2")
    )
    assert merge([one, other]).provenance.model.threads == "2"


def test_every_array_of_a_site_says_how_it_is_merged():
    counted = {name for counts, layout in LAYOUTS.items() if layout.bins for name in (counts, layout.bins)}
    assert counted == {f"{kind}{what}" for kind in ("", "signed_", "channel_") for what in ("bins", "counts")}
    silent = {name for name, layout in LAYOUTS.items() if layout.merge is None} - counted
    assert silent == {"stored", "gain"}  # every part has seen the whole of a weight


def test_a_row_that_holds_nan_taints_the_extremes_as_in_one_pass():
    script = np.ones((3, 4, 8), dtype=np.float32)
    script[1, 2, 3] = np.nan
    model = models.Scripted(script)
    sites = [(r"layers\.0", "output")]
    parts = [capture(model, [models.numbered(model, index, index + 1)], sites=sites) for index in range(3)]
    whole = capture(model, [models.numbered(model)], sites=sites)
    assert_same_bytes(merge(parts), whole)
