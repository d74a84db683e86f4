"""A pytest session with gates: options, collection, the plan of the passes, fixtures, report hooks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
