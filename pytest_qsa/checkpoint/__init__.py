"""The files of a checkpoint, read without torch: tensors, quantization formats, static checks."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
