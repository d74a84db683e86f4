"""The hooks and fixtures of the pytest plugin. It imports nothing heavy; a run without a gate pays nothing."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from . import common, gate, suite
from .suite import (
    DESELECTED,
    NOT_RUN,
    OTHER_MODEL,
    REMARKS,
    WORKER_COLLECTED,
    WORKER_NOT_RUN,
    WORKER_PROBLEM,
    WORKER_REMARKS,
    split_by_tier,
)

if TYPE_CHECKING:
    from .gate import Gate, Options, Overrides, Qsa, QsaBaseline, QsaSuite
    from .suite import Checkpoint

OPTIONS: pytest.StashKey[Options] = pytest.StashKey()
NEAR: pytest.StashKey[list[Path]] = pytest.StashKey()
"""Files that look like suites and aren't collected."""
OVERRIDES: pytest.StashKey[Overrides] = pytest.StashKey()
SUITES: pytest.StashKey[list[QsaSuite]] = pytest.StashKey()
"""The suites that a run has met."""
MARK = (
    "qsa(layers, site, exclude, metric, ..., tier): what a Python test will ask of the one pass, and its tier; "
    "every suite's tests carry it"
)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register the hooks that others may implement."""
    pluginmanager.add_hookspecs(gate.HookSpecs)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Register the options."""
    gate.add_options(parser)


@pytest.hookimpl(wrapper=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, object, object]:
    """Only collect, if a plan is asked for. A wrapper runs before pytest-xdist decides whether to start workers."""
    if config.getoption("qsa_plan"):
        config.option.collectonly = True
    return (yield)


def pytest_configure(config: pytest.Config) -> None:
    """Read the options, so that a wrong one is a usage error; report from the process that sees all results."""
    config.addinivalue_line("markers", MARK)
    options = config.stash[OPTIONS] = gate.read_options(config)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(gate.Reporter(config, options), "qsa-reporter")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> QsaSuite | None:
    """Collect suites by their names, and any YAML file that is given by name.

    A file that begins with an underscore, or lies in such a folder, is only a base that other suites extend.
    """
    named = file_path.suffix.lower() in (".yaml", ".yml") and parent.session.isinitpath(file_path)
    base = file_path.name.startswith("_") or file_path.parent.name.startswith("_")
    suite_like = any(fnmatch.fnmatch(file_path.name, pattern) for pattern in parent.config.getini("qsa_suites"))
    if not named and (base or not suite_like):
        if not base and gate.resembles_a_suite(file_path):
            parent.config.stash.setdefault(NEAR, []).append(file_path)
        return None
    if not any(parent.session.isinitpath(path) for path in (file_path, *file_path.parents)):
        return None  # beside a file that a run names: pytest asks for it too, and leaves it out afterwards
    stash = parent.config.stash
    with contextlib.nullcontext() if SUITES in stash else common.libraries_frozen():
        found: QsaSuite = gate.QsaSuite.from_parent(parent, path=file_path)
        found.overrides = stash.setdefault(OVERRIDES, gate.Overrides(stash[OPTIONS].overrides, stash[OPTIONS].roots))
        found.run = gate.run_assertion
    stash.setdefault(SUITES, []).append(found)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Say what a suite has where a run names an assertion that it hasn't."""
    try:
        return (yield)
    except pytest.UsageError as error:
        config = session.config
        folder, suites = config.invocation_params.dir, config.stash.get(SUITES, [])
        unknown = gate.unknown_assertions(config.args, folder, suites) if suites else []
        output = getattr(config, "workeroutput", None)
        if output is not None and unknown:  # an error of a worker is shown nowhere
            output[WORKER_PROBLEM] = "; ".join(unknown)
        raise pytest.UsageError(*error.args, *unknown) from None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the gates of later tiers; stop at an override or a mark that would have no effect."""
    overrides = config.stash.get(OVERRIDES, None)
    problem = overrides.problem() if overrides else None
    if problem:
        return _stop(config, items, problem)
    suites = config.stash.get(SUITES, [])
    if items and suites and (empty := gate.suites_without_assertions(suites, config.stash[OPTIONS].config)):
        return _stop(config, items, empty)
    if near := config.stash.get(NEAR, []):
        missed = gate.uncollected(near, suites, config.getini("qsa_suites"))
        config.stash[REMARKS] = [("warning", text) for text in missed]
    items[:], others, notes = gate.split_by_model(items, suites) if suites else (items, [], [])
    if others:
        config.stash[REMARKS] = [*config.stash.get(REMARKS, ()), *notes]
        config.hook.pytest_deselected(items=others)
    refusal = config.stash[OPTIONS].refused_update
    worker = hasattr(config, "workerinput")  # xdist takes an error here for a crash: there each gate says it
    if refusal and not worker and any("qsa_checkpoint" in getattr(item, "fixturenames", ()) for item in items):
        raise pytest.UsageError(refusal)
    try:
        items[:], later = split_by_tier(items, config.stash[OPTIONS].tier)
    except common.SuiteError as error:
        return _stop(config, items, str(error))
    if later:
        config.stash[NOT_RUN] = {item.nodeid: tier for item, tier in later.items()}
        config.hook.pytest_deselected(items=list(later))


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """Note the gates that something leaves out: what was not run was not passed either."""
    for item in items:
        if "qsa_checkpoint" in getattr(item, "fixturenames", ()):
            left = item.config.stash.setdefault(DESELECTED, {})
            why = OTHER_MODEL if gate.not_for(item) else "deselected"
            left[item.nodeid] = item.config.stash.get(NOT_RUN, {}).get(item.nodeid, why)


def _stop(config: pytest.Config, items: list[pytest.Item], problem: str) -> None:
    """Stop before any test. A worker of pytest-xdist tells the controller, which would take its exit for a crash."""
    output = getattr(config, "workeroutput", None)
    if output is None:
        pytest.exit(problem, returncode=pytest.ExitCode.INTERRUPTED)
    output[WORKER_PROBLEM] = problem
    items.clear()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Tell the process that reports what this worker collected and left out."""
    output, config = getattr(session.config, "workeroutput", None), session.config
    if output is not None:
        output[WORKER_NOT_RUN] = config.stash.get(NOT_RUN, {})
        output[WORKER_REMARKS] = config.stash.get(REMARKS, [])
        if any("qsa_checkpoint" in getattr(item, "fixturenames", ()) for item in session.items):
            left = config.stash.get(DESELECTED, {})
            output[WORKER_COLLECTED] = gate.collected(session.items, config.stash[OPTIONS], left)


def pytest_unconfigure() -> None:
    """Forget the metrics of this session's conftests, for another session may follow in this process."""
    registry = sys.modules.get("pytest_qsa.metrics.registry")
    if registry is not None:
        registry.METRICS.forget_conftests()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every gate on each checkpoint of `--qsa-model`; a single one leaves the test's id as it is."""
    models = metafunc.config.stash[OPTIONS].models
    if not models or "qsa_checkpoint" not in metafunc.fixturenames:
        return
    checkpoints = suite.Checkpoint.parse_all(models)
    ids = [pytest.HIDDEN_PARAM] if len(checkpoints) == 1 else [checkpoint.label for checkpoint in checkpoints]
    metafunc.parametrize("qsa_checkpoint", checkpoints, indirect=True, scope="session", ids=ids)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Fail a Python test that took the numbers and looked at none of them."""
    result = yield
    if "qsa" in pyfuncitem.fixturenames:
        gate.require_reading(pyfuncitem)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show a red verdict as its own text, and hand the verdicts to the report."""
    report = yield
    if "qsa_checkpoint" in getattr(item, "fixturenames", ()):
        gate.describe(item, call, report)
    return report


@pytest.fixture(scope="session")
def qsa_checkpoint(request: pytest.FixtureRequest) -> Checkpoint | None:
    """The checkpoint of `--qsa-model` under which a gate runs; None for the suite's own model."""
    return getattr(request, "param", None)


@pytest.fixture(scope="session")
def qsa_model() -> object:
    """Override it to gate a model of your own: return a torch.nn.Module, or a pair of one and its tokenizer."""
    return None


@pytest.fixture(scope="session")
def qsa_tokenizer() -> object:
    """Override it to give the model of `qsa_model` a tokenizer."""
    return None


@pytest.fixture(scope="session")
def qsa_batches() -> Any:
    """Override it to run the model of `qsa_model` over batches of your own: tensors [B, T], or dicts of arguments."""
    return None


@pytest.fixture(scope="session")
def qsa_reference() -> object:
    """Override it to compare the model of `qsa_model` with another one: return a torch.nn.Module."""
    return None


@pytest.fixture(scope="session")
def qsa_gate(request: pytest.FixtureRequest) -> Gate:
    """The gate of this session (internal)."""
    worker = hasattr(request.config, "workerinput")
    shared = request.getfixturevalue("tmp_path_factory").getbasetemp().parent / "qsa-captures" if worker else None
    options = request.config.stash[OPTIONS]
    return gate.Gate(request.config, options, suite.Captures(shared, options.cache_folder))


@pytest.fixture
def qsa(request: pytest.FixtureRequest, qsa_gate: Gate, qsa_checkpoint: Checkpoint | None) -> Qsa:
    r"""The subject's numbers: `assert qsa.output(r"layers\.\d+$").outlier_tokens(threshold=64) <= 1`."""
    return gate.Qsa(qsa_gate, request)


@pytest.fixture
def qsa_baseline(request: pytest.FixtureRequest, qsa: Qsa) -> Callable[..., QsaBaseline]:
    """Return a function that makes what a series must equal, within a tolerance: `rel=0.05`, say; it is kept in git."""
    from . import verdicts

    snapshot = gate.baseline_snapshot(request)

    def baseline(rel: float = 0.0, abs: float = 0.0, direction: str = "both") -> QsaBaseline:
        return gate.QsaBaseline(qsa, verdicts.Tolerance(rel, abs, direction), snapshot)

    return baseline
