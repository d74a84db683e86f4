"""The suite: what a user writes, typed, validated, and traced to its line."""

from .assertion import Assertion
from .external import ExternalAssertion
from .loading import SuiteFile, load_suite, misfit
from .suite import Baseline, CheckpointAssertion, Data, MeasuredAssertion, Memory, Model, Suite
from .visualization import Visualization
from .yaml_source import Place

__all__ = [
    "Assertion",
    "Baseline",
    "CheckpointAssertion",
    "Data",
    "ExternalAssertion",
    "MeasuredAssertion",
    "Memory",
    "Model",
    "Place",
    "Suite",
    "SuiteFile",
    "Visualization",
    "load_suite",
    "misfit",
]
