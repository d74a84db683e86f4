"""A number against a bound, a baseline, a reference or the last release → a verdict, and why."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
