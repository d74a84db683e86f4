"""A pytest session with gates: options, collection, the plan of the passes, fixtures, report hooks."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
