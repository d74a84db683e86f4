"""Verdicts drawn: in the terminal, as a page, as plots, for CI services and as JSON."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
