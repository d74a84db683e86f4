"""What a user writes, typed, validated and traced to its line; and the subject that it stands for."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
