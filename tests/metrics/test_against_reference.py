"""Metrics against the reference, from the powers and scores that a pass keeps: each by its formula, in plain numpy."""

import numpy as np
import pytest

from pytest_qsa import Capture
from pytest_qsa.captures import AGREEMENT, ERROR, SCORES, STORED, LocalError, Request, SiteNumbers
from pytest_qsa.common import AnomalyError
from pytest_qsa.metrics import made_by_loader

RANDOM = np.random.default_rng(0)
REFERENCE = RANDOM.normal(size=(2, 6, 8))
OWN = REFERENCE + RANDOM.normal(size=REFERENCE.shape) * 0.1
ERROR_OF = OWN - REFERENCE
POWERS = np.stack(
    [(REFERENCE**2).sum(-1), (ERROR_OF**2).sum(-1), (OWN**2).sum(-1), np.abs(ERROR_OF).max(-1)], axis=-1
)  # fmt: skip
PADDED, UNKNOWN = -1.0, -2.0
EVERYWHERE = {"positions": "all"}


def numbers(statistics, lengths, **arrays):
    one = np.arange(len(lengths), dtype=np.int32)
    return SiteNumbers(
        "float32", (6, 8), True, frozenset(statistics), one, np.zeros_like(one), np.array(lengths), arrays
    )  # fmt: skip


def captured(powers, site="output"):
    """Return a capture of one layer whose tokens have these powers, [samples, tokens, 4]."""
    rows = np.asarray(powers, dtype=np.float32).reshape(-1, 4)
    own = numbers({ERROR}, [np.shape(powers)[1]] * len(powers), error=rows)
    plan = (Request("layer", site, None, frozenset({ERROR})),)
    return Capture({("layer", site): own}, ("layer",), plan=plan, reference=Capture({}))


def value(series):
    (found,) = series.values.tolist()
    return found


FORMULAS = {
    "sqnr": lambda x, y: 10 * np.log10((x**2).sum() / ((y - x) ** 2).sum()),
    "nmse": lambda x, y: ((y - x) ** 2).sum() / (x**2).sum(),
    "relative_l2": lambda x, y: np.linalg.norm(y - x) / np.linalg.norm(x),
    "cosine": lambda x, y: (x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y),
    "max_abs_diff": lambda x, y: np.abs(y - x).max(),
}


@pytest.mark.parametrize("metric", FORMULAS)
def test_a_metric_of_the_tensor_pools_all_tokens(metric):
    found = value(getattr(captured(POWERS).output("layer"), metric)(**EVERYWHERE))
    assert found == pytest.approx(FORMULAS[metric](REFERENCE, OWN), rel=1e-5)


@pytest.mark.parametrize("metric", FORMULAS)
@pytest.mark.parametrize("mark", [PADDED, UNKNOWN])
def test_padding_and_tokens_that_were_not_compared_count_nowhere(metric, mark):
    powers = POWERS.copy()
    powers[0, :2] = mark
    found = value(getattr(captured(powers).output("layer"), metric)(**EVERYWHERE))
    rest = [np.concatenate([x[0, 2:], x[1]]) for x in (REFERENCE, OWN)]
    assert found == pytest.approx(FORMULAS[metric](*rest), rel=1e-5)


def test_the_worst_token_is_that_with_the_least_sqnr():
    each = 10 * np.log10(POWERS[..., 0] / POWERS[..., 1])
    assert value(captured(POWERS).output("layer").sqnr(by="token", **EVERYWHERE)) == pytest.approx(each.min(), rel=1e-5)


@pytest.mark.parametrize(
    ("signal", "error", "decibels"),
    [(1.0, 0.1, 10.0), (1.0, 0.0, np.inf), (0.0, 1.0, -np.inf), (0.0, 0.0, np.nan), (np.nan, 1.0, np.nan)],
)
def test_decibels_without_error_or_without_signal(signal, error, decibels):
    found = value(captured([[(signal, error, signal, 0.0)]]).output("layer").sqnr(**EVERYWHERE))
    np.testing.assert_allclose(found, decibels, rtol=1e-6)


def test_no_token_that_counts_is_an_anomaly():
    with pytest.raises(AnomalyError, match="no token at layer counts"):
        captured(np.full((1, 3, 4), PADDED)).output("layer").sqnr(**EVERYWHERE)


def test_the_layers_own_error_is_that_of_the_drawn_tokens():
    drawn = np.array([[0, 3, -1], [5, 1, 2]], dtype=np.int32)
    local = np.where(drawn[..., None] >= 0, np.stack([POWERS[i][drawn[i]][:, :3] for i in range(2)]), 0)
    own = numbers({LocalError(3)}, [6, 6], local_rows=drawn, local=local.astype(np.float32))
    capture = Capture({("layer", "output"): own}, ("layer",), reference=Capture({}))
    series = capture.output("layer").local_sqnr(rows=3, **EVERYWHERE)
    used = np.concatenate([POWERS[i][drawn[i][drawn[i] >= 0]] for i in range(2)])
    assert value(series) == pytest.approx(10 * np.log10(used[:, 0].sum() / used[:, 1].sum()), rel=1e-5)
    low, high, count = series.intervals["layer"]
    assert low < value(series) < high
    assert count == 5


def test_weights_are_compared_by_tensor_and_by_row():
    capture = captured(POWERS[:1], site="weight")
    weight = capture.weight("layer")
    assert value(weight.weight_sqnr()) == pytest.approx(FORMULAS["sqnr"](REFERENCE[0], OWN[0]), rel=1e-5)
    rows = 10 * np.log10(POWERS[0, :, 0] / POWERS[0, :, 1])
    assert value(weight.weight_sqnr(by="channel")) == pytest.approx(rows.min(), rel=1e-5)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


Q, P = (softmax(RANDOM.normal(size=(2, 5, 11))) for _ in range(2))
NEXT = RANDOM.integers(0, 11, size=(2, 5))
KL = (P * np.log(P / Q)).sum(-1)
OWN_P, REFERENCE_P = (np.take_along_axis(each, NEXT[..., None], -1)[..., 0][:, :-1] for each in (Q, P))
SCORE_TABLE = np.stack(
    [
        np.pad(-np.log(OWN_P), ((0, 0), (0, 1)), constant_values=np.nan),
        np.pad(-np.log(REFERENCE_P), ((0, 0), (0, 1)), constant_values=np.nan),
        KL, (Q.argmax(-1) == P.argmax(-1)).astype(float),
    ],
    axis=-1,
)  # fmt: skip

PREDICTIONS = {
    ("kl_divergence", ()): KL.mean(),
    ("kl_divergence", (("stat", "max"),)): KL.max(),
    ("kl_divergence", (("stat", "median"),)): np.median(KL),
    ("same_top", ()): (Q.argmax(-1) == P.argmax(-1)).mean(),
    ("perplexity", ()): np.exp(-np.log(OWN_P).mean()),
    ("ln_ppl_ratio", ()): np.log(REFERENCE_P / OWN_P).mean(),
    ("delta_p", ()): np.sqrt(((OWN_P - REFERENCE_P) ** 2).mean()),
    ("delta_p", (("stat", "mean"),)): (OWN_P - REFERENCE_P).mean(),
    ("delta_p", (("stat", "min"),)): (OWN_P - REFERENCE_P).min(),
    ("delta_p", (("stat", "p95"),)): np.percentile(OWN_P - REFERENCE_P, 95),
}


def predictions(table):
    rows = np.asarray(table).reshape(-1, 4)
    scored = numbers({SCORES, AGREEMENT}, [np.shape(table)[1]] * len(table), scores=rows)
    return Capture({("logits", "logits"): scored}, reference=Capture({})).logits()


@pytest.mark.parametrize(("metric", "parameters"), PREDICTIONS)
def test_predictions_are_compared_over_all_positions(metric, parameters):
    found = value(getattr(predictions(SCORE_TABLE), metric)(**dict(parameters)))
    assert found == pytest.approx(PREDICTIONS[metric, parameters], rel=1e-6)


def test_a_model_that_predicts_no_next_token_is_an_anomaly():
    with pytest.raises(AnomalyError, match="nll is known of causal models only"):
        predictions(np.full((1, 3, 4), np.nan)).perplexity()


def loaded_as(file, loaded):
    """Return a capture of one weight of which the file and the loaded model hold these tensors."""
    powers = [(file**2).sum(), ((loaded - file) ** 2).sum(), (loaded * file).sum(), (loaded**2).sum()]
    plan = (Request("layer", "weight", None, frozenset({STORED})),)
    return Capture({("layer", "weight"): numbers({STORED}, [0], stored=np.array(powers))}, ("layer",), plan=plan)


FILE = RANDOM.normal(size=(8, 8))
SPREAD = np.repeat([2.0, 2.2], 4)[:, None]
LOADED = {
    # case: (the loaded tensor, what is said of it)
    "as it is": (FILE, "as in the file"),
    "halved": (FILE / 2, "the loader made it × 0.5"),
    "turned": (-FILE, "the loader made it × -1"),
    "two factors near each other": (FILE * SPREAD, "the loader made it about × "),
    "zeros": (FILE * 0, "the loader left zeros"),
    "another tensor": (RANDOM.normal(size=(8, 8)), "the loader made another of it, cosine "),
}


@pytest.mark.parametrize("case", LOADED)
def test_what_the_loader_made_of_a_weight_is_named(case):
    loaded, said = LOADED[case]
    capture = loaded_as(FILE, loaded)
    assert made_by_loader(capture.sites["layer", "weight"]).startswith(said)
    found = value(capture.weight("layer").loaded_weights())
    assert found == pytest.approx(np.linalg.norm(loaded - FILE) / np.linalg.norm(FILE))


@pytest.mark.parametrize(("loaded", "difference"), [(0.0, 0.0), (1.0, np.inf)])
def test_of_a_weight_of_zeros_nothing_but_zeros_is_right(loaded, difference):
    capture = loaded_as(np.zeros((2, 2)), np.full((2, 2), loaded))
    assert value(capture.weight("layer").loaded_weights()) == difference
