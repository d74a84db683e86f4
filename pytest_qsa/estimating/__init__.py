"""What a run would take, before anything of it is loaded: configuration and headers → memory, time, what would fit."""

from .machine import Gpu, Machine
from .settings import Setting, settings_of
from .sizes import Sizes, sizes_of
from .work import Work

__all__ = ["Gpu", "Machine", "Setting", "Sizes", "Work", "settings_of", "sizes_of"]
