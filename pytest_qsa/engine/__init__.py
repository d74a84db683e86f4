"""Loads a model and runs its one pass; the only room that imports torch."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
