from .captures import Capture as Capture
from .engine import capture as capture
from .metrics import Series as Series
