"""Checkpoints that were damaged by a seed: none ends in a traceback, hangs, runs code or takes memory."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import traceback
import warnings
from pathlib import Path

import pytest

from support.mutations import damaged_bytes, damaged_text, damaged_tree, draws, nested
from support.processes import forking

SECONDS = 30
MEMORY_KB = 3 << 19
"""Of the process: some 400 MB that it has imported, a small model, and 1 GB more."""
CHUNK = 10
SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "quantization_config")


class Canary:
    """What a pickle runs when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def damage(rng, source, folder):
    """Copy a checkpoint and damage one of its files; beside it lies code that nothing may run. Return what was done."""
    shutil.copytree(source, folder)
    canary = folder.parent / "canary"
    (folder / "modeling.py").write_text(f"open({str(canary)!r}, 'w').close()\n")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    way = rng.choice((_settings, _settings, _header, _header, _bytes, _text, _deep, _gone, _special, _code))
    return f"{way.__name__}: {way(rng, folder)}"


def _json(rng, folder, change):
    file = rng.choice([folder / name for name in SETTINGS if (folder / name).exists()])
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    return file.name


def _settings(rng, folder):
    return _json(rng, folder, lambda tree: damaged_tree(rng, tree))


def _code(rng, folder):
    """Name code of its own, as remote code does."""
    names = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "modeling.Model")
    odd = rng.choice(({}, {"model_type": "own"}, {"attn_implementation": "org/kernel"}, {"architectures": ["Own"]}))
    return _json(rng, folder, lambda tree: {**tree, "auto_map": names, **odd})


def _deep(rng, folder):
    return _json(
        rng, folder, lambda tree: {**tree, rng.choice(list(tree)): nested(rng.choice((90, 900)), 1, rng.random() < 0.5)}
    )


def _weights(rng, folder):
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _header(rng, folder):
    file = _weights(rng, folder)
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    head = json.dumps(damaged_tree(rng, json.loads(content[8 : 8 + size]))).encode()
    file.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + size :])
    return file.name


def _bytes(rng, folder):
    file = _weights(rng, folder)
    file.write_bytes(damaged_bytes(rng, file.read_bytes()))
    return file.name


def _text(rng, folder):
    file = rng.choice([folder / name for name in SETTINGS if (folder / name).exists()])
    file.write_text(damaged_text(rng, file.read_text()), errors="surrogatepass")
    return file.name


def _gone(rng, folder):
    file = rng.choice([each for each in folder.iterdir() if each.suffix in (".json", ".safetensors")])
    file.unlink()
    return file.name


def _special(rng, folder):
    """Put something that is no plain file in a file's place."""
    file = rng.choice([each for each in folder.iterdir() if each.suffix in (".json", ".safetensors")])
    file.unlink()
    way = rng.randrange(5)
    if way == 0:
        os.mkfifo(file)
    elif way == 1:
        file.symlink_to("/dev/zero")
    elif way == 2:
        file.symlink_to(file)
    elif way == 3:
        file.mkdir()
    else:
        file.touch()
    return f"{file.name} {way}"


def examine(folders, original, log):
    """Run the static checks of checkpoints, then a pass of each against the original, in this process.

    The log gets what is wrong, by folder; the folder that it looks at stands there before.
    """
    found = {}
    for folder in folders:
        log.write_text(json.dumps({**found, str(folder): ["it ended the process, or took too long"]}), encoding="utf-8")
        found[str(folder)] = problems_with(folder, original)
    log.write_text(json.dumps(found), encoding="utf-8")


def problems_with(folder, original):
    from pytest_qsa.checkpoint import CHECKS, Files, open_folder, problems_of
    from pytest_qsa.common import QsaError
    from support.reference_runs import captured, subject_of

    wrong = []

    def tried(what, function):
        try:
            function()
        except QsaError as error:
            wrong.extend([f"{what}: {error}"] if "\n" in str(error) else [])
        except BaseException:
            wrong.append(f"{what}: {traceback.format_exc()[-1500:]}")

    warnings.simplefilter("ignore")  # other libraries warn of what they find
    for metric in CHECKS:
        tried(metric, lambda metric=metric: problems_of(Files(open_folder(folder), open_folder(original)), metric))
    tried("pass", lambda: captured(subject_of(folder, original), "blocks", "weights", "predictions"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return [*wrong, f"the process has {peak >> 10} MB"] if peak > MEMORY_KB else wrong


@pytest.mark.process
def test_a_damaged_checkpoint_gets_verdicts_and_runs_nothing(llama, int8_llama, tmp_path):
    wrong, log = [], tmp_path / "log.json"
    drawn = list(draws("checkpoints", 2, 100))
    for first in range(0, len(drawn), CHUNK):
        done = {}
        for number, rng in drawn[first : first + CHUNK]:
            folder = tmp_path / f"c{number}" / "checkpoint"
            done[folder] = damage(rng, rng.choice((llama, int8_llama)), folder)
        process = forking().Process(target=examine, args=(list(done), llama, log))
        process.start()
        process.join(SECONDS * len(done))
        process.kill()
        found = json.loads(log.read_text(encoding="utf-8"))
        for folder, what in done.items():
            wrong += [(folder.parent.name, what, each) for each in found.get(str(folder), ["it was not looked at"])]
            wrong += [(folder.parent.name, what, "it ran code")] if (folder.parent / "canary").exists() else []
            shutil.rmtree(folder.parent)
    assert wrong == []
