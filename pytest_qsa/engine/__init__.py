"""Loads a model and runs its one pass; the only room that imports torch."""

from ..common import InfraError, face

_named, __dir__ = face(__name__, __file__)


def __getattr__(name: str) -> object:
    """Return a name of this room; what it is made of is imported now.

    Raises:
        InfraError: a package isn't installed that only this room needs.
    """
    try:
        return _named(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("pytest_qsa"):
            raise
        raise InfraError(
            f"a model is loaded and run with {error.name}, which isn't installed here: pip install pytest-qsa with its "
            "dependencies; static checks and model.weights: files need no model"
        ) from error
