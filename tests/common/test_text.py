"""Text for people: aligned tables, Markdown that no name can break, numbers as one writes them."""

import html
import io
import logging
import math
import re

import pytest
from markdown_it import MarkdownIt

from pytest_qsa.common import (
    InfraError,
    QsaWarning,
    code_span,
    counted,
    escaped,
    fitted,
    for_terminal,
    logger,
    markdown_table,
    number,
    short_hash,
    shows_colours,
    text_table,
    visible,
)


def test_columns_are_aligned_and_no_line_ends_with_spaces():
    rows = [("layer", "max"), ("layers.10", "3"), ("", "12.5")]
    assert list(text_table(rows, right={1}, indent="  ")) == [
        "  layer       max",
        "  layers.10     3",
        "             12.5",
    ]
    assert list(text_table(rows)) == ["layer      max", "layers.10  3", "           12.5"]
    assert list(text_table([("a", ""), ("bb", "")])) == ["a", "bb"]


def test_a_terminal_shows_heads_bold_and_signs_in_colours_and_nothing_foreign_moves_it():
    rows = [("layer", "SQNR"), ("a\x1b[2Jb", "31 ★"), ("c", "9 ◆"), ("d", "–")]
    plain = list(text_table(rows, right={1}))
    shown = [for_terminal(line) for line in plain]
    assert [re.sub(r"\x1b\[\d*m", "", line).rstrip() for line in shown] == plain
    assert shown[0] == "\x1b[1mlayer    \x1b[0m  \x1b[1mSQNR\x1b[0m"
    assert shown[1] == "a\\x1b[2Jb  \x1b[32m31 ★\x1b[0m"
    assert shown[2].endswith("\x1b[31m 9 ◆\x1b[0m")
    assert for_terminal("FAILED \x1b[2J") == "\x1b[31mFAILED \\x1b[2J\x1b[0m"
    assert for_terminal("::error:: x") == visible("::error:: x")
    (bare,) = text_table([("layer", "Linear")], heads=False, faint={1})
    assert for_terminal(bare) == "layer  \x1b[2mLinear\x1b[0m"


@pytest.mark.parametrize(
    ("terminal", "environment", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"CI": "true"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_are_for_terminals_and_whoever_asks_for_none_gets_none(monkeypatch, terminal, environment, expected):
    for name in ("NO_COLOR", "FORCE_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    assert shows_colours(stream) == expected


def test_a_markdown_table_holds_foreign_text_as_code_and_our_own_escaped():
    rows = [("layer", "text", "share"), ("a|b", "x\ny", "*1 %")]
    lines = list(markdown_table(rows, plain={2}))
    assert lines == ["| layer | text | share |", "|---|---|---|", r"| `a\|b` | `x\ny` | \*1 % |"]


@pytest.mark.parametrize(
    "text", ["a", "`a", "a``b`", "```", " a", "<b>@team</b>", "a|b", "[x](http://y)", "a\\|b", "&amp;"]
)
def test_markdown_shows_a_code_span_as_the_text_that_it_was(text):
    assert MarkdownIt("commonmark").render(code_span(text)) == f"<p><code>{html.escape(text)}</code></p>\n"
    (row,) = list(markdown_table([["x"], [text]]))[2:]
    page = MarkdownIt("commonmark").enable("table").render("\n".join(markdown_table([["x", "y"], [text, "z"]])))
    assert page.count("<td>") == 2
    assert row.count("\n") == 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("::error::x", ": :error::x"),
        ("  ::stop-commands::zz", "  : :stop-commands::zz"),
        ("me\n::add-mask::REGRESSION", r"me\n::add-mask::REGRESSION"),
        ("see ##[error]x", "see ## [error]x"),
        ("##vso[task.complete]", "## vso[task.complete]"),
        ("a ##teamcity[testFailed]", "a ## teamcity[testFailed]"),
        ("###[group]", "### [group]"),
        ("\x9b31m \x1b]8;;http://x\x07", r"\x9b31m \x1b]8;;http://x\x07"),
        ("\u2066a\u2069\u200f", r"\u2066a\u2069\u200f"),
        ("a\u2028::b", r"a\u2028::b"),
        ("file.yaml::name", "file.yaml::name"),
    ],
)
def test_no_text_is_a_command_of_a_ci_service_or_of_a_terminal(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown
    assert str(InfraError(text)) == shown
    assert str(QsaWarning(text)) == shown


def test_a_table_aligns_what_is_shown():
    assert list(text_table([("a\x1b", "b"), ("::c", "d")])) == [r"a\x1b  b", ": :c   d"]


def test_the_log_is_safe_as_well(caplog):
    with caplog.at_level(logging.DEBUG, "pytest_qsa"):
        logger.debug("hashing %s", "x\n::error::y")
    assert caplog.messages == [r"hashing x\n::error::y"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain words, 1.5 %", "plain words, 1.5 %"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\u202eturned", r"\u202eturned"),
        ("zero\u200bwidth", r"zero\u200bwidth"),
        ("übung – 模型", "übung – 模型"),
    ],
)
def test_what_would_not_show_or_move_the_cursor_is_written_out(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("down_proj", r"down\_proj"),
        ("[x](y) *z* `w` ~v~ #u {t} a|b", r"\[x\]\(y\) \*z\* \`w\` \~v\~ \#u \{t\} a\|b"),
        ("<script>&amp;", "&lt;script&gt;&amp;amp;"),
        ("a\nb", r"a\\nb"),
    ],
)
def test_a_name_cannot_become_markup(text, markdown):
    assert escaped(text) == markdown


def test_a_name_calls_nobody():
    assert escaped("@team") == "@\u200bteam"


def test_a_text_is_cut_at_a_line_within_its_bytes():
    text = "".join(f"{'ü' * 10} {i}\n" for i in range(100))
    cut = fitted(text, 500)
    assert len(cut.encode()) <= 500
    head, _, end = cut.partition("\n\n")
    assert text.startswith(head + "\n")
    assert "cut" in end
    assert fitted(text, len(text.encode())) == text


@pytest.mark.parametrize(
    ("value", "text", "signed"),
    [
        (3.0, "3", "+3"), (0.0123, "0.0123", "+0.0123"), (15400.0, "1.54e+04", "+1.54e+04"), (-2.5, "-2.5", "−2.5"),
        (1 / 3, "0.3333", "+0.3333"), (0.0, "0", "+0"), (math.inf, "inf", "+inf"), (math.nan, "nan", "+nan"),
    ],
)  # fmt: skip
def test_a_number_has_four_digits_and_no_more(value, text, signed):
    assert (number(value), number(value, signed=True)) == (text, signed)


def test_a_hash_is_short_and_says_what_it_is():
    assert short_hash("sha256:" + "0123456789abcdef" * 4) == "sha256 0123456789ab"


@pytest.mark.parametrize(("count", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers")])
def test_a_count_stands_with_its_noun(count, text):
    assert counted(count, "layer") == text
