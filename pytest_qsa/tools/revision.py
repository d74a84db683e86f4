"""The suites and baselines of a git revision, read from git's objects: nothing is checked out and no hook runs."""

from __future__ import annotations

import hashlib
import os
import posixpath
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..common import InfraError, one_line, visible
from ..verdicts import BASELINES

LINK = b"120000"
"""git's mode of a symbolic link, whose content is where it leads."""
MOST_LINKS = 8
POINTER, MOST_OF_POINTER = b"version https://git-lfs.github.com/spec/", 1024
"""How a file of git-lfs begins that stands for a large one, and its largest size (git-lfs, docs/spec.md)."""


@dataclass
class Revision:
    """A commit. `name`: as the user gave it. `root`: the repository's folder, with links resolved."""

    name: str
    commit: str
    root: Path
    _objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, folder: Path) -> Revision:
        """Find a commit in the repository that a folder lies in.

        Raises:
            InfraError: there is no git, no repository, or no such commit.
        """
        top = _git(folder, "rev-parse", "--show-toplevel", why="--against compares with a commit of its repository")
        root = Path(os.fsdecode(top.rstrip(b"\n"))).resolve()
        why = f"--against {visible(name)}: there is no such commit here; where the clone is shallow, fetch it first"
        # A name that begins with a dash is no option.
        words = ("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        found = cls(name, _git(root, *words, why=why).decode("ascii").strip(), root)
        for entry in _git(root, "ls-tree", "-r", "-z", found.commit, why=why).split(b"\0"):
            about, _, path = entry.partition(b"\t")
            if path.endswith((b".yaml", b".yml", b".json")):
                mode, _, digest = about.split(b" ")
                found._objects[os.fsdecode(path)] = mode, digest.decode("ascii")
        return found

    @property
    def shown(self) -> str:
        """The name with the commit, for a message."""
        return f"{self.name} ({self.commit[:10]})" if not self.commit.startswith(self.name) else self.commit[:10]

    def relative(self, path: Path) -> str | None:
        """Return a path as the repository names it; None outside of it."""
        # The folder alone is resolved: the file itself may be a link today and none then.
        full = path.parent.resolve() / path.name
        return full.relative_to(self.root).as_posix() if full.is_relative_to(self.root) else None

    def text(self, path: Path) -> str | None:
        """Return the text of a file in this commit, of one outside of the repository that of today; None for none.

        Raises:
            UnicodeDecodeError: it is YAML and no UTF-8.
        """
        name = self.relative(path)
        if name is None:
            return path.read_text(encoding="utf-8") if path.is_file() else None
        for _ in range(MOST_LINKS):
            if name not in self._objects:
                return None
            mode, digest = self._objects[name]
            content = _git(self.root, "cat-file", "blob", digest, why=f"{name} of {self.shown} can't be read")
            if mode != LINK:
                return content.decode("utf-8", "strict" if name.endswith(("yaml", "yml")) else "replace")
            name = posixpath.normpath(posixpath.join(posixpath.dirname(name), os.fsdecode(content)))
        return None

    def is_same(self, path: Path) -> bool:
        """Say whether a file has the content that it has in this commit, so that nobody has to parse it."""
        name = self.relative(path)
        known = self._objects.get(name) if name is not None else None
        return known is not None and self._is_object(path, known[1])

    def changed(self, path: Path) -> list[Path]:
        """Return what is other than in this commit: a file itself, or files of a folder, also new ones and lost ones.

        Nothing where the commit doesn't have it: it is kept elsewhere.
        """
        name = self.relative(path)
        if name is None:
            return []
        listed = _git(self.root, "ls-tree", "-r", "-z", self.commit, "--", name, why=f"{name} can't be looked up")
        known = {}
        for entry in filter(None, listed.split(b"\0")):
            about, _, file = entry.partition(b"\t")
            known[self.root / os.fsdecode(file)] = about.split(b" ")[2].decode("ascii")
        found = [file for file, digest in known.items() if not self._is_object(file, digest)]
        if known and path.is_dir():
            now = (self.root / name).rglob("*")
            found += [file for file in now if file.is_file() and file not in known]
        return sorted(found)

    def _is_object(self, path: Path, digest: str) -> bool:
        """Say whether a file has the content of one of git's objects, or of what that points to in git-lfs."""
        if not path.is_file():
            return False
        # git's own hash of a file; a repository may use SHA-256 instead.
        own = hashlib.new("sha1" if len(digest) == 40 else "sha256", b"blob %d\0" % path.stat().st_size)
        plain = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                own.update(block)
                plain.update(block)
        if own.hexdigest() == digest:
            return True
        size = _git(self.root, "cat-file", "-s", digest, why=f"{path.name} of {self.shown} can't be read")
        if int(size) > MOST_OF_POINTER:
            return False
        content = _git(self.root, "cat-file", "blob", digest, why=f"{path.name} of {self.shown} can't be read")
        return content.startswith(POINTER) and f"sha256:{plain.hexdigest()}".encode() in content

    def suites_below(self, folder: Path) -> Iterator[Path]:
        """Yield the suites that the commit has below a folder, as paths below it; not those in hidden folders."""
        for path in self._below(folder):
            if path.name.endswith((".qsa.yaml", ".qsa.yml")):
                yield path

    def baselines_below(self, folder: Path) -> Iterator[Path]:
        """Yield the JSON files below the folders of baselines that the commit has in a folder or below it."""
        for path in self._below(folder):
            if path.suffix == ".json" and BASELINES in path.parts:
                yield path

    def has_gates(self, folder: Path) -> bool:
        """Say whether the commit has a suite or a baseline below a folder."""
        return any(self.suites_below(folder)) or any(self.baselines_below(folder))

    def _below(self, folder: Path) -> Iterator[Path]:
        inside = self.relative(folder.resolve() / "x")
        prefix = (inside or "/").removesuffix("x")
        for name in sorted(self._objects):
            below = name.removeprefix(prefix)
            # A subject's name may begin with a dot.
            parts = below.partition(f"{BASELINES}/")[0].split("/")
            if name.startswith(prefix) and not any(part.startswith(".") for part in parts):
                yield folder / below


def tags_of(folder: Path) -> tuple[list[tuple[str, str]], bool]:
    """Return the tags that lead to the present commit, with their time in ISO, oldest first; and whether more are cut.

    `git clone --depth` leaves a shallow clone, which lacks earlier commits and their tags.

    Raises:
        InfraError: there is no git, or no repository.
    """
    why = "releases are read from git's tags"
    shallow = _git(folder, "rev-parse", "--is-shallow-repository", why=why).strip() == b"true"
    form = "%(creatordate:iso-strict)%00%(refname:short)"
    listed = _git(
        folder, "for-each-ref", "--merged", "HEAD", "--sort=creatordate", f"--format={form}", "refs/tags", why=why
    )
    tags = [line.split(b"\0") for line in listed.splitlines()]
    return [(os.fsdecode(name), when.decode("ascii")) for when, name in tags if when], shallow


def _git(folder: Path, *words: str, why: str) -> bytes:
    """Run git and return what it prints.

    Raises:
        InfraError: it fails; the text begins with `why`.
    """
    # A hook that runs us names its own repository in these; ours is that of the folder.
    environment = {key: value for key, value in os.environ.items() if key not in ("GIT_DIR", "GIT_INDEX_FILE")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            stdin=subprocess.DEVNULL, capture_output=True, check=True, env=environment | {"LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.CalledProcessError as error:
        said = one_line(error.stderr.decode("utf-8", "replace")) if error.stderr.strip() else ""
        raise InfraError(f"{why}{f' ({said})' if said else ''}") from None
    except OSError as error:
        raise InfraError(f"{why}, and git can't be run: {error.strerror}") from None
    return done.stdout
