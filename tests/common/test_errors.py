"""Errors carry no secrets, say what may have been meant, and can be caught and filtered by their public names."""

from __future__ import annotations

import warnings

import pytest

import pytest_qsa
from pytest_qsa.common import QsaUnplannedCaptureWarning, SuiteError, did_you_mean, remark, shown_path


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("401 for hf_abcdefgh12345678", "401 for …"),
        ("https://me:secret@hub.example/x", "https://…@hub.example/x"),
        ("Authorization: Bearer abc.def", "Authorization: Bearer …"),
        ("token my-own-token was refused", "token … was refused"),
        ("nothing to hide", "nothing to hide"),
    ],
)
def test_an_error_shows_no_secret(monkeypatch, text, shown):
    monkeypatch.setenv("HF_TOKEN", "my-own-token")
    assert str(pytest_qsa.InfraError(text)) == shown


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("SuiteError", "SUITE"),
        ("InfraError", "INFRA"),
        ("AnomalyError", "ANOMALOUS"),
        ("BaselineError", "ANOMALOUS"),
    ],
)
def test_each_kind_of_error_is_a_qsa_error(name, kind):
    error = getattr(pytest_qsa, name)
    assert issubclass(error, pytest_qsa.QsaError)
    assert error("x").kind == kind


def test_a_suite_error_is_a_value_error_for_pydantic():
    assert issubclass(SuiteError, ValueError)


def test_users_filter_all_warnings_by_the_public_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error", pytest_qsa.QsaWarning)
        with pytest.raises(pytest_qsa.QsaWarning):
            warnings.warn("x", QsaUnplannedCaptureWarning, stacklevel=1)


@pytest.mark.parametrize(
    ("word", "said"), [("layres", " (did you mean 'layers'?)"), ("LAYERS", ""), ("speed", ""), ("", "")]
)
def test_a_near_word_is_offered(word, said):
    assert did_you_mean(word, ["layers", "metric"]) == said


def test_a_path_is_shown_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown_path(tmp_path / "a/b.yaml") == "a/b.yaml"
    assert shown_path(tmp_path.parent / "b.yaml") == str(tmp_path.parent / "b.yaml")


def test_a_remark_fails_nothing_where_warnings_are_errors_and_is_silent_where_they_are_ignored():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        remark("a file without a checksum")
        warnings.simplefilter("ignore")
        remark("another")
    assert [str(each.message) for each in caught] == ["a file without a checksum"]
