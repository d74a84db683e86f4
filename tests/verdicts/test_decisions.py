"""Bounds that too few positions can't show, and the tokens behind a decision that was lost."""

import numpy as np
import pytest

from pytest_qsa import Capture
from pytest_qsa.captures.sites import SiteNumbers
from pytest_qsa.common.errors import AnomalyError
from pytest_qsa.metrics import Answer, answered
from pytest_qsa.metrics.series import Bounds, Query, Series
from pytest_qsa.report.page import plots_of
from pytest_qsa.report.plots.curves import drawn_by_page
from pytest_qsa.report.plots.figures import draw
from pytest_qsa.report.report import to_plain
from pytest_qsa.report.verdict_text import failure_text, step_summary
from pytest_qsa.suite import ASSERTIONS
from pytest_qsa.verdicts.judgement import positions_needed
from pytest_qsa.verdicts.verdict import Kind
from support.captures import statistics
from support.judged import explained, judge_bounds

PIECES = {0: "a", 1: "b", 2: "c", 3: "stop", 4: "go", 5: "on"}


def series(metric, value, low, high, count, **parameters):
    query = Query(metric, f"{metric}/1", "logits", "", parameters=parameters)
    return Series(["logits"], np.array([value]), query, intervals={"logits": (low, high, count)})


def test_a_bound_that_chance_alone_could_cross_is_refused_with_the_number_it_takes():
    with pytest.raises(AnomalyError) as refused:
        judge_bounds(series("flips", 0.0, 0.0, 0.0143, 265), Bounds(max=0.001))
    text = str(refused.value)
    assert text.startswith("265 positions can't show that flips is max 0.001: by chance alone it may be off by 0.0143")
    assert "about 3,800 would" in text  # 1.96² / 0.001
    with pytest.raises(AnomalyError, match="about 900 would"):  # half the width takes four times as many
        judge_bounds(series("margin_ratio", 0.97, 0.93, 1.01, 225), Bounds(min=0.98))
    with pytest.raises(AnomalyError, match=r"40 boundaries can't show .* about 47 would, 1\.2 × as many"):
        judge_bounds(series("boundary_tokens", 1.0, 0.911, 1.0, 40, stat="recall"), Bounds(min=0.925))
    with pytest.raises(AnomalyError, match="nor can any number: leave some room for chance"):
        judge_bounds(series("flips", 0.0, 0.0, 0.0143, 265), Bounds(max=0))


@pytest.mark.parametrize(
    ("value", "low", "high", "bounds", "kind"),
    [
        (0.01, 0.0, 0.02, Bounds(max=0.05), Kind.PASSED),
        (0.12, 0.10, 0.14, Bounds(max=0.05), Kind.REGRESSION),
        # The whole interval is out of bounds, which chance does not explain.
        (0.12, 0.10, 0.14, Bounds(max=0.01), Kind.REGRESSION),
        (0.01, np.nan, np.nan, Bounds(max=0.001), Kind.REGRESSION),
    ],
)
def test_a_value_is_held_against_its_bound_where_the_positions_suffice(value, low, high, bounds, kind):
    assert judge_bounds(series("flips", value, low, high, 500), bounds).kind is kind


@pytest.mark.parametrize(
    ("metric", "keys", "needed"),
    [
        ("flips", {"max": 0.01}, 381),
        ("overlap", {"min": 0.9}, 35),
        ("boundary_tokens", {"min": 0.9}, 35),
        ("boundary_tokens", {"stat": "spurious", "max": 10.0}, 381),
        ("flips", {"max": 0.0}, None),
        ("kl_divergence", {"max": 0.1}, None),
    ],
)
def test_the_positions_that_a_bound_takes_are_known_beforehand(metric, keys, needed):
    assertion = ASSERTIONS[metric].model_validate({"id": "it", "metric": metric, **keys})
    assert positions_needed(assertion) == needed
    if needed:  # Wilson's interval of a share of 0 in so many, and in one fewer
        room = 0.01 if needed == 381 else 0.1
        reach = [1.959964**2 / (count + 1.959964**2) for count in (needed, needed - 1)]
        assert reach[0] <= room < reach[1]


def test_other_metrics_know_no_perfect_value_to_be_near_to():
    assert judge_bounds(series("kl_divergence", 0.01, 0.0, 0.5, 9), Bounds(max=0.02)).kind is Kind.PASSED


def test_too_few_windows_are_told_beside_the_value():
    verdict = judge_bounds(series("flips", 0.1, np.nan, np.nan, 40), Bounds(max=0.01))
    assert verdict.rows[0].detail == "from 40 tokens; fewer than 8 samples give no interval"


def decided():
    """Return a capture of one sample of six positions, whose decisions fall otherwise at three of them."""
    margins = np.array(
        [
            [2.0, 1.0, 3, 3],
            [1.0, -0.5, 3, 4],
            [4.0, -0.25, 5, 4],
            [np.nan] * 4,
            [0.25, -1.0, 4, 5],
            [3.0, 2.0, 5, 5],
        ]
    )
    one = np.zeros(1, np.int32)
    arrays = {"scores": np.full((6, 4), np.nan), "margins": margins}
    numbers = SiteNumbers(
        "float32", (), True, statistics("agreement", "margins"), one, one, np.array([6], np.int64), arrays
    )
    tokens = (np.array([0, 1, 2, 0, 1, 2], np.int32),)
    return Capture({("logits", "logits"): numbers}, ("m",), (), tokens, PIECES)


def failed(**parameters):
    capture = decided()
    verdict = judge_bounds(capture.logits().flips(**parameters), Bounds(max=0.1))
    return capture, explained(verdict, capture)


def test_the_clearest_decisions_that_were_lost_are_shown_with_what_each_model_writes():
    _, verdict = failed()
    assert [(token.position, token.decided) for token in verdict.evidence] == [
        (2, ("4", "on", "0.25", "go")),
        (1, ("1", "stop", "0.5", "go")),
        (4, ("0.25", "go", "1", "on")),
    ]
    text = failure_text(verdict)
    assert "the reference writes ⟦on⟧ by 4, the model ⟦go⟧ by 0.25 at sample 0, position 2, after ab⟦c⟧abc" in text
    assert "the reference writes ⟦on⟧ by 4" in step_summary([to_plain(verdict)])


def test_only_decisions_in_the_range_of_margins_are_shown():
    _, verdict = failed(margin_from=0.5, margin_to=2.0)
    assert [token.position for token in verdict.evidence] == [1]


def test_the_picture_says_how_many_decisions_fall_otherwise(tmp_path):
    capture, verdict = failed()
    drawn = draw(capture, verdict, tmp_path)
    assert drawn == {"margins": str(tmp_path / "margins.png")}
    (shown,) = plots_of(drawn)
    (panel,) = shown.chart["panels"]
    assert "of the decisions fall otherwise" in shown.chart["title"]  # as text, which can be found and read aloud
    labels = [mark["label"] for mark in panel["marks"] if mark["label"]]
    assert labels == ["kept", "the model prefers another token", "nothing lost"]


def test_the_page_draws_it_of_its_data_where_nothing_shows_a_picture(tmp_path):
    capture, verdict = failed()
    (whole,) = plots_of(draw(capture, verdict, tmp_path / "whole"))
    drawn = draw(capture, verdict, tmp_path / "data", without=drawn_by_page(verdict))
    assert [file.name for file in (tmp_path / "data").iterdir()] == ["margins.json"]
    (shown,) = plots_of(drawn)
    assert (shown.title, shown.chart) == (whole.title, whole.chart)


def answers():
    """Return a capture of ten prompts; of two the model's answer no longer ends."""
    ended = [Answer([0, 1], "ab", ended=True)] * 10
    own = [Answer([0, 2, 0, 2], "acac", ended=False)] * 2 + ended[2:]
    return Capture({("generation", "logits"): answered(own, ended)}, pieces=PIECES)


def test_the_answers_that_no_longer_end_are_shown_as_both_models_end_them(tmp_path):
    capture = answers()
    with pytest.raises(AnomalyError, match=r"10 prompts can't show .* about 1\.6 × as many would \(generation\.num"):
        judge_bounds(capture.logits().generation(), Bounds(min=-0.25))
    verdict = explained(judge_bounds(capture.logits().generation("diverged_at"), Bounds(min=2.0)), capture)
    assert [(token.sample, token.position) for token in verdict.evidence][:2] == [(0, 1), (1, 1)]
    text = failure_text(verdict)
    assert "prompt 0, 1 token alike: the reference ends ⟦ab⟧, the model ⟦acac⟧" in text
    assert "the reference ends ⟦ab⟧" in step_summary([to_plain(verdict)])
    assert [*draw(capture, verdict, tmp_path)] == ["answers"]
    hidden = capture.redacted()
    assert not explained(judge_bounds(hidden.logits().generation("diverged_at"), Bounds(min=2.0)), hidden).evidence
