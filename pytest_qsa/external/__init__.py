"""Numbers that other programs measured: evals, read from their files, and models that a server runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
