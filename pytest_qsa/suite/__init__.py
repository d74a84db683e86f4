"""What a user writes, typed, validated and traced to its line; and the subject that it stands for."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
