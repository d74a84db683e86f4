"""A number against a bound, a baseline, a reference or the last release → a verdict, and why."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
