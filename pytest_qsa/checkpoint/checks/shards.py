"""Which bytes count: a tensor in several files, files that no index names, and shards that aren't there."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ...common import counted
from ..folder import INDEX, Finding, Folder
from ..tensors import Tensor, layer_of

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")
SINGLE = "model.safetensors"
_SAVE = "save or copy the checkpoint again"
_ANEW = "write the index anew"
_WINS = "transformers and MLX take the copy of the file that they read last, others the one that the index names"


def ambiguous_files(folder: Folder) -> Iterator[Finding]:
    """Yield what makes loaders read different bytes, and what none of them reads."""
    if folder.gguf_file:
        return
    yield from _leftover(folder)
    yield from _twice(folder)
    yield from _not_indexed(folder)
    yield from _lacking(folder)
    if fault := unread_index(folder):  # other loaders need no section of metadata
        yield Finding(INDEX, INDEX, INDEX, fault, _ANEW, note=bool(folder.indexed))
    elif not folder.indexed and any(SHARD.fullmatch(file.name) for file in folder.files):
        what = "there is none, and the tensors lie in shards: transformers finds no weights"
        yield Finding(INDEX, INDEX, "", what, _SAVE)


def unread_index(folder: Folder) -> str:
    """Say what an index lacks, without which transformers reads no shard; empty where it reads one file alone."""
    index = None if folder.gguf_file or (folder.path / SINGLE).is_file() else folder.json(INDEX)
    if index is None:
        return ""
    if not index.get("weight_map"):
        return "weight_map names no tensor: transformers finds no weights"
    return "" if isinstance(index.get("metadata"), dict) else "there is no section metadata: transformers stops on it"


def absent_shards(folder: Folder) -> Iterator[Finding]:
    """Yield each file that the index or the names of other shards promise, once, however many tensors it holds."""
    if folder.gguf_file:
        return
    promised: dict[str, list[str]] = {}
    for name, file in folder.indexed.items():
        promised.setdefault(file, []).append(name)
    # An old shard, of another number of shards than the index has, is a leftover.
    stated = {shard.group("stem", "count") for file in promised if (shard := SHARD.fullmatch(file))}
    for file in (file.name for file in folder.files):
        if (shard := SHARD.fullmatch(file)) and (not stated or shard.group("stem", "count") in stated):
            for number in range(1, int(shard["count"]) + 1):
                promised.setdefault(f"{shard['stem']}-{number:05}-of-{shard['count']}.safetensors", [])
    for file, names in sorted(promised.items()):
        if not (folder.path / file).is_file():
            shard, held = SHARD.fullmatch(file), f" ({counted(len(names), 'tensor')})" if names else ""
            which = f"shard {int(shard['number'])} of {int(shard['count'])}" if shard else "the file"
            yield Finding(file, file, INDEX if names else "", f"{which} is not there{held}", _SAVE)


def _leftover(folder: Folder) -> Iterator[Finding]:
    """Yield a single file beside the shards of an index, which is read in their place by transformers."""
    if not _is_leftover(folder):
        return
    single = {copy.name: copy for copies in folder.copies.values() for copy in copies if copy.file == SINGLE}
    differ = [name for name, own in single.items() if name in folder.tensors and not own.repeats(folder.tensors[name])]
    lacking = folder.indexed.keys() - single.keys()
    reads = f"beside the shards of {INDEX}: transformers reads this file, vLLM and SGLang the shards"
    if differ or lacking:
        first = f", as {differ[0]}" if differ else ""
        what = f"{reads}; {len(differ)} of {len(single)} tensors differ{first}, {len(lacking)} are lacking in it"
        yield Finding(SINGLE, SINGLE, SINGLE, what, "remove the one that is not meant")
    else:
        yield Finding(SINGLE, SINGLE, SINGLE, f"{reads}; they hold the same", "remove one of the two", note=True)


def _is_leftover(folder: Folder) -> bool:
    return bool(folder.indexed) and SINGLE not in folder.indexed.values() and (folder.path / SINGLE).is_file()


def _twice(folder: Folder) -> Iterator[Finding]:
    apart = _is_leftover(folder)
    for name, copies in folder.copies.items():
        others = [copy for copy in copies if not (apart and copy.file == SINGLE)]
        if len(others) < 2:
            continue
        files = " and ".join(copy.file for copy in others)
        index = f", the index names {folder.indexed[name]}" if name in folder.indexed else ""
        if all(others[0].repeats(other) for other in others[1:]):
            yield Finding.at(others[0], f"in {files}, with the same bytes", "remove one copy", note=True)
        else:
            yield Finding.at(others[0], f"in {files}, with other bytes{index}; {_WINS}", "remove the stale copy")


def _not_indexed(folder: Folder) -> Iterator[Finding]:
    """Yield tensors that the index lacks: a whole file once, single ones of an indexed file each."""
    if not folder.indexed:
        return
    by_file: dict[str, list[Tensor]] = {}
    named = set(folder.indexed.values())
    for name, tensor in folder.tensors.items():
        if name not in folder.indexed and (tensor.file != SINGLE or SINGLE in named):
            by_file.setdefault(tensor.file, []).append(tensor)
    for file, tensors in by_file.items():
        if file in named:
            advice = "a loader may drop it: write the index anew"
            yield from (Finding.at(tensor, f"not in {INDEX}", advice) for tensor in tensors)
        else:
            what = f"{INDEX} does not name this file ({counted(len(tensors), 'tensor')}, as {tensors[0].name})"
            yield Finding(file, file, file, f"{what}: loaders leave it out", "write the index anew, or remove the file")


def _lacking(folder: Folder) -> Iterator[Finding]:
    """Yield tensors that the index promises in a file which is there and lacks them, though another one may have them.

    `tensors` holds of several copies that of the file which the index names.
    """
    for name, file in folder.indexed.items():
        other = folder.tensors.get(name)
        if not (folder.path / file).is_file() or (other is not None and other.file == file):
            continue
        what = f"the index says {file}, which lacks it"
        advice = "a loader fills it with random numbers: save or copy the checkpoint again"
        if other is not None:
            what, advice = f"{what}; {other.file} has it: loaders that go by the index don't find it", _ANEW
        yield Finding(layer_of(name), name, INDEX, what, advice)
