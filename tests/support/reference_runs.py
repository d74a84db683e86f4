"""Passes of a model and its reference, with all that the two are compared by."""

from __future__ import annotations

from pytest_qsa.captures import statistics as plan
from pytest_qsa.captures.statistics import LOGITS, Request
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject

BLOCKS, LINEARS = r"layers\.\d$", r"_proj$"
TOKENS = {plan.ERROR, plan.TOKENS, plan.REFERENCE_TOKENS, plan.REFERENCE_SINKS}
EVERYTHING = {
    "blocks": Request(BLOCKS, "output", None, frozenset(TOKENS)),
    "channels": Request(
        LINEARS, "input", None, frozenset({plan.ERROR, plan.COUNTS, plan.channel_error_statistic("no_sink")})
    ),
    "local": Request(LINEARS, "output", None, frozenset({plan.ERROR, plan.local_statistic(8)})),
    "weights": Request(LINEARS, "weight", None, frozenset({plan.ERROR})),
    "predictions": Request("", LOGITS, None, frozenset({plan.SCORES, plan.AGREEMENT})),
}


def subject_of(own, original, *, disk=False):
    memory = Memory(device="cpu", offload_device="disk" if disk else "cpu")
    data = Data(num_samples=5, seq_len=24)
    return Subject("pair", Model(path=str(own), reference=str(original)), data, memory, original.parent)


def captured(subject, *names, **options):
    """Capture what is named of `EVERYTHING`; all of it, where nothing is."""
    return capture_subject(subject, [EVERYTHING[name] for name in names or EVERYTHING], **options)
