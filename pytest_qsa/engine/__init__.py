"""The engine: the only part that imports torch, loads a model and runs it."""

from .api import capture

__all__ = ["capture"]
