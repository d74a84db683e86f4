"""Where the files that a suite names may lie: in its repository, in the caches, and where the operator allows it.

A suite comes with a pull request, and a run quotes what it reads in a log that others see.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..common import InfraError, shown_path
from .subjects import cache_folder

ALLOW_PATH = "--qsa-allow-path"


@dataclass(frozen=True)
class Roots:
    """What an operator lets suites read beside their repositories.

    `root`: pytest's root folder, None for the current one; it stands in for a repository where there is none.
    `allowed`: the folders of `--qsa-allow-path`.
    """

    root: Path | None = None
    allowed: tuple[Path, ...] = ()

    def around(self, suite: Path) -> Boundary:
        """Return the boundary of what a suite may read."""
        folder = Path(os.path.abspath(suite.parent)).resolve()
        root = (self.root or Path.cwd()).resolve()
        if (repository := repository_of(folder)) is None:
            repository = root if folder.is_relative_to(root) and not _holds_home(root) else folder
        return Boundary(repository, tuple(path.resolve() for path in self.allowed))


@dataclass(frozen=True)
class Boundary:
    """The folders in which the files of one suite may lie: its repository, and those that the operator allows."""

    repository: Path
    allowed: tuple[Path, ...] = ()

    @cached_property
    def _inside(self) -> tuple[Path, ...]:
        return (self.repository, *self.allowed, *_caches())

    def problem(self, path: Path, *, below: bool = False) -> str | None:
        """Return why a file must not be read, as what follows its name; None where it may. Links are followed.

        `below`: of a folder, all that is in it as well.
        """
        try:
            real = path.resolve()
            special = real.exists() and not real.is_file() and not real.is_dir()
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links in a circle
            return f"can't be looked up: {getattr(error, 'strerror', None) or 'no path can be so'}"
        root = next((root for root in self._inside if real.is_relative_to(root)), None)
        if root is None:
            leads = "lies" if real == Path(os.path.abspath(path)) else f"leads to {real}, which lies"
            return f"{leads} outside of {self.repository}: allow its folder with {ALLOW_PATH}"
        # Checkouts of CI services keep a token there.
        if any(part.casefold().rstrip(". ") == ".git" for part in real.relative_to(root).parts):
            return "lies in .git, which may hold a token, so it isn't read"
        if special:
            return "is no regular file, so it isn't read"
        return next(self._problems_below(real, {real}), None) if below and real.is_dir() else None

    def check(self, path: Path) -> None:
        """Check a file that is found only when it is read.

        Raises:
            InfraError: it must not be read.
        """
        if problem := self.problem(path):
            raise InfraError(f"{shown_path(path)}: it {problem}")

    def _problems_below(self, folder: Path, seen: set[Path]) -> Iterator[str]:
        """Yield what must not be read in a folder, also in folders that links lead to; each is looked at once."""
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                    if problem := self.problem(path):
                        yield f"holds {entry.name}, which {problem}"
                    path = path.resolve()
                if entry.is_dir() and entry.name != ".git" and path not in seen:
                    seen.add(path)
                    yield from self._problems_below(path, seen)


def repository_of(folder: Path) -> Path | None:
    """Return the outermost of a folder and its parents that holds `.git`; never the home folder or one that holds it.

    The outermost, because a submodule's suite may extend one of the repository around it.
    """
    ups = [up for up in (folder, *folder.parents) if (up / ".git").exists() and not _holds_home(up)]
    return ups[-1] if ups else None


def _holds_home(folder: Path) -> bool:
    """Say whether a folder is the root of the system, the home folder, or a parent of that."""
    return folder == Path(folder.anchor) or Path(os.path.expanduser("~")).resolve().is_relative_to(folder)


def _caches() -> list[Path]:
    """Return the caches of the hub's models, of `datasets` and of this package, as the libraries look for them.

    Not all of `HF_HOME`, which holds the hub's token.
    """
    import platformdirs

    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    hub = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return [
        Path(path).expanduser().resolve() for path in (hub, cache_folder(), platformdirs.user_cache_path("pytest-qsa"))
    ]
