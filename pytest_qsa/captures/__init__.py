"""What a pass leaves: statistics, the numbers of each site, the capture file, merging, the cache."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
