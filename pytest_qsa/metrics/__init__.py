"""From a capture to one number per layer: the registry of metrics, `Series`, `Selection`. It needs numpy alone."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
