"""All that could change a number of a capture, in one hash. Imports neither torch nor a tokenizer.

A weight file is hashed by content once and then remembered by size, times and inode, so that an unchanged checkpoint
of any size costs a few `stat` calls.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from ..captures import Capture
from ..checkpoint import ADAPTER, format_of, libraries_of_formats
from ..common import (
    InfraError,
    QsaError,
    checked_json,
    json_with_checksum,
    logger,
    phase,
    read_json,
    refuse_sparse,
    refuse_special,
    write_atomically,
)
from .records import named_media
from .sections import PROMPTS, Data
from .subjects import NamedSubject, Subject, cached_snapshot, hub_set_of, local_path, own_folder
from .texts import SHIPPED, prompts
from .vllm import environment_of

LIBRARIES = (
    "pytest-qsa",
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "numba",
    "datasets",
)
"""The packages that can change a number, whatever the format of the checkpoint."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
SMALL = 1 << 20
"""Smaller files are hashed every time: reading them costs as little as looking their hash up."""
PART = 8 << 20
"""Bytes that are hashed at a time."""
MOST_HASHED = 2 << 30
"""Bytes of weights that are hashed only to look for a kept capture: in about the time that importing torch takes."""
WEIGHT_FILES = ("*.safetensors", "*.gguf", "*.bin")


AUTO_MAP = "auto_map"
NAMES_CODE = (AUTO_MAP, "attn_implementation", "_attn_implementation")
"""Keys of a configuration that name code outside of the checkpoint."""


@dataclass
class FileHashes:
    """SHA-256 by content, remembered in a JSON file by size, mtime, ctime and inode."""

    memory: Path | None
    _known: dict[str, Any] = field(default_factory=dict)
    _read: bool = False
    _begun: dict[Path, Future[tuple[list[int], str]]] = field(default_factory=dict)

    def begin(self, files: Sequence[Path]) -> None:
        """Hash files on threads of their own, while this one loads a model; `of` waits for them.

        More than `MOST_HASHED` bytes are left to `of`, or a run that stops early would wait for the threads.
        """
        files = [file for file in files if file not in self._begun]
        if sum(file.stat().st_size for file in files) > MOST_HASHED:
            return
        pool = ThreadPoolExecutor(2, "qsa-hashes")  # a checkpoint and its reference
        self._begun |= {file: pool.submit(_stamp_and_digest, file) for file in files}
        pool.shutdown(wait=False)

    def of(self, file: Path) -> str:
        """Return the hash of a file's content.

        Raises:
            AnomalyError: the file is all but holes, which would take hours to read.
            InfraError: it is no regular file.
        """
        refuse_special(file)
        refuse_sparse(file)
        size = file.stat().st_size
        if size <= SMALL:
            return _stamp_and_digest(file)[1]
        if (known := self._known_hash(file)) is not None:
            return known
        began = time.perf_counter()
        phase(f"hashing {file.name} ({size / 1e6:,.0f} MB)")
        begun = self._begun.pop(file, None)
        stamp, digest = begun.result() if begun is not None else _stamp_and_digest(file)
        if stamp != _stamp(file.stat()):  # it has changed since it was begun
            stamp, digest = _stamp_and_digest(file)
        logger.debug("hashed %s, %d bytes, in %.2f s", file, size, time.perf_counter() - began)
        self._known[str(file.resolve())] = [stamp, digest]
        self._remember()
        return digest

    def remembers(self, file: Path) -> bool:
        """Say whether the hash of a file is known without reading it."""
        return self._known_hash(file) is not None

    def has_read(self, file: Path) -> bool:
        """Say whether a file of this path was hashed before, if it is not the same now."""
        self._recall()
        return str(file.resolve()) in self._known

    def _known_hash(self, file: Path) -> str | None:
        self._recall()
        stamp, digest = self._known.get(str(file.resolve()), (None, None))
        return digest if stamp == _stamp(file.stat()) else None

    def _recall(self) -> None:
        if self._read or self.memory is None:
            return
        self._read = True
        # There is no such file yet, it is damaged, or it is of an earlier version: all is hashed again.
        with suppress(OSError, InfraError):
            # What this process has hashed itself is newer than the file, so it wins.
            self._known = checked_json(self.memory.read_bytes()) | self._known

    def _remember(self) -> None:
        if self.memory is None:
            return
        # Else the checkpoints that are gone would stay in it for ever.
        kept = {path: entry for path, entry in self._known.items() if Path(path).exists()}
        try:
            write_atomically(self.memory, json_with_checksum(kept))
        except OSError:
            self.memory = None  # a read-only cache: hashed again the next time


def _stamp_and_digest(file: Path) -> tuple[list[int], str]:
    """Return what tells whether a file has changed, and the SHA-256 of its content."""
    # Before the file is read: if it changes meanwhile, the stamp no longer fits, and it is hashed again.
    stamp, digest = _stamp(file.stat()), hashlib.sha256()
    # Each part waits for the interpreter's lock, up to 5 ms while another thread imports: the parts are large.
    buffer = memoryview(bytearray(min(PART, max(stamp[0], 1))))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
    return stamp, digest.hexdigest()


def _stamp(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def fingerprint_of(subject: Subject, hashes: FileHashes, *, with_reference: bool = False) -> str | None:
    """Return the hash of a subject, and of its reference where the two are compared, or the data are its answers.

    None where no hash can cover it: a factory, a fixture, files that aren't here.
    """
    folder = subject.local_folder
    if folder is None or subject.base_folder is None or not _is_checkpoint(folder):
        logger.debug("%s: no fingerprint, for no files of the model are here", subject.name)
        return None
    hub_set = hub_set_of(subject.data)
    if hub_set is not None and not hub_set.copies:
        logger.debug("%s: no fingerprint, for the hub's data isn't in the cache", subject.name)
        return None
    digest = hashlib.sha256()
    compared = with_reference or subject.is_answered_by_reference
    code, reference = _remote_code(subject), _reference_files(subject) if compared else []
    if code is None or reference is None:
        what = "code from the hub" if code is None else "files of the reference"
        logger.debug("%s: no fingerprint, for not all %s are here", subject.name, what)
        return None
    named = ([[name, hashes.of(file)] for name, file in files] for files in (reference, code))
    for part in (*_parts(subject.named, hashes), *named):
        digest.update(json.dumps(part, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def unhashed(subject: Subject, hashes: FileHashes, *, with_reference: bool) -> list[Path]:
    """Return the files of weights, of more than `SMALL` bytes, that a fingerprint has to read.

    Raises:
        QsaError: as `folders_of`.
    """
    folders = folders_of(subject)
    if with_reference and isinstance(subject.reference, Subject):  # a kept comparison is of the reference's bytes too
        folders += folders_of(subject.reference)
    files = (file for folder in folders for file in weight_files(folder))
    return [file for file in files if file.is_file() and file.stat().st_size > SMALL and not hashes.remembers(file)]


def takes_long_to_hash(subject: Subject, hashes: FileHashes, *, with_reference: bool) -> bool:
    """Say whether it takes longer to look for a kept capture than to make the outline of the model.

    It does of a new path. At a known one, as where a CI job restores the cache, a capture may be kept: then only if the
    files are large.
    """
    files = unhashed(subject, hashes, with_reference=with_reference)
    return not all(map(hashes.has_read, files)) or sum(file.stat().st_size for file in files) > MOST_HASHED


def identified(capture: Capture, subject: Subject, hashes: FileHashes) -> Capture:
    """Say in a capture's provenance which checkpoint it is of: its path, its format, the SHA-256 of its weights."""
    weights = _weights_hash(folders_of(subject), hashes)
    model = replace(capture.provenance.model, path=subject.path, base=subject.base_path)
    model = replace(model, weights=weights, format=_format_of(subject))
    if capture.reference is not None and isinstance(subject.reference, Subject):
        reference = identified(capture.reference, subject.reference, hashes)
        capture = replace(capture, reference=reference)
    return replace(capture, provenance=replace(capture.provenance, model=model))


def _format_of(subject: Subject) -> str | None:
    """Return the quantization that a subject's files declare; None for floats, and where there are no files to ask."""
    try:
        form = format_of(own_folder(subject))
    except QsaError:
        return None
    return form.label if form.name != "none" else None


def folders_of(subject: Subject) -> list[Path]:
    """Return the folders of a subject's model that are here: its own, and of an adapter that of its base.

    Raises:
        AnomalyError: an adapter's configuration can't be read.
        InfraError: the hub's cache can't be read, or an adapter's base isn't known.
    """
    return list(dict.fromkeys(folder for folder in (subject.local_folder, subject.base_folder) if folder is not None))


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that hold weights."""
    return sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))


def _reference_files(subject: Subject) -> list[tuple[str, Path]] | None:
    """Return the files of the reference under their names; None where they aren't here."""
    reference = subject.reference
    if isinstance(reference, Path):
        return [("reference", reference)] if reference.is_file() else None
    if reference is None or reference.base_folder is None or (code := _remote_code(reference)) is None:
        return None
    folders = folders_of(reference)
    return (
        [file for each in folders for file in _named_files(each)] + code if all(map(_is_checkpoint, folders)) else None
    )


def _remote_code(subject: Subject) -> list[tuple[str, Path]] | None:
    """Return the Python files that a model imports from elsewhere than its own folders; None where no hash covers them.

    transformers imports `OTHER--module.Class` of an `auto_map` from another folder or repository, with what that
    imports there. An attention `org/name` is a kernel that is fetched from the hub.
    """
    if subject.model is None or "/" in (subject.model.attn_implementation or ""):
        return None
    named = {pair for folder in folders_of(subject) for pair in _code_named(folder)}
    if any(key != AUTO_MAP and "/" in text for key, text in named):
        return None
    others = {text.partition("--")[0] for key, text in named if key == AUTO_MAP and "--" in text}
    files: list[tuple[str, Path]] = []
    for other in sorted(others) if subject.model.trust_remote_code else ():
        folder = Path(other) if Path(other).is_dir() else cached_snapshot(other, None)
        if folder is None:
            return None
        files += [(f"{other}/{file.relative_to(folder)}", file) for file in sorted(folder.rglob("*.py"))]
    return files


def _code_named(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield each text at a key of `NAMES_CODE` in the configurations of a folder, at any depth, with that key."""
    for file in folder.glob("*config.json"):
        with suppress(QsaError):  # the load says what is wrong with it
            yield from _texts_at(read_json(file, "the checkpoint"), "")


def _texts_at(value: object, at: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str) and at:
        yield at, value
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from _texts_at(item, key if key in NAMES_CODE else at)
    for item in value if isinstance(value, list) else ():
        yield from _texts_at(item, at)


def _is_checkpoint(folder: Path) -> bool:
    """Say whether a folder is worth hashing whole: a suite may name any, such as /."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER)) or bool(weight_files(folder))


def _named_files(folder: Path) -> list[tuple[str, Path]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and ".git" not in path.parts)
    # Names relative to the folder: a checkpoint that was moved keeps its fingerprint.
    return [(str(file.relative_to(folder)), file) for file in files]


def _weights_hash(folders: Sequence[Path], hashes: FileHashes) -> str | None:
    return weights_hash([[(file.name, hashes.of(file)) for file in weight_files(folder)] for folder in folders])


def weights_hash(folders: Sequence[Iterable[tuple[str, str]]]) -> str | None:
    """Return the SHA-256 over the names and hashes of the weight files of folders; None where they have none.

    `folders`: the files of each by name with their hashes, in the order of `weight_files`.
    """
    files = [file for folder in folders for file in folder]
    digest = hashlib.sha256()
    for name, content in files:
        # No file name holds a NUL, so that a name can't run into the hash behind it.
        digest.update(name.encode() + b"\0" + bytes.fromhex(content))
    return f"sha256:{digest.hexdigest()}" if files else None


def weight_order(files: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return those of the files of a folder that hold weights, name and hash, in the order of `weight_files`."""
    return sorted(file for file in files.items() if "/" not in file[0] and any(map(Path(file[0]).match, WEIGHT_FILES)))


def checkpoint_hashes(folder: Path, hashes: FileHashes) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint by its name; hidden ones and Python's caches are no part of it.

    Raises:
        InfraError: a file is no regular one.
        OSError: a file can't be read.
    """
    files = ((name, file) for name, file in _named_files(folder) if not any(map(_is_aside, Path(name).parts)))
    return {Path(name).as_posix(): hashes.of(file) for name, file in files}


def _is_aside(part: str) -> bool:
    return part.startswith(".") or part == "__pycache__"


def _parts(subject: NamedSubject, hashes: FileHashes) -> Iterator[Any]:
    yield "qsa-fingerprint/7"
    yield subject.model.measured
    yield "files" if subject.files_only else "pass"
    # A key that isn't given leaves the captures of earlier versions, which didn't know it, as they are.
    yield subject.data.model_dump(exclude={"stride"} if subject.data.stride is None else None)
    yield subject.memory.model_dump()
    for folder in folders_of(subject):
        for name, file in _named_files(folder):
            yield [name, hashes.of(file)]
    yield from _data_parts(subject.data, subject.folder, hashes)
    if subject.generation is not None:
        yield subject.generation.model_dump()
        yield from _data_parts(subject.generation.as_data(subject.data), subject.folder, hashes)
    formats = libraries_of_formats(own_folder(subject))
    yield library_versions(formats)
    if program := subject.vllm_program:
        yield [dict(environment_of(program.python)), dict(program.arguments)]
    yield machine()


def _data_parts(data: Data, folder: Path, hashes: FileHashes) -> Iterator[Any]:
    if data.source in SHIPPED or data.source == PROMPTS:
        text = SHIPPED[data.source]() if data.source in SHIPPED else json.dumps([asdict(each) for each in prompts()])
        yield hashlib.sha256(text.encode()).hexdigest()
    else:
        for file in _data_files(data, folder):
            yield [file.name, hashes.of(file)] if file.is_file() else "missing"


def _data_files(data: Data, folder: Path) -> list[Path]:
    """Return the files of a subject's own data, or of the hub's copies in the cache."""
    own, hub_set = local_path(data, folder), hub_set_of(data)
    if own is None:
        return hub_set.copies if hub_set else []
    if own.is_dir():
        return sorted(path for path in own.rglob("*") if path.is_file())
    return [own, *(named_media(own, data) if own.is_file() else ())]


def library_versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Return the versions of the packages that can change a number, and of `more`; `absent` of one that isn't here."""
    return {name: _version(name) for name in (*LIBRARIES, *more)}


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "absent"


def machine() -> Mapping[str, Any]:
    """Describe what computes: the same bits can be expected from the same processor, threads and accelerators only."""
    processor = platform.processor()
    # On Linux `platform.processor()` is empty or names the architecture only.
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        processor = next((line for line in lines if line.startswith("model name")), processor)
    # From the driver's own files, because asking torch would import it.
    gpus = [file.read_text(errors="replace") for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))]
    return {
        "system": platform.system(), "machine": platform.machine(), "processor": processor, "cores": os.cpu_count(),
        "gpus": [line for text in gpus for line in text.splitlines() if line.startswith("Model")],
        "environment": {name: os.environ.get(name) for name in THREADS},
    }  # fmt: skip
