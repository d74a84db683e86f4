"""Where the files that a suite names may lie: in its repository, where the operator allows it, and in the caches."""

from __future__ import annotations

import json
import os
import socket

import pytest

from pytest_qsa.common import InfraError, SuiteError
from pytest_qsa.external.evals import EvalFiles
from pytest_qsa.suite import Roots, fingerprint_of, load_suite, subject_of, yaml_source
from pytest_qsa.suite.paths import repository_of
from pytest_qsa.verdicts import kept_release

BASE = "model: {path: x}\nassertions:\n  - {id: settings, metric: checkpoint_settings}\n"
EVAL = "  - {id: gsm8k, metric: external, pointer: /score, min: 0.5, "


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Make a repository with a suite's folder, beside a folder that is nobody's business; return a writer."""
    repository = tmp_path / "repository"
    for name in (".git", "gates", "data"):
        (repository / name).mkdir(parents=True)
    (repository / ".git" / "config").write_text("token: ghs_1", encoding="utf-8")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text("hunter2", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def load(text, *overrides, name="gates/one.qsa.yaml", **keys):
        suite = repository / name
        suite.write_text(text, encoding="utf-8")
        return load_suite(suite, overrides, **keys)

    load.repository, load.outside = repository, tmp_path / "outside"
    return load


ELSEWHERE = {
    "a base": ("extends: OUTSIDE/secret.txt\n", 1),
    "a base by ..": ("extends: ../../outside/secret.txt\n", 1),
    "a base by a link": ("extends: out/secret.txt\n", 1),
    "data": (BASE + "data: {source: 'custom:OUTSIDE/secret.txt'}\n", 4),
    "data of a folder": (BASE + "data: {source: 'hf:OUTSIDE'}\n", 4),
    "data that an id leads to": (BASE + "data: {source: 'hf:repository/../outside'}\n", 4),
    "data by a link": (BASE + "data: {source: 'custom:out/secret.txt'}\n", 4),
    "data in whose folder is a link": (BASE + "data: {source: 'custom:../data'}\n", 4),
    "the checkout's token": (BASE + "data: {source: 'custom:../.git/config'}\n", 4),
    "results": (BASE + EVAL + "file: OUTSIDE/x.json}\n", 4),
    "results of the original": (BASE + EVAL + "compare: drop, file: x.json, reference: OUTSIDE/x.json}\n", 4),
    "answers": ("model: {logprobs: OUTSIDE/x.json, name: x}\n", 1),
    "answers of the original": ("model: {logprobs: x.json, name: x, reference: OUTSIDE/x.json}\n", 1),
    "pictures": ("visualization: {save_dir: OUTSIDE}\n", 1),
}


@pytest.mark.parametrize(("text", "line"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_suite_names_no_file_outside_of_its_repository(tree, text, line):
    (tree.repository / "gates" / "out").symlink_to(tree.outside)
    (tree.repository / "data" / "words.txt").symlink_to(tree.outside / "secret.txt")
    with pytest.raises(SuiteError) as caught:
        tree(text.replace("OUTSIDE", str(tree.outside)))
    said = str(caught.value)
    assert said.startswith(f"repository/gates/one.qsa.yaml:{line}: ")
    assert "allow its folder with --qsa-allow-path" in said or "in .git, which may hold a token" in said
    assert not any(secret in said for secret in ("hunter2", "ghs_1"))


@pytest.mark.parametrize("text", [text for name, (text, _) in ELSEWHERE.items() if name.startswith(("data", "res"))])
def test_what_the_operator_allows_is_read(tree, text):
    (tree.repository / "gates" / "out").symlink_to(tree.outside)
    (tree.repository / "data" / "words.txt").symlink_to(tree.outside / "secret.txt")
    tree(text.replace("OUTSIDE", str(tree.outside)), roots=Roots(allowed=(tree.outside,)))


def test_what_the_operator_overrides_may_lie_anywhere_and_nothing_else_does(tree):
    given = f"data.source=custom:{tree.outside}/secret.txt"
    file = tree(BASE, given)
    assert file.boundary.problem(tree.outside / "secret.txt") is None
    assert "outside of" in file.boundary.problem(tree.outside / "other.txt")
    with pytest.raises(SuiteError, match="secret"):
        tree(BASE + EVAL + f"file: {tree.outside}/secret.json}}\n", given)


def test_what_lies_in_the_repository_is_read_from_any_folder(tree):
    (tree.repository / "_gates").mkdir()
    (tree.repository / "_gates" / "base.yaml").write_text(BASE, encoding="utf-8")
    (tree.repository / "data" / "link.txt").symlink_to(tree.repository / "data")  # a link that stays inside
    file = tree("extends: ../_gates/base.yaml\ndata: {source: 'custom:../data'}\n")
    assert [each.id for each in file.assertions] == ["settings"]


def test_the_caches_of_the_hub_are_read_but_not_its_token(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE")
    tree(BASE + f"data: {{source: 'custom:{tmp_path}/home/hub/datasets--a/x.txt'}}\n")
    with pytest.raises(SuiteError, match="outside of"):
        tree(BASE + f"data: {{source: 'custom:{tmp_path}/home/token'}}\n")


def test_a_suite_that_is_a_link_out_of_its_repository_is_not_read(tree):
    (tree.repository / "gates" / "one.qsa.yaml").symlink_to(tree.outside / "secret.txt")
    with pytest.raises(SuiteError, match=r"one\.qsa\.yaml:1: the suite leads to .*secret\.txt, which lies outside of"):
        load_suite(tree.repository / "gates" / "one.qsa.yaml")


def test_a_socket_among_the_data_is_not_read(tree, monkeypatch):
    monkeypatch.chdir(tree.repository / "data")  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind("words.txt")
        with pytest.raises(SuiteError, match=r"holds words\.txt, which is no regular file"):
            tree(BASE + "data: {source: 'custom:../data'}\n")
    os.unlink("words.txt")


def test_the_repository_is_the_outermost_one_and_never_the_home_folder(tmp_path, monkeypatch):
    inner = tmp_path / "repository" / "sub" / "gates"
    inner.mkdir(parents=True)
    for up in (tmp_path, tmp_path / "repository", tmp_path / "repository" / "sub"):
        (up / ".git").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert repository_of(inner) == tmp_path / "repository"
    monkeypatch.setenv("HOME", str(tmp_path / "repository" / "sub"))
    assert repository_of(inner) is None


def test_without_a_repository_the_root_folder_counts_and_else_the_suites_own(tmp_path, monkeypatch):
    folder = tmp_path / "a" / "gates"
    folder.mkdir(parents=True)
    suite = folder / "one.qsa.yaml"
    assert Roots(tmp_path / "a").around(suite).repository == tmp_path / "a"
    assert Roots(tmp_path / "b").around(suite).repository == folder
    monkeypatch.setenv("HOME", str(tmp_path / "a"))
    assert Roots(tmp_path / "a").around(suite).repository == folder


@pytest.mark.parametrize("file", ["results/{name}.json", "results"])
def test_results_that_are_found_only_when_they_are_read_stay_inside_as_well(tree, file):
    (tree.repository / "results").mkdir()
    (tree.outside / "score.json").write_text(json.dumps({"score": 1}), encoding="utf-8")
    for name in ("int8.json", "results_2026.json"):
        (tree.repository / "results" / name).symlink_to(tree.outside / "score.json")
    suite = tree(BASE + EVAL + f"file: '../{file}'}}\n")
    with pytest.raises(InfraError, match="outside of"):
        EvalFiles(suite.path.parent, "int8", boundary=suite.boundary).at(suite.assertions[1].file)


@pytest.mark.parametrize("name", ["/x.gguf", "../x.gguf", "a/../../x.gguf"])
def test_a_gguf_file_lies_in_the_checkpoints_folder(tree, name):
    with pytest.raises(SuiteError, match=r":1: gguf_file is a file of the checkpoint's folder"):
        tree(BASE.replace("{path: x}", f"{{path: x, gguf_file: {name}}}"))
    tree(BASE.replace("{path: x}", "{path: x, gguf_file: quants/x.gguf}"))


@pytest.mark.parametrize("previous", ["../outside", "one/..", "."])
def test_a_last_release_by_name_lies_in_qsa_baselines(tree, previous):
    suite = tree(BASE.replace("{path: x}", f"{{path: x, previous: {previous}}}"))
    (tree.repository / "gates" / "outside" / "one").mkdir(parents=True)
    (tree.repository / "gates" / "qsa_baselines" / "one").mkdir(parents=True)
    assert kept_release(subject_of(suite), suite.path) is None


def test_a_last_release_with_a_quantized_cache_has_its_own_baselines(tree):
    suite = tree(BASE.replace("{path: x}", "{path: x, kv_cache: fp8_e4m3, previous: old}"))
    folder = tree.repository / "gates" / "qsa_baselines"
    (folder / "old" / "one").mkdir(parents=True)
    assert kept_release(subject_of(suite), suite.path) is None
    (folder / "old@kv-fp8_e4m3" / "one").mkdir(parents=True)
    assert kept_release(subject_of(suite), suite.path) == folder / "old@kv-fp8_e4m3" / "one"


def test_a_suite_too_large_to_be_one_is_not_read(tree, monkeypatch):
    monkeypatch.setattr(yaml_source, "MAX_BYTES", 100)
    with pytest.raises(SuiteError, match=r"one\.qsa\.yaml:1: has 0 MB, more than the 0 MB that are read"):
        tree(BASE + "#" * 100)


def test_a_folder_that_is_no_checkpoint_is_not_hashed(tree):
    subject = subject_of(tree(BASE.replace("path: x", f"path: {tree.outside}")))
    assert fingerprint_of(subject, None) is None  # which would raise, were a file hashed
