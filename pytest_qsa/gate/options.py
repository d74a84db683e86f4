"""What every start of pytest registers: the options of a run, which are read once, and our hooks. Nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import socket
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pytest

from .. import common, suite
from ..suite import TIERS, Tier

if TYPE_CHECKING:
    from ..captures import Capture
    from ..suite import Checkpoint, FileHashes, Roots, Subject
    from ..verdicts import Verdict

REPORT = ("on-failure", "always", "never")
PATHS = ("--qsa-model", "--qsa-config", "--qsa-output", "--qsa-markdown", "--qsa-cache", "--qsa-allow-path")
PERMISSIONS = ("qsa_allow_code", "qsa_allow_path", "qsa_vllm_python", "qsa_vllm_arg")
"""What an operator alone may say: an ini file that pytest finds by itself comes with a pull request."""
WORKER_RUN, WORKER_ALLOWED = "qsa_run", "qsa_allowed"
"""What the controller of pytest-xdist tells its workers: the name of the run's folder; what the operator allows."""
SUITES = ["*.qsa.yaml", "*.qsa.yml"]
HASHES: pytest.StashKey[FileHashes] = pytest.StashKey()
"""The hashes of the files that this process has met, so that none is read twice."""


class Options(NamedTuple):
    """What the command line and the ini file say; paths on the command line are relative to where one stands."""

    models: tuple[str, ...]
    overrides: tuple[str, ...]
    config: Path | None
    output: Path
    markdown: Path | None
    report: Literal["on-failure", "always", "never"]
    allow_code: bool
    allowed: tuple[Path, ...]
    """The folders in which suites may read beside their repositories."""
    vllm: common.VllmWords
    root: Path
    cache: Path | None
    keep: bool
    tier: Tier
    today: date
    redact: bool
    ratchet: bool
    refused_update: str | None
    """Why `--snapshot-update` must not write baselines here."""
    plan: bool
    named_tier: bool
    """Whether the command line names the tier."""
    run: str
    """The name of this run's folder, `20261129T034501Z-4711`: the same in all processes of pytest-xdist."""
    jobs: int
    lock_timeout: float | None

    @property
    def run_folder(self) -> Path:
        """Where this run's plots and report lie, below `output`, which has copies of the latest report."""
        return self.output / "runs" / self.run

    @property
    def roots(self) -> Roots:
        """Where suites may read beside their repositories."""
        return suite.Roots(self.root, self.allowed)

    @property
    def slots(self) -> list[Path]:
        """The files whose locks let one pass each run on this machine, for this user, whatever the run's cache is."""
        import platformdirs

        # A home folder may be that of several machines.
        folder = platformdirs.user_cache_path("pytest-qsa") / "slots"
        return [folder / f"{socket.gethostname()}-{number}.lock" for number in range(self.jobs)]

    @property
    def cache_folder(self) -> Path | None:
        """Where captures are kept between runs; None where they aren't."""
        if not self.keep or self.cache is not None:
            return self.cache if self.keep else None
        import platformdirs

        return platformdirs.user_cache_path("pytest-qsa")

    def as_arguments(self, checkpoint: Checkpoint | None) -> list[str]:
        """Return the arguments that another run of one test needs."""
        arguments: list[str] = []
        if checkpoint is not None:
            path = common.shown_path(Path(checkpoint.path)) if Path(checkpoint.path).exists() else checkpoint.path
            arguments.append(f"--qsa-model={checkpoint.name}={path}" if checkpoint.name else f"--qsa-model={path}")
        # Only what changes the numbers or the verdict, not where the report goes.
        arguments += [f"--qsa-set={override}" for override in self.overrides]
        arguments += [f"--qsa-tier={self.tier}"] if self.named_tier else []
        arguments += [f"--qsa-allow-path={common.shown_path(path)}" for path in self.allowed]
        arguments += [f"--qsa-vllm-python={self.vllm.python}"] if self.vllm.python else []
        arguments += [f"--qsa-vllm-arg={text}" for text in self.vllm.arguments]
        return arguments + (["--qsa-allow-code"] if self.allow_code else [])


ARGUMENTS: Mapping[str, Mapping[str, Any]] = {
    "--qsa-model": {
        "action": "append", "default": [], "metavar": "[NAME=]PATH",
        "help": "put another checkpoint under every suite; repeatable. NAME has baselines of its own, "
        "without it the suite's own model.name is what it is held against",
    },
    "--qsa-config": {
        "metavar": "PATH", "help": "the suite or configuration that gives Python tests their model and data",
    },
    "--qsa-set": {
        "action": "append", "default": [], "metavar": "KEY=VALUE",
        "help": "override a key of every suite, such as data.num_samples=8; repeatable",
    },
    "--qsa-output": {"metavar": "DIR", "help": "where the report and the plots go (default: qsa-results)"},
    "--qsa-markdown": {
        "metavar": "FILE", "help": "write the verdicts as Markdown, for the comment of a pull request",
    },
    "--qsa-report": {
        "choices": REPORT, "help": "when to write report.html, report.json and plots (default: on-failure)",
    },
    "--qsa-cache": {
        "metavar": "DIR", "help": "where captures are kept between runs (default: the user's cache folder)",
    },
    "--qsa-no-cache": {"action": "store_true", "help": "capture anew, and keep nothing"},
    "--qsa-allow-code": {
        # None, not False, is `not given`: only then the ini file decides.
        "action": "store_true", "default": None,
        "help": "let a suite run code: model.factory and model.trust_remote_code",
    },
    "--qsa-allow-path": {
        "action": "append", "default": [], "metavar": "DIR",
        "help": "let suites read in that folder as well as in their own repository; repeatable",
    },
    "--qsa-vllm-python": {
        "metavar": "PROGRAM",
        "help": "the interpreter of the environment that has vLLM, for suites with model.engine: vllm",
    },
    "--qsa-vllm-arg": {
        "action": "append", "default": [], "metavar": "KEY=VALUE",
        "help": "an argument of vLLM's LLM() that a suite can't give, its value as JSON; repeatable",
    },
    "--qsa-redact": {
        "action": "store_true", "help": "leave the text of tokens out of terminal, report and plots",
    },
    "--qsa-plan": {
        "action": "store_true",
        "help": "run nothing; say what would run, about how long and how large, and which memory settings would fit",
    },
    "--qsa-ratchet": {
        "action": "store_true",
        "help": "propose tighter budgets where the numbers have improved, as DIR/ratchet.patch",
    },
    "--qsa-allow-update": {"action": "store_true", "help": "let --snapshot-update write baselines under CI"},
    "--qsa-today": {
        "metavar": "DATE", "help": "judge waivers as on that day, such as 2027-01-31 (default: today, UTC)",
    },
    "--qsa-jobs": {
        "type": int, "metavar": "N",
        "help": "how many passes may run on this machine at once, of all pytest runs and workers (default: 1)",
    },
    "--qsa-lock-timeout": {
        "type": float, "metavar": "SECONDS",
        "help": "give up waiting for another process when it has given no sign of life for that long; it gives one "
        "every 10 s (default: 120)",
    },
    "--qsa-tier": {
        "choices": TIERS, "help": "run the gates of this tier and of those before it (default: release, all)",
    },
}  # fmt: skip
INI_KEYS: Mapping[str, tuple[str, Literal["string", "bool", "linelist"], object]] = {
    "qsa_suites": ("names of the files that are suites", "linelist", SUITES),
    "qsa_config": ("as --qsa-config, relative to the root folder", "string", ""),
    "qsa_output": ("as --qsa-output, relative to the root folder", "string", "qsa-results"),
    "qsa_cache": ("as --qsa-cache, relative to the root folder", "string", ""),
    "qsa_redact": ("as --qsa-redact", "bool", False),
    "qsa_tier": ("as --qsa-tier", "string", TIERS[-1]),
    "qsa_report": ("as --qsa-report", "string", "on-failure"),
    "qsa_allow_code": ("as --qsa-allow-code; only in a file that is given with -c", "bool", False),
    "qsa_allow_path": ("as --qsa-allow-path, a folder a line; only in a file that is given with -c", "linelist", []),
    "qsa_vllm_python": ("as --qsa-vllm-python; only in a file that is given with -c", "string", ""),
    "qsa_vllm_arg": ("as --qsa-vllm-arg, one a line; only in a file that is given with -c", "linelist", []),
    "qsa_jobs": ("as --qsa-jobs", "string", "1"),
}


def add_options(parser: pytest.Parser) -> None:
    """Register the options and the ini keys."""
    group = parser.getgroup("qsa", "gate model checkpoints on their numbers (pytest-qsa)")
    for name, settings in ARGUMENTS.items():
        group.addoption(name, **settings)
    for key, (text, kind, default) in INI_KEYS.items():
        parser.addini(key, text, type=kind, default=default)


def read_options(config: pytest.Config) -> Options:
    """Read and check them.

    Raises:
        UsageError: a value that is wrong whatever the suites are.
    """
    path = _path(config, "config")
    if path is not None and not path.is_file():
        given = config.getoption("qsa_config")
        named = f"--qsa-config {given}" if given else f"qsa_config = {config.getini('qsa_config')}"
        raise pytest.UsageError(f"{named}: there is no such file")
    _check_roots(config)
    code, allowed, vllm = _permissions(config)
    models = tuple(config.getoption("qsa_model"))
    overrides = tuple(config.getoption("qsa_set"))
    _check_models(models, updating=bool(config.getoption("update_snapshots", False)))
    _check_overrides(overrides)
    return Options(
        models=models,
        overrides=overrides,
        config=path,
        output=_path(config, "output") or config.rootpath / "qsa-results",
        markdown=config.invocation_params.dir / given if (given := config.getoption("qsa_markdown")) else None,
        report=_choice(config, "report", REPORT),
        cache=_path(config, "cache"),
        tier=_choice(config, "tier", TIERS),
        today=_today(config.getoption("qsa_today")),
        refused_update=_refused_update(config),
        plan=config.getoption("qsa_plan"),
        ratchet=config.getoption("qsa_ratchet"),
        redact=bool(config.getoption("qsa_redact") or config.getini("qsa_redact")),
        named_tier=config.getoption("qsa_tier") is not None,
        run=getattr(config, "workerinput", {}).get(WORKER_RUN) or f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{os.getpid()}",
        keep=not config.getoption("qsa_no_cache"),
        allow_code=code,
        allowed=allowed,
        vllm=vllm,
        root=config.rootpath,
        jobs=_jobs(config),
        lock_timeout=_lock_timeout(config.getoption("qsa_lock_timeout")),
    )


def _permissions(config: pytest.Config) -> tuple[bool, tuple[Path, ...], common.VllmWords]:
    """Return whether the operator allows code, in which folders suites may read beside theirs, and where vLLM is.

    Raises:
        UsageError: an ini file that pytest found by itself tries to allow something, or a value is wrong.
    """
    if hasattr(config, "workerinput"):  # the controller has judged its own words
        code, paths, python, arguments = config.workerinput.get(WORKER_ALLOWED, (False, (), "", ()))
        return code, tuple(map(Path, paths)), common.VllmWords(python, tuple(arguments))
    asked = [name for name in PERMISSIONS if config.getoption(name) or config.getini(name)]
    words = _operators_words(config) if asked else argparse.Namespace()
    for name in asked:
        overridden = any(text.partition("=")[0].strip() == name for text in words.override_ini)
        by_key = bool(config.getini(name)) and not overridden
        by_addopts = (config.getoption(name) or None) != (getattr(words, name) or None)
        if words.inifilename is None and (by_key or by_addopts):
            option = f"--{name.replace('_', '-')}"
            raise pytest.UsageError(
                f"{config.inipath or 'an ini file'}: {name if by_key else f'addopts with {option}'} counts only in a "
                "file that is given with -c, for one that pytest finds by itself comes with what is tested: write "
                f"{option} on the command line{'' if name == 'qsa_vllm_arg' else f', or set {name.upper()}'}"
            )
    stand, root = config.invocation_params.dir, config.rootpath
    named = [stand / path for path in config.getoption("qsa_allow_path")]
    named += [root / path for path in config.getini("qsa_allow_path")]
    program, ini = config.getoption("qsa_vllm_python"), config.getini("qsa_vllm_python")
    python = str(stand / os.path.expanduser(program) if program else ini and root / os.path.expanduser(ini))
    vllm = common.VllmWords(python, (*config.getini("qsa_vllm_arg"), *config.getoption("qsa_vllm_arg")))
    try:
        common.vllm_arguments(vllm.arguments)
        environment, folders = common.allowed_code(), common.allowed_paths(map(str, named))
    except common.SuiteError as error:
        raise pytest.UsageError(str(error)) from None
    given = config.getini("qsa_allow_code") if environment is None else environment
    return bool(config.getoption("qsa_allow_code") or given), folders, vllm


def _operators_words(config: pytest.Config) -> argparse.Namespace:
    """Return what the command line and PYTEST_ADDOPTS say of permissions and of the ini file, without its addopts."""
    # Not pytest's own parser, in which --help ends the parsing.
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.add_argument("-c", "--config-file", dest="inifilename")
    parser.add_argument("-o", "--override-ini", action="append", default=[])
    parser.add_argument("--qsa-allow-code", action="store_true")
    parser.add_argument("--qsa-allow-path", action="append")
    parser.add_argument("--qsa-vllm-python")
    parser.add_argument("--qsa-vllm-arg", action="append")
    words = [*shlex.split(os.environ.get("PYTEST_ADDOPTS", "")), *map(str, config.invocation_params.args)]
    return parser.parse_known_args(words)[0]


def _jobs(config: pytest.Config) -> int:
    """Return how many passes may run at once: of the command line, else of the ini file."""
    given = config.getoption("qsa_jobs")
    value = str(config.getini("qsa_jobs") if given is None else given)
    if not (value.isascii() and value.isdigit() and 1 <= len(value) <= 4 and int(value)):
        raise pytest.UsageError(f"qsa_jobs = {value}: a whole number from 1 to 9999")
    return int(value)


def _lock_timeout(given: float | None) -> float | None:
    if given is not None and not given > 0:
        raise pytest.UsageError(f"--qsa-lock-timeout {given:g}: more than 0 seconds")
    return given


def _refused_update(config: pytest.Config) -> str | None:
    """Say why baselines must not be updated here: a CI run that rewrites its own baselines checks nothing."""
    updating = bool(config.getoption("update_snapshots", False))
    under_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
    if updating and under_ci and not config.getoption("qsa_allow_update"):
        return (
            "--snapshot-update under CI would make the baselines fit whatever ran: update them where a person reviews "
            "the diff, or allow it with --qsa-allow-update"
        )
    return None


def _today(given: str | None) -> date:
    try:
        return date.fromisoformat(given) if given else datetime.now(UTC).date()
    except ValueError:
        raise pytest.UsageError(f"--qsa-today {given}: write a day, such as 2027-01-31") from None


def _path(config: pytest.Config, name: str) -> Path | None:
    """Return a path of the command line, relative to where one stands, or of the ini file, relative to the root."""
    given, ini = config.getoption(f"qsa_{name}"), config.getini(f"qsa_{name}")
    return config.invocation_params.dir / given if given else config.rootpath / ini if ini else None


def _choice(config: pytest.Config, name: str, known: tuple[str, ...]) -> Any:
    """Return a word of the command line or the ini file: argparse has checked only the first."""
    value = config.getoption(f"qsa_{name}") or config.getini(f"qsa_{name}")
    if value not in known:
        raise pytest.UsageError(f"qsa_{name} = {value}: one of {', '.join(known)}")
    return value


def _check_roots(config: pytest.Config) -> None:
    """Refuse `--option PATH` with a path outside the project: pytest took it for a test's, and read no ini here."""
    words, stand = list(config.invocation_params.args), config.invocation_params.dir
    inis = ("pytest.ini", ".pytest.ini", "pyproject.toml", "tox.ini", "setup.cfg")
    if config.inipath is not None or not any((up / ini).is_file() for up in (stand, *stand.parents) for ini in inis):
        return
    for option, value in zip(map(str, words), map(str, words[1:]), strict=False):
        outside = option in PATHS and (stand / value).exists() and stand not in (stand / value).resolve().parents
        if outside and (stand / value).resolve() != stand:
            raise pytest.UsageError(
                f"write {option}={value}: behind a space, pytest takes a path for a test's, and its ini file is lost"
            )


def _check_models(models: tuple[str, ...], *, updating: bool) -> None:
    names = [model.partition("=")[0] if "=" in model else None for model in models]
    if updating and names.count(None) > 1:
        raise pytest.UsageError(
            "--snapshot-update with two --qsa-model without NAME: both would write the baselines of the suite's own "
            "model; name them, NAME=PATH"
        )
    for name in names:
        if name is not None and names.count(name) > 1:
            raise pytest.UsageError(f"--qsa-model {name}=…: the name stands twice")
        if name is not None and not all(c.isalnum() or c in "._-/" for c in name):
            raise pytest.UsageError(f"--qsa-model {name}=…: a name may hold letters, digits and _ . - / only")
        if name is not None and (problem := suite.name_problem(name)):
            raise pytest.UsageError(f"--qsa-model {name}=…: {problem}")
    for model in models:
        if problem := suite.name_problem(Path(os.path.abspath(model.rpartition("=")[2])).name):
            raise pytest.UsageError(f"--qsa-model {common.visible(model)}: its folder's name won't do: {problem}")


def _check_overrides(overrides: tuple[str, ...]) -> None:
    for override in overrides:
        try:
            suite.check_override(override)
        except common.SuiteError as error:
            raise pytest.UsageError(str(error)) from None


def resembles_a_suite(path: Path) -> bool:
    """Say whether a file that isn't collected was meant as a suite, by its name and the key `assertions`."""
    name = path.name.lower()
    # Every file that pytest meets is asked: without this, each start would compile the pattern.
    if "q" not in name:
        return False
    if not re.search(r"(qsa|qas|sqa|aqs).*\.(ya?ml|ymal|yam|json|txt)", name) or not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return bool(re.search(r"""^["']?assertions["']?\s*:""", file.read(1_000_000), re.MULTILINE))


class HookSpecs:
    """The hooks that a conftest or another plugin implements, to send verdicts elsewhere, say.

    An implementation is a function of the hook's name with any of its arguments.
    """

    def pytest_qsa_verdict(self, item: pytest.Item, verdict: Verdict) -> None:
        """Take a verdict, in the process that ran the item: a worker, under pytest-xdist.

        Called for each verdict of each attempt, when the item's call has ended, with what the report shows: a
        comparison that a passing test took back has no verdict. Under `--qsa-redact` it holds no text of a token.
        """

    def pytest_qsa_capture(self, subject: Subject, capture: Capture, cached: bool) -> None:
        """Take the capture of a subject, once for each subject of a run, when it is there.

        Under pytest-xdist it is called in the worker that made it. `cached`: it is from an earlier run. Under
        `--qsa-redact` it holds no tokens.
        """
