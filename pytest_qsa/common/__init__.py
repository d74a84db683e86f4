"""Errors, files, text and progress, for every room."""

from .imports import face, find_moved_modules

find_moved_modules()
__getattr__, __dir__ = face(__name__, __file__)
