"""Users' projects: files in, runs of pytest over them, reports out.

A run of pytest is a fork of a process that has imported torch once: 0.5 s a run instead of 4.
"""

from __future__ import annotations

import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from .paths import TESTS
from .processes import check_mark, forking

HEAVY = ("torch", "transformers", "datasets", "accelerate", "numpy", "matplotlib", "yaml", "pydantic", "jinja2")
QUIET = [
    "-p", "no:hypothesispytest", "-p", "no:anyio",  # a second to import, and nothing to do with ours
    "-W", "error", "-W", "ignore::pytest.PytestAssertRewriteWarning",
    "-W", "default::pytest_qsa.common.errors.QsaWarning",
]  # fmt: skip
"""What every run gets: a warning of anyone but us is an error."""
SECONDS = 240


def suite(checkpoint, *assertions, name="llama", sections=""):
    """Return the text of a suite over a checkpoint: two samples of 32 tokens, an assertion a line."""
    head = (
        f"model: {{name: {name}, path: {checkpoint}}}\ndata: {{num_samples: 2, seq_len: 32}}\n{sections}assertions:\n"
    )
    return head + "".join(f"  - {{{assertion}}}\n" for assertion in assertions)


def peaks(bound, id="peaks", layers=r"layers\.\d$", site="output"):
    """Return an assertion on the largest absolute values, which the small Llama has between 5 and 12 in its blocks."""
    return f"id: {id}, metric: absmax, layers: '{layers}', site: {site}, {bound}"


COUNTED = """\
from pathlib import Path

NOTES = Path(__file__).with_name("notes.txt")


def note(word):
    with NOTES.open("a") as file:
        file.write(word + " ")


def make():
    note("load")
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained({path!r})
    model.register_forward_pre_hook(lambda *_: note("forward"))
    return model, AutoTokenizer.from_pretrained({path!r})


def fail():
    note("load")
    raise RuntimeError("no such thing\\nas this model")
"""
"""A factory that notes what it does: formatted with the path of a checkpoint."""


@dataclass
class Run:
    """What a run of pytest left: its exit code, its output, and the report of each test's call (or of what failed)."""

    code: int
    out: str
    reports: dict[str, dict] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    warnings: list[dict] = field(default_factory=list)
    heavy: list[str] = field(default_factory=list)

    @property
    def outcomes(self):
        return {nodeid: report["outcome"] for nodeid, report in self.reports.items()}

    def text(self, test):
        """Return the failure text of the one test whose id ends so."""
        return self.report(test)["text"]

    def first_line(self, test):
        """Return the first line of the verdict's own text."""
        return next(line[1:].strip() for line in self.text(test).splitlines() if line.startswith("E "))

    def kind(self, test):
        """Return the kind of a failed gate: the first word of its text."""
        return self.first_line(test).partition(" ")[0]

    def labelled(self, test):
        """Return the lines `label   text` that end a failure, as lists by label."""
        found = {}
        for line in self.text(test).splitlines():
            label, _, rest = line.removeprefix("E   ").partition(" ")
            if line.startswith("E   ") and rest.strip() and not line.startswith("E    "):
                found.setdefault(label, []).append(rest.strip())
        return found

    def report(self, test):
        found = [report for nodeid, report in self.reports.items() if nodeid.endswith(test)]
        assert len(found) == 1, (test, list(self.reports), self.out)
        return found[0]


class Recorder:
    """Notes what a run does, in the process that sees all of it; given to pytest.main as a plugin."""

    def __init__(self):
        self.seen = {"reports": {}, "collected": [], "warnings": [], "heavy": []}

    def pytest_collection_finish(self, session):
        self.seen["collected"] = [item.nodeid for item in session.items]

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        properties = [list(pair) for pair in report.user_properties]
        self.seen["reports"][report.nodeid] = {
            "outcome": "error" if report.when != "call" and report.failed else report.outcome,
            "text": report.longreprtext,
            "crash": getattr(getattr(report.longrepr, "reprcrash", None), "message", ""),
            "line": getattr(getattr(report.longrepr, "reprcrash", None), "lineno", None),
            "path": getattr(getattr(report.longrepr, "reprcrash", None), "path", ""),
            "location": list(report.location),
            "properties": dict(properties),
        }

    def pytest_warning_recorded(self, warning_message, nodeid):
        self.seen["warnings"].append(
            {"kind": warning_message.category.__name__, "text": str(warning_message.message), "nodeid": nodeid}
        )

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        self.seen["heavy"] = [name for name in HEAVY if name in sys.modules]


def _fork(folder, arguments, environment, log):
    """Run pytest in this process, which is a fork, in the folder; the output goes to the log."""
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", closefd=False), encoding="utf-8", line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(TESTS))]
    import torch

    from . import preloaded  # noqa: F401  # the fork server imported it, and hides an error of that: here it is raised

    torch.set_num_threads(1)
    gc.freeze()  # pytest collects garbage at its end, and torch alone has a million objects
    recorder = Recorder()
    code = pytest.main(arguments, plugins=[recorder])
    Path(f"{log}.json").write_text(json.dumps(recorder.seen), encoding="utf-8")
    sys.stdout.flush()
    sys.exit(int(code))


class Project:
    """A user's folder: files in, runs of pytest over them, reports out."""

    def __init__(self, folder):
        self.folder = folder
        self._logs = folder.parent / f"{folder.name}-logs"
        self._logs.mkdir(parents=True)
        self.settings = {}
        folder.mkdir(exist_ok=True)
        self.write("pytest.ini", "[pytest]\npythonpath = .\n")

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    def read(self, name):
        return (self.folder / name).read_text(encoding="utf-8")

    def json(self, name):
        return json.loads(self.read(name))

    def files(self, name="."):
        """Return every file below a folder, by relative path, with its bytes; caches and pytest's own left out."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted((self.folder / name).rglob("*"))
            if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts)
        }

    def pytest(self, *arguments, cwd=".", environment=None):
        """Run pytest, in the file's order unless the arguments name pytest-randomly."""
        arguments = [*QUIET, *map(str, arguments)]
        if not any("randomly" in argument for argument in arguments):
            arguments = ["-p", "no:randomly", *arguments]
        log = self._logs / f"{len(list(self._logs.glob('*.log')))}.log"
        process = forking().Process(
            target=_fork, args=(self.folder / cwd, arguments, self._environment(environment), log)
        )
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            process.join()
        out = log.read_text(encoding="utf-8")
        seen = Path(f"{log}.json")
        return Run(process.exitcode, out, **(json.loads(seen.read_text(encoding="utf-8")) if seen.exists() else {}))

    def program(self, *words, environment=None):
        """Run a program in a process of its own; return the completed process."""
        check_mark()
        return subprocess.run(
            [str(word) for word in words], cwd=self.folder, env=self._environment(environment), text=True,
            capture_output=True, timeout=SECONDS, check=False,
        )  # fmt: skip

    def _environment(self, more):
        """Return the environment without what an outer pytest and a CI leave in it, and with caches of our own."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTEST_", "COV_", "CI", "GITHUB_", "GITLAB_"))
        }
        settings = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}",
            "TERM": "dumb",
            "COLUMNS": "140",
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self._logs / "cache"),
            "MPLCONFIGDIR": str(Path(tempfile.gettempdir()) / "qsa-tests-fonts"),  # matplotlib's list takes seconds
        }
        return kept | settings | self.settings | (more or {})
