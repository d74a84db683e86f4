"""Every command, suite and program that the documentation shows is run as a reader would run it."""

from __future__ import annotations

import warnings

import pytest

from pytest_qsa import capture
from pytest_qsa.common.errors import QsaWarning
from support import models
from support.documents import ROOT, Block, Reader, blocks_of, pages
from support.projects import Project

MOST_NOT_RUN = 9


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return the cache that all pages share: their suites measure the same stand-ins."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def capture_file(tmp_path_factory):
    """Return a capture on disk, of whatever model."""
    file = tmp_path_factory.mktemp("captures") / "a.qsa"
    capture(models.llama(), [models.token_batch(2, 12)], sites=[(r"layers\.\d+$", "output")]).save(file)
    return file


@pytest.fixture
def reader_of(tmp_path, monkeypatch, cache, llama, int8_llama, capture_file):
    """Return a function that makes someone who reads a page."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))

    def reader(page):
        made = Reader(Project(tmp_path / "project"), page)
        made.project.settings["XDG_CACHE_HOME"] = str(cache)
        made.prepare({"float": llama, "int8": int8_llama, "capture": capture_file})
        made.names |= {"model": models.llama(), "batches": [models.token_batch(2, 12)], "tokenizer": None}
        monkeypatch.chdir(made.project.folder)
        return made

    return reader


@pytest.mark.process
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_what_a_page_shows_works(reader_of, page):
    reader = reader_of(page)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", QsaWarning)
        for block in blocks_of(page):
            try:
                reader.follow(block)
            except BaseException as error:
                error.add_note(f"{page.relative_to(ROOT)}:{block.line}: {block.text[:200]}")
                raise
        reader.finish()


def test_a_block_that_is_not_run_says_why_and_there_are_few():
    left = [(page.stem, block) for page in pages() for block in blocks_of(page) if block.reason]
    assert len(left) <= MOST_NOT_RUN, [(page, block.line, block.reason) for page, block in left]


@pytest.mark.process
@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("yaml", "# a.qsa.yaml\nmodel: {path: checkpoints/my-model}\nassertions: [{id: a, metric: rsm}]\n"),
        ("yaml", "assertions: []\n"),
        ("yaml", "# .github/workflows/a.yml\nname: a\njobs: {}\n"),
        ("console", "$ pytest gate.qsa.yaml --qsa-no-such-option\n"),
        ("console", "$ pytest nowhere.qsa.yaml\n"),
        ("console", "$ qsa layers --config nowhere.yaml\n"),
        ("console", "$ make nothing\n"),
        ("console", "$ pip install 'pytest-qsa[nothing]'\n"),
        ("console", "$ launch missiles\n"),
        ("python", "from pytest_qsa import nothing\n"),
    ],
    ids=lambda text: text.partition("\n")[0],
)
def test_a_wrong_block_is_found(reader_of, language, text):
    reader = reader_of(ROOT / "README.md")
    with pytest.raises((AssertionError, SystemExit, ImportError, ValueError)):
        reader.follow(Block(language, text, "", 1))
