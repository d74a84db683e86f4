"""YAML text → data that knows its lines: what a value is, where it stands, and what is refused."""

import pytest

from pytest_qsa.common import SuiteError
from pytest_qsa.suite.yaml_source import read_value, read_yaml


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Return a function that reads a text as the file a.yaml."""
    monkeypatch.chdir(tmp_path)

    def read(text):
        path = tmp_path / "a.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml(path)

    return read


VALUES = {
    "1": 1, "-1": -1, "1.5": 1.5, ".5": 0.5, "1e-3": 1e-3, "1E3": 1e3, "+1e-3": 1e-3, ".1e2": 10.0, "1.e2": 100.0,
    "0x10": 16, "true": True, "null": None, "~": None, "": None, "e3": "e3", "1e": "1e", "1e3x": "1e3x",
    "'1e-3'": "1e-3", "[a, 1e-3]": ["a", 1e-3], "{a: 1}": {"a": 1}, r"layers\.\d+$": r"layers\.\d+$",
    r"'layers\.\d+$'": r"layers\.\d+$",
}  # fmt: skip


@pytest.mark.parametrize("text", VALUES)
def test_a_value_means_the_same_in_a_file_and_on_the_command_line(read, text):
    value = VALUES[text]
    for found in (read(f"key: {text}\n").data["key"], read_value(text)):
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize("text", ["[a, b", "{a: 1", "'a", "a: b: c"])
def test_text_that_is_no_yaml_is_a_value_of_the_command_line_as_it_stands(text):
    assert read_value(text) == text


DOCUMENT = """\
model: {name: one,
  path: x}
data:
  # a comment
  num_samples: 2
assertions:
- id: a
  baseline:

    rel: 0.1
- {id: b, max: 1}
"""


@pytest.mark.parametrize(
    ("location", "line"),
    [
        ((), 1),
        (("model",), 1),
        (("model", "name"), 1),
        (("model", "path"), 2),
        (("model", "dtype"), 1),
        (("data", "num_samples"), 5),
        (("data", "seq_len"), 3),
        (("assertions",), 6),
        (("assertions", 0), 7),
        (("assertions", 0, "baseline", "rel"), 10),
        (("assertions", 0, "baseline", "abs"), 8),
        (("assertions", 1, "max"), 11),
        (("assertions", 2), 6),
        (("elsewhere", "x"), 1),
    ],
    ids=lambda value: ".".join(map(str, value)) or "the document" if isinstance(value, tuple) else None,
)
def test_a_value_stands_on_its_line_and_one_that_is_not_there_on_its_parents(read, location, line):
    source = read(DOCUMENT)
    assert source.place(location) == (source.path, line)
    assert str(source.error(location, "wrong")) == f"a.yaml:{line}: wrong"


def test_a_merged_mapping_has_the_lines_of_its_own_keys(read):
    source = read("base: &base {a: 1,\n  b: 2}\nuse:\n  <<: *base\n  b: 3\n")
    assert source.data["use"] == {"a": 1, "b": 3}
    assert [source.place(("use", key)).line for key in "ba"] == [5, 3]


NESTED = "[" * 2000 + "]" * 2000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(6)
)


REFUSED = {
    # case: (the text, the line that is named, what is said of it)
    "nothing": ("", 1, "the file is empty"),
    "a comment alone": ("# a comment\n", 1, "the file is empty"),
    "a key twice": ("a: 1\nb: 2\na: 3\n", 3, "the key 'a' stands twice"),
    "a key twice, deeper": ("x:\n  a: 1\n  b: {c: 1, c: 2}\n", 3, "the key 'c' stands twice"),
    "an open list": ("a: 1\nb: [1,\n", 3, "not valid YAML"),
    "two colons": ("a: b: c\n", 1, "not valid YAML"),
    "a key that is indented less than its siblings": ("a:\n  - b: 1\n    c: 2\n   d: 3\n", 4, "indented otherwise"),
    "an unknown alias": ("a: *b\n", 1, "not valid YAML"),
    "a tab": ("a: 1\n\tb: 2\n", 2, "indent by spaces, not by tabs"),
    "a tag that would run code": ("a: !!python/object:os.system x\n", 1, "not valid YAML"),
    "two documents": ("a: 1\n--- \nb: 1\n", 2, "not valid YAML"),
    "a regex in double quotes": ('a: 1\nlayers: "x\\.\\d+"\n', 2, "write a regex without quotes or in single ones"),
    "an alias of itself": ("a: &a [*a]\n", 1, "expands to more than 100000 values"),
    "a billion laughs": (LAUGHS, 1, "expands to more than 100000 values"),
    "a thousand brackets": (NESTED, 1, "nested too deeply"),
    "no UTF-8": (b"a: \xff\n", 1, "can't be read as UTF-8 text"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_is_no_suite_is_refused_with_its_line(read, case):
    text, line, said = REFUSED[case]
    with pytest.raises(SuiteError) as caught:
        read(text)
    message = str(caught.value)
    assert message.startswith(f"a.yaml:{line}: ")
    assert said in message
    assert "\n" not in message


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gate.qsa.yaml").touch()
    with pytest.raises(
        SuiteError, match=r"^gates\.qsa\.yaml: there is no such file \(did you mean 'gate\.qsa\.yaml'\?\)$"
    ):
        read_yaml(tmp_path / "gates.qsa.yaml")
