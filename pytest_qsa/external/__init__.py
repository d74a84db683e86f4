"""Numbers that other programs measured: evals, read from their files, and models that a server runs."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
