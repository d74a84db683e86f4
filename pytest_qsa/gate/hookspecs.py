"""The hooks that pytest-qsa calls: a conftest or another plugin implements them, to send verdicts elsewhere, say."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from ..common import QsaWarning

if TYPE_CHECKING:
    from ..captures import Capture
    from ..suite import Subject
    from ..verdicts import Verdict


class HookSpecs:
    """The hooks. An implementation is a function of the hook's name with any of its arguments."""

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


def call_hook(name: str, hooks: Any, config: pytest.Config, warn: Callable[[Warning], None], **arguments: Any) -> None:
    """Call each implementation of a hook by itself: one that raises leaves a warning, and the others still run.

    `hooks`: `config.hook`, or that of an item, which leaves out the conftests of other folders.
    """
    everyone = {implementation.plugin for implementation in getattr(config.hook, name).get_hookimpls()}
    # pluggy calls the implementation that was registered last first
    for implementation in reversed(getattr(hooks, name).get_hookimpls()):
        # subset_hook_caller takes the plugins to leave out: all but this one.
        caller = config.pluginmanager.subset_hook_caller(name, everyone - {implementation.plugin})
        try:
            caller(**arguments)
        except Exception as error:
            with warnings.catch_warnings():
                warnings.simplefilter("always")  # made an error, the warning would end the session
                warn(QsaWarning(f"{name}: {type(error).__name__}: {error}"))
