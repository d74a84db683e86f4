"""The gate of one pytest session: options, collection, planning, fixtures and reports."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
