"""What Python's garbage collector leaves alone: the objects of libraries and models, of which none goes meanwhile."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_frozen = False
"""Whether objects are known to be frozen, by a caller or by somebody else."""


def _is_frozen() -> bool:
    """Return whether there are frozen objects, which thawing would undo for whoever froze them."""
    global _frozen
    # Python counts them, for 40 ms: that there are some is remembered. That there are none is told at once.
    _frozen = _frozen or gc.get_freeze_count() > 0
    return _frozen


@contextmanager
def uncollected() -> Iterator[None]:
    """Import without collecting garbage: torch and transformers make a million objects of which none goes.

    Python would look through all of them again and again, for a fifth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not _is_frozen():  # makes all objects old, as if collected
                gc.freeze()
                gc.unfreeze()
            gc.enable()


@contextmanager
def libraries_frozen() -> Iterator[None]:
    """Let the garbage collector never again look at what is imported inside, nor at what there is by then.

    Looking through the million objects of torch and transformers takes 0.3 s each time, and freeing them one by one at
    Python's exit a second. Where torch is loaded already nothing is frozen: a model of somebody else must be freed when
    it goes.
    """
    global _frozen
    if "torch" in sys.modules:
        yield
        return
    gc.collect()  # or what is garbage now would stay
    with uncollected():
        try:
            yield
        finally:
            gc.freeze()
            _frozen = True
            atexit.register(_thaw_for_nanobind)


def _thaw_for_nanobind() -> None:
    """Let Python free everything at its exit if a library is there that prints what wasn't freed, as triton does."""
    if any(metaclass.__module__ == "nanobind" for metaclass in type.__subclasses__(type)):
        gc.unfreeze()


@contextmanager
def earlier_objects_frozen() -> Iterator[None]:
    """Let the garbage collector look only at objects that are made inside.

    A loaded model and its libraries are half a million objects of which none goes meanwhile: looking through them took
    a third of the Python time of a pass.
    """
    global _frozen
    if _is_frozen():
        yield
        return
    gc.freeze()
    _frozen = True
    try:
        yield
    finally:
        gc.unfreeze()
        _frozen = False
