"""The files of a checkpoint, read without torch: tensors, quantization formats, static checks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
