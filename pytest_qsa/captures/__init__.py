"""What a pass leaves: statistics, numbers of each site, the capture and its file, merging, the cache. numpy only."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
