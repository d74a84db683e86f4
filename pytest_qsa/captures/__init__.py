"""What a pass leaves: statistics, the numbers of each site, the capture file, merging, the cache."""

from ..common import face

__getattr__, __dir__ = face(__name__, __file__)
