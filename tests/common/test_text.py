"""Text for people: aligned tables, Markdown that no name can break, numbers as one writes them."""

import math

import pytest

from pytest_qsa.common import counted, escaped, fitted, markdown_table, number, short_hash, text_table, visible


def test_columns_are_aligned_and_no_line_ends_with_spaces():
    rows = [("layer", "max"), ("layers.10", "3"), ("", "12.5")]
    assert list(text_table(rows, right={1}, indent="  ")) == [
        "  layer       max",
        "  layers.10     3",
        "             12.5",
    ]
    assert list(text_table(rows)) == ["layer      max", "layers.10  3", "           12.5"]
    assert list(text_table([("a", ""), ("bb", "")])) == ["a", "bb"]


def test_a_markdown_table_has_a_head_and_its_cells_are_escaped():
    lines = list(markdown_table([("layer", "text"), ("a|b", "x\ny")]))
    assert lines == ["| layer | text |", "|---|---|", r"| a\|b | x\\ny |"]


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
