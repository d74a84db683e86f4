"""Evals as evidence: what another program has measured, read from its file. Neither torch nor a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
