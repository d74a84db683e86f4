"""Any key of a suite is an option of `qsa`'s commands: typed, checked, and told in one line where it is wrong."""

from __future__ import annotations

import argparse

import pytest

from pytest_qsa.cli.shared import add_overrides, read_overrides
from pytest_qsa.common.errors import SuiteError
from pytest_qsa.suite import load_suite


@pytest.fixture
def overridden(tmp_path, monkeypatch):
    """Return a function that reads options and applies them to a configuration in another folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("model: {path: there}\nvisualization: {outlier: {threshold: 8}}\n")
    monkeypatch.chdir(tmp_path)

    def overridden(*arguments):
        parser = argparse.ArgumentParser(prog="qsa", allow_abbrev=False)
        add_overrides(parser)
        overrides = read_overrides(*parser.parse_known_args(arguments))
        return load_suite(tmp_path / "configs" / "a.yaml", overrides, "--").suite

    return overridden


@pytest.mark.parametrize(
    ("arguments", "get", "value"),
    [
        (["--data.num_samples", "128"], lambda suite: suite.data.num_samples, 128),
        (["--data.num_samples=128"], lambda suite: suite.data.num_samples, 128),
        (["--outlier.threshold", "100"], lambda suite: suite.visualization.outlier.threshold, 100),
        (["--visualization.outlier.threshold", "1e2"], lambda suite: suite.visualization.outlier.threshold, 100),
        (["--memory.auto_offload", "False"], lambda suite: suite.memory.auto_offload, False),
        (["--data.custom.text_column", "content"], lambda suite: suite.data.custom.text_column, "content"),
        (["--magnitude.reduce_dim", "null"], lambda suite: suite.visualization.magnitude.reduce_dim, None),
        (["--magnitude.patterns", "[a, b$]"], lambda suite: suite.visualization.magnitude.patterns, ["a", "b$"]),
        (["--magnitude.weight.patterns", "[a]"], lambda suite: suite.visualization.magnitude.weight.patterns, ["a"]),
        (["--heatmap_3d.view_angle", "[20, 1]"], lambda suite: suite.visualization.heatmap_3d.view_angle, [20, 1]),
        (["--enabled.distribution", "true"], lambda suite: suite.visualization.enabled.distribution, True),
        (["--dpi", "90"], lambda suite: suite.visualization.dpi, 90),
        (["--model.path", "hub/id"], lambda suite: suite.model.path, "hub/id"),
    ],
)
def test_an_option_overrides_its_key(overridden, arguments, get, value):
    assert get(overridden(*arguments)) == value


def test_what_no_option_names_stays_as_the_file_says(overridden):
    suite = overridden("--data.seed", "3")
    assert (suite.model.path, suite.visualization.outlier.threshold) == ("there", 8)


def test_paths_of_options_are_relative_to_where_one_stands(overridden, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    suite = overridden("--save_dir", "out", "--data.source", "custom:a.txt", "--model.path", "checkpoint")
    assert suite.visualization.save_dir == str(tmp_path / "out")
    assert suite.data.source == f"custom:{tmp_path / 'a.txt'}"
    assert suite.model.path == str(tmp_path / "checkpoint")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.num_samples", "many"], "--data.num_samples=many: num_samples: should be a valid integer"),
        (["--data.num_samples", "0"], "--data.num_samples=0: num_samples: should be greater than 0"),
        (["--memory.auto_offload", "perhaps"], "--memory.auto_offload=perhaps: auto_offload: should be a valid bool"),
        (["--outlier.threshold", "-1"], "threshold: should be greater than 0"),
        (["--output.formats", "[pgn]"], "(did you mean 'png'?)"),
        (["--data.num_sample", "8"], "--data.num_sample: there is no key 'data.num_sample'"),
        (["--outlier.treshold=8"], "no key 'visualization.outlier.treshold' (did you mean 'threshold'?)"),
        (["--magnitude.patterns", "[x(]"], "'x('"),
    ],
)
def test_a_wrong_option_is_told_in_one_line(overridden, arguments, said):
    with pytest.raises(SuiteError) as caught:
        overridden(*arguments)
    assert str(caught.value).startswith("--")
    assert arguments[0].partition("=")[0].removeprefix("--") in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_help_gives_the_default_of_a_key_that_has_one(capsys):
    parser = argparse.ArgumentParser(prog="qsa")
    add_overrides(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-keys"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.served.url str --model.served.model" in text  # required: it has none
    assert "capture itself; default: false" in text
    assert "Undefined" not in text
