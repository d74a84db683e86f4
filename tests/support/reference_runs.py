"""Passes of a model and its reference, with all that the two are compared by."""

from __future__ import annotations

from pytest_qsa.captures import LOGITS, Request
from pytest_qsa.engine import SampleShare
from pytest_qsa.engine.ranks import joined
from pytest_qsa.engine.subject import capture_subject
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.captures import statistics

BLOCKS, LINEARS = r"layers\.\d$", r"_proj$"
TOKENS = statistics("error", "tokens", "reference_tokens", "reference_sinks")
EVERYTHING = {
    "blocks": Request(BLOCKS, "output", None, TOKENS),
    "channels": Request(LINEARS, "input", None, statistics("error", "counts", "channel_error:no_sink")),
    "local": Request(LINEARS, "output", None, statistics("error", "local:8")),
    "weights": Request(LINEARS, "weight", None, statistics("error")),
    "predictions": Request("", LOGITS, None, statistics("scores", "agreement")),
}


def subject_of(own, original, *, disk=False):
    memory = Memory(device="cpu", offload_device="disk" if disk else "cpu")
    data = Data(num_samples=5, seq_len=24)
    return Subject("pair", Model(path=str(own), reference=str(original)), data, memory, original.parent)


def captured(subject, *names, **options):
    """Capture what is named of `EVERYTHING`; all of it, where nothing is."""
    return capture_subject(subject, [EVERYTHING[name] for name in names or EVERYTHING], **options)


def save_shared(own, original, folder):
    """Capture as one rank of several, with the models in memory and on disk; save what this rank got of either."""
    with joined() as ranks:
        for place in ("memory", "disk"):
            found = captured(subject_of(own, original, disk=place == "disk"), share=SampleShare(ranks=ranks))
            found.save(folder / f"{place}{ranks.rank}")
