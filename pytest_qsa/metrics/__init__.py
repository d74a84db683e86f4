"""From a capture to one number per layer: the registry of metrics, `Series`, `Selection`. It needs numpy alone."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
