"""What the report draws of a distribution is what numpy counts."""

from __future__ import annotations

import numpy as np
import torch

from pytest_qsa import capture
from pytest_qsa.captures.distributions import PER_OCTAVE, histogram, histograms_of
from support import models


def test_bins_hold_what_numpy_counts_between_their_edges():
    rng = np.random.default_rng(0)
    values, counts = np.exp(rng.normal(size=500)), rng.integers(1, 9, size=500)

    made = histogram("elements", values, counts)

    edges = 2 ** ((made["first"] + np.arange(len(made["counts"]) + 1)) / PER_OCTAVE)
    assert made["counts"] == np.histogram(np.repeat(values, counts), edges)[0].tolist()
    assert sum(made["counts"]) == made["total"] == counts.sum()
    everything = np.sort(np.repeat(values, counts))
    assert made["median"] == everything[(len(everything) - 1) // 2]
    assert made["largest"] == values.max()


def test_zeros_and_what_is_far_below_the_largest_are_told_apart_from_the_bins():
    made = histogram("elements", np.array([0.0, 1e-30, 1.0, np.inf, np.nan]), np.array([5, 3, 2, 1, 1]))
    assert (made["zeros"], made["below"], made["total"], sum(made["counts"])) == (5, 3, 10, 2)
    assert len(made["counts"]) == 80


def test_a_site_has_the_histogram_of_its_elements_and_of_its_tokens():
    model, batch = models.llama(torch.bfloat16), models.token_batch(2, 12)
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    cap = capture(model, [batch], sites=[(r"layers\.1$", "output")])
    with torch.no_grad():
        model(batch)
    exact = (seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]).abs().double().numpy()

    elements, tokens = histograms_of(cap.sites["model.layers.1", "output"])

    assert (elements["of"], elements["total"], elements["largest"]) == ("elements", exact.size, exact.max())
    assert (tokens["of"], tokens["total"]) == ("tokens", exact.shape[0] * exact.shape[1])
    edges = 2 ** ((tokens["first"] + np.arange(len(tokens["counts"]) + 1)) / PER_OCTAVE)
    assert tokens["counts"] == np.histogram(exact.max(axis=-1), edges)[0].tolist()


def test_a_site_without_a_finite_value_has_none():
    assert histogram("elements", np.array([np.nan]), np.array([4]))["total"] == 0
