"""The metric `generation`: what of an answer is compared; its differences and intervals against plain arithmetic."""

import numpy as np
import pytest

from pytest_qsa.captures import GENERATION, LOGITS, Capture
from pytest_qsa.common import AnomalyError, SuiteError
from pytest_qsa.metrics.generation import Answer, answered
from pytest_qsa.suite import Generation
from support.judged import assertion_of


def answer(text, ended=True, tokens=None):
    return Answer(tokens if tokens is not None else [ord(letter) for letter in text] or [0], text, ended)


def logits_of(own, reference):
    return Capture({(GENERATION, LOGITS): answered(own, reference)}).logits()


@pytest.mark.parametrize(
    ("text", "ended", "is_json"),
    [
        ('{"a": 1}', True, True),
        (" [1, 2]\n", True, True),
        ('```json\n{"a": [1]}\n```', True, True),
        ('<tool_call>{"name": "f"}</tool_call>', True, True),
        ('<|call|>\n```\n{"a": 1}```\n<|end|>', True, True),
        ('{"a": 1}', False, False),
        ('{"a": 1', True, False),
        ("12", True, False),
        ('<think>A list? {"a"}</think>\n{"a": 1}', True, True),
        ("It is <think>{}</think>", True, False),
        ("Here it is: {}", True, False),
        ("[" * 100_000 + "]" * 100_000, True, False),
    ],
)
def test_json_is_an_object_or_a_list_inside_tags_or_fences(text, ended, is_json):
    assert Answer([1], text, ended).is_json is is_json


def test_markup_is_tags_special_tokens_and_fences():
    assert answer("<think>so</think> ```py\nx<3``` <|tool|>").marks == {"<think>", "</think>", "```", "<|tool|>"}
    assert answer("a < b and c > d").marks == set()


def test_repetition_is_the_share_of_phrases_of_four_tokens_written_before():
    tokens = [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4, 9]
    seen, again = [], 0
    for at in range(len(tokens) - 3):
        again += tokens[at : at + 4] in seen
        seen.append(tokens[at : at + 4])
    assert answer("", tokens=tokens).repetition == pytest.approx(again / len(seen))
    assert answer("", tokens=[1, 1, 1]).repetition == 0


def test_differences_are_of_shares_and_lengths_of_answers_that_end():
    rng = np.random.default_rng(0)
    flags, lengths = rng.random((2, 60)) < 0.8, rng.integers(2, 30, (2, 60))
    own, reference = (
        [answer("", bool(ended), [7] * int(length)) for ended, length in zip(*side, strict=True)]
        for side in zip(flags, lengths, strict=True)
    )
    logits = logits_of(own, reference)
    ended = logits.generation()
    np.testing.assert_allclose(ended.values, [flags[0].mean() - flags[1].mean()])
    low, high, count = ended.intervals[GENERATION]
    lost, gained = np.sum(flags[1] & ~flags[0]), np.sum(flags[0] & ~flags[1])
    # The plain interval of a paired difference, of which Newcombe's is a sounder version.
    half = 1.96 * np.sqrt(lost + gained - (gained - lost) ** 2 / 60) / 60
    assert count == 60
    np.testing.assert_allclose([low, high], ended.values[0] + np.array([-half, half]), atol=0.03)
    both = flags.all(axis=0)
    np.testing.assert_allclose(
        logits.generation("length_ratio").values, [lengths[0][both].sum() / lengths[1][both].sum()]
    )
    np.testing.assert_allclose(logits.generation("diverged_at").values, [lengths.min(axis=0).mean()])


def test_json_and_markup_count_where_either_answer_has_them():
    own = [answer("{}"), answer("no"), answer("no"), answer("<a>{}</a>"), answer("{"), answer("<b>")]
    reference = [answer("{}"), answer("[1]"), answer("no"), answer("<a>"), answer("[2]"), answer("<b>")]
    logits = logits_of(own, reference)
    # JSON: of 4 prompts the model has 2 and its reference 3; markup: of the two, the model has all in both.
    assert logits.generation("valid_json").values[0] == pytest.approx(2 / 4 - 3 / 4)
    assert logits.generation("valid_json").intervals[GENERATION][2] == 4
    assert logits.generation("markup_kept").values.tolist() == [0.5]
    assert logits.generation("valid_json").least == {GENERATION: -3 / 4}


def test_answers_without_json_markup_or_an_end_are_no_number():
    logits = logits_of([answer("no", ended=False)] * 9, [answer("no")] * 9)
    for stat, what in (
        ("valid_json", "of 9 prompts none has an answer of the reference that is JSON"),
        ("markup_kept", "none has an answer of the reference that has all the markup"),
        ("length_ratio", "of 9 prompts none has an answer that ends in both models"),
    ):
        with pytest.raises(AnomalyError, match=what):
            logits.generation(stat)


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"max": 1.5}, "generation is never above 1, so max 1.5 checks nothing"),
        ({"stat": "length_ratio", "min": -1.0}, "generation is never below 0, so min -1 checks nothing"),
        ({"min": -0.1, "positions": {"from": 4}}, "generation counts answers, so it takes no positions"),
        ({"min": -0.1, "layers": "x"}, "layers"),
        ({"baseline": {"abs": 0.1}}, "compares answers to prompts, which no baseline knows: give a bound"),
    ],
)
def test_a_bound_that_checks_nothing_and_positions_are_refused(keys, what):
    with pytest.raises((SuiteError, ValueError), match=what):
        assertion_of(metric="generation", **keys)


def test_prompts_are_named_by_one_of_three_kinds():
    with pytest.raises(ValueError, match=r"prompts are builtin, data or custom:FILE\.jsonl, not 'prompt\.jsonl'"):
        Generation(prompts="prompt.jsonl")
