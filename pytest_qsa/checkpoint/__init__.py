"""Static checks: what the files of a checkpoint say, before any forward. numpy only; neither torch nor a model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
