"""What the tests share: small checkpoints on disk, and projects that use them."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches out
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # every process that a test starts would compile the package anew
if shutil.which("nvidia-smi") is None:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU
from support import processes
from support.checkpoints import FORMATS, TORCHAO, save_llama, save_quantized_llama, save_torchao_llama
from support.paths import ROOT
from support.projects import Project

SLOW_MARKS = {"process", "browser", "real_model"}
SLOW = 20
"""About how many plain tests take as long as one with such a mark."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: one that is left for the end runs while the other core waits."""
    taken = Counter()
    for item in items:
        taken[item.path] += SLOW if SLOW_MARKS & {mark.name for mark in item.iter_markers()} else 1
    items.sort(key=lambda item: -taken[item.path])


def pytest_collection_finish():
    """Take what is imported by now out of garbage collection, which every pass asks for and torch makes slow."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let everything be freed at the end: triton prints what isn't."""
    gc.unfreeze()


def pytest_runtest_setup(item):
    """Let the helpers know whether the test says that it starts a process."""
    processes.marked = item.get_closest_marker("process") is not None


class Formats(dict):
    """The folder of each format, made when first asked for."""

    def __init__(self, base, source):
        super().__init__(float=source)
        self.base = base

    def __missing__(self, form):
        folder = self.base / form.replace(" ", "-")
        if form in TORCHAO:
            self[form] = save_torchao_llama(folder, self["float"], *TORCHAO[form])
        else:
            preset, changes = FORMATS[form]
            self[form] = save_quantized_llama(folder, self["float"], preset, **changes)
        return self[form]


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    """Return the folder of a small Llama with its tokenizer."""
    return save_llama(tmp_path_factory.mktemp("checkpoints") / "llama")


@pytest.fixture(scope="session")
def changed_llama(tmp_path_factory):
    """Return the same Llama with the down projection of its layer 2 three times as large."""

    def change(weights):
        weights["model.layers.2.mlp.down_proj.weight"] *= 3

    return save_llama(tmp_path_factory.mktemp("checkpoints") / "changed", change)


@pytest.fixture(scope="session")
def quantized(tmp_path_factory, llama):
    """Return the folders of the small Llama in each format, made by compressed-tensors and torchao themselves."""
    return Formats(tmp_path_factory.mktemp("formats"), llama)


@pytest.fixture(scope="session")
def int8_llama(quantized):
    """Return the small Llama in int8 by compressed-tensors: a scale a row, activations quantized as they come."""
    return quantized["int8"]


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory):
    """Return a folder with SmolLM2, its int8 checkpoint and a damaged copy of that, made once for all workers."""
    processes.check_mark()
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "smollm2"
    program = ROOT / "example_suites" / "checkpoints.py"
    with FileLock(f"{folder}.lock"):
        if not (folder / "smollm2-int8-damaged").exists():  # the last that is made
            subprocess.run([sys.executable, program, "all", "--into", folder], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Return a user's empty project, one for the module."""
    return Project(tmp_path_factory.mktemp("project") / "project")


@pytest.fixture
def own_project(tmp_path):
    """Return a user's empty project for one test."""
    return Project(tmp_path / "project")


@pytest.fixture(scope="module")
def browser():
    """Start the system's chromium."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail(
            "the report is tested in a real browser and there is none: install chromium (apt-get install chromium)"
        )
    flags = ["no-sandbox", "disable-gpu", "disable-background-networking", "disable-component-update", "disable-sync"]
    with sync_playwright() as p:
        started = p.chromium.launch(executable_path=chromium, args=[f"--{flag}" for flag in [*flags, "no-first-run"]])
        yield started
        started.close()


@pytest.fixture
def opened_page(request, browser):
    """Return a function that opens a page; at the end no script may have failed and nothing may have been fetched."""
    assert request.node.get_closest_marker("browser"), "this test starts a browser: mark it with @pytest.mark.browser"
    contexts, complaints, fetched = [], [], []

    def open_page(path, width=1280, **options):
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
    assert all(url.startswith(("file:", "data:")) for url in fetched)
