"""Verdicts drawn: in the terminal, as a page, as plots, for CI services and as JSON."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
