"""What is refused, with its sentence: each is done here, and what is said of it stands in docs/reliability.md."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from pytest_qsa.captures import Capture, ModelProvenance, Provenance
from pytest_qsa.checkpoint import Files, Folder, open_folder, problems_of, readable_tokenizer
from pytest_qsa.common import QsaError, markdown_table
from pytest_qsa.metrics import Query, Series
from pytest_qsa.report import read_report
from pytest_qsa.suite import Model, check_reference, load_suite
from pytest_qsa.verdicts import BaselineFile

HOME = "/builds/team"
"""Stands for the temporary folder in which all of it is done."""
ASSERTION = "{id: a, metric: absmax, layers: mlp, site: output, max: 1}"
SUITE = "model: {{path: x{model}}}\ndata: {{{data}}}\nassertions:\n  - {assertion}\n"


def _whole(text: str) -> Callable[[], object]:
    def load() -> object:
        Path("gate.qsa.yaml").write_text(text, encoding="utf-8")
        return load_suite(Path("gate.qsa.yaml"))

    return load


def _suite(
    assertion: str = ASSERTION, *, model: str = "", data: str = "seed: 0", more: str = ""
) -> Callable[[], object]:
    return _whole(SUITE.format(model=model, data=data, assertion=assertion) + more)


def _bound(bound: str, metric: str = "absmax") -> Callable[[], object]:
    return _suite(f"{{id: a, metric: {metric}, layers: mlp, site: output, {bound}}}", model=", reference: y")


def _pattern(pattern: str) -> Callable[[], object]:
    return _suite(ASSERTION.replace("layers: mlp", f"layers: '{pattern}'"))


SUITES: dict[str, Callable[[], object]] = {
    "a file outside of the repository": _suite(data="source: 'custom:/etc/passwd'"),
    "a file in .git": _suite(data="source: 'custom:.git/config'"),
    "a base outside of it": _suite(more="extends: ../../etc/gate.yaml\n"),
    "a name that leads elsewhere": _suite(model=", name: ../../out"),
    "a value that is none": _suite(ASSERTION.replace("max: 1", "max: !!int abc")),
    "a day that is none": _suite(
        ASSERTION.replace("max: 1", "max: 1, waive: {layers: mlp, owner: me, reason: known, until: 2027-02-30}")
    ),
    "an unknown key": _suite(more="'[': 1\n"),
    "thousands of digits": _suite(ASSERTION.replace("max: 1", f"max: {'9' * 5000}")),
    "a seed below 0": _suite(data="seed: -1"),
    "a regex that repeats for ever": _pattern("(a{500}){500}"),
    "a count that C doesn't hold": _pattern("a{99999999999}"),
    "a recovery that nothing misses": _suite(
        "{id: a, metric: external, file: a.json, reference: b.json, score: acc, compare: recovery, min: 0}"
    ),
    "a static check that no problem fails": _suite("{id: a, metric: checkpoint_health, min: 0}"),
    "∞ as a bound": _bound("max: .inf"),
    "a bound outside of what a metric can be": _bound("max: 2", "cosine"),
    "a bound beyond the dtype": _suite(ASSERTION.replace("max: 1", "max: 70000"), model=", dtype: float16"),
    "a tolerance above 1,000 %": _bound("baseline: {rel: 11}"),
    "a bound by group without a bound": _bound("max: {default: null}"),
    "no assertion": _whole("model: {path: x}\nassertions: []\n"),
}


def _folder(config: str, header: dict[str, object] | None = None) -> Path:
    folder = Path("checkpoint")
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config, encoding="utf-8")
    content = save({"model.layers.0.mlp.weight": np.ones((2, 2), np.float32)})
    if header is not None:
        text = json.dumps(header).encode()
        content = len(text).to_bytes(8, "little") + text + bytes(16)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def _checked(config: str, header: dict[str, object] | None = None) -> Callable[[], object]:
    return lambda: problems_of(Files(open_folder(_folder(config, header))), "checkpoint_health")


def _weight(shape: list[int]) -> dict[str, object]:
    return {"a.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 16]}}


def _large(name: str) -> Callable[[], object]:
    def read() -> None:
        folder = _folder("{}")
        with (folder / name).open("wb") as file:
            file.truncate(300_000_000)
        try:
            open_folder(folder).check_files()
        finally:
            (folder / name).unlink()

    return read


def _many_tensors() -> None:
    _folder("{}")
    entry = '"a.%d": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = ("{" + ",".join(entry % index for index in range(300_000)) + "}").encode()
    Path("checkpoint/model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    open_folder("checkpoint").check_files()


def _endless_gguf() -> None:
    (_folder("{}") / "model.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 0))
    try:
        _ = open_folder("checkpoint", gguf_file="model.gguf").tensors
    finally:
        Path("checkpoint/model.gguf").unlink()


def _endless_tokenizer() -> None:
    ten = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    steps = {"type": "Sequence", "normalizers": [ten] * 8}
    Path("tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [], "normalizer": steps}))
    readable_tokenizer(Folder(Path()))


CHECKPOINTS: dict[str, Callable[[], object]] = {
    "a configuration that is nested deeply": _checked("[" * 1000 + "]" * 1000),
    "a negative shape": _checked("{}", _weight([-2, -2])),
    "a shape beyond the file": _checked("{}", _weight([200, 2])),
    "a header of more tensors than any file has": _many_tensors,
    "a GGUF file whose counts lead behind its end": _endless_gguf,
    "a tokenizer that makes texts endless": _endless_tokenizer,
    "a format that nobody knows": _checked('{"quantization_config": {"quant_method": "compresed-tensors"}}'),
    "a template of 300 MB": _large("chat_template.jinja"),
}


def _file(name: str, content: bytes, read: Callable[[Path], object]) -> Callable[[], object]:
    def run() -> object:
        Path(name).write_bytes(content)
        return read(Path(name))

    return run


def _damaged_capture() -> object:
    content = bytearray(Capture({}, modules=("a",)).to_bytes())
    content[content.index(b'"a') + 1] = ord("b")
    return _file("old.qsa", bytes(content), Capture.load)()


def _sparse_capture() -> object:
    with Path("large.qsa").open("wb") as file:
        file.truncate(200 << 30)
    try:
        return Capture.load("large.qsa")
    finally:
        Path("large.qsa").unlink()


FILES: dict[str, Callable[[], object]] = {
    "a capture with a changed byte": _damaged_capture,
    "a capture of 200 GB": _sparse_capture,
    "a report that was edited": _file(
        "report.json", b'{"schema": "qsa-report/1", "checksum": "sha256:0", "results": []}', read_report
    ),
    "a baseline with the marks of a merge": _file(
        "a.json", b"<<<<<<< HEAD\n", lambda file: BaselineFile.parse(file.read_text(encoding="utf-8"))
    ),
}


def _copy() -> None:
    own = ModelProvenance("checkpoints/int8", weights="sha256:0", dtype="bfloat16")
    reference = Capture({}, provenance=Provenance(own))
    capture = Capture({}, provenance=Provenance(own), reference=reference)
    check_reference(capture, Model(path="x"), lambda: Files(open_folder(_folder("{}"))))


def _zeros() -> None:
    query = Query("absmax", "absmax/1", "output", "mlp")
    nothing = "the output of model.layers.0.mlp and 29 other layers holds nothing but zeros"
    Series(["model.layers.0.mlp"], np.zeros(1), query, nothing=nothing).check()


NUMBERS: dict[str, Callable[[], object]] = {
    "a reference that is the model itself, or a copy": _copy,
    "a model of zeros": _zeros,
}


def _said(refused: Callable[[], object]) -> str:
    """Return the line that a refusal is, with its kind first.

    Raises:
        ValueError: it isn't refused.
    """
    try:
        refused()
    except QsaError as error:
        text = str(error).replace(os.getcwd(), HOME)
        return text if len(text) <= 240 else f"{text[:240]}…"
    raise ValueError("what the page says is refused was taken")


def refusals() -> Iterator[str]:
    """Yield the lines of the table, each refusal done anew in a temporary repository."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        os.chdir(folder)
        try:
            Path(".git").mkdir()
            rows = [(what, _said(refused)) for what, refused in (SUITES | CHECKPOINTS | FILES | NUMBERS).items()]
        finally:
            os.chdir(here)
    yield from markdown_table([("what", "what is said of it"), *rows], plain={0})
