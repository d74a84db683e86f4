"""The suite: what a user writes, typed, validated, and traced to its line."""

from .loading import SuiteFile, load_suite, misfit
from .suite import Assertion, Baseline, Data, Memory, Model, Suite
from .visualization import Visualization

__all__ = [
    "Assertion",
    "Baseline",
    "Data",
    "Memory",
    "Model",
    "Suite",
    "SuiteFile",
    "Visualization",
    "load_suite",
    "misfit",
]
