"""Mutation testing of a gate: faults put into lazy copies of a checkpoint, and what the suite says of each."""

from .faults import FAULTS, Fault
from .testing import Outcome, Selftest

__all__ = ["FAULTS", "Fault", "Outcome", "Selftest"]
