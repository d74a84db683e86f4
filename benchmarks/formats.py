"""Formats by damages: each is read as its library reads it, its healthy checkpoint is green, its damages are found.

Each format of `format_makers.py` is made of a small random model, by its library in an environment of its own. Then
`checkpoint_health`, and `weight_sqnr` against the original from the files alone, look at it as it is and with each
damage of `DAMAGES`. What is made is kept in a cache folder, so that a later start goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from format_makers import RECIPES, SOURCES, Recipe
from platformdirs import user_cache_path
from safetensors import safe_open
from safetensors.torch import save_file

from pytest_qsa.captures import ERROR, Request
from pytest_qsa.checkpoint import Files, capture_weights, encoded, open_folder, problems_of
from pytest_qsa.common import QsaError
from pytest_qsa.tools.selftest.faults import FAULTS
from pytest_qsa.tools.selftest.mutant import Mutant

DAMAGES = {
    "scale × 4": ("scale_layer", 4.0),
    "NaN scale": ("nan_scale", 1.0),
    "constant": ("weights_constant", 1.0),
    "zero point + 1": ("zero_point_shifted", 1.0),
    "rows rolled": ("rows_permuted", 1.0),
    "two rows": ("rows_permuted", 0.0),
}
"""The columns of the table → the fault of `qsa selftest`, and its strength."""
Kind = Literal["tensor", "channel"]
ROOM = 1.0
"""The decibels by which a layer's SQNR may be below that of the healthy checkpoint: a suite's baseline."""
WEIGHTS = r"(_proj|\.experts\.\d+\.\w+)$"
LEGEND = (
    "S: found by checkpoint_health in the files alone; W: by weight_sqnr against the original, C: by its `by: channel` "
    "alone, from the files; –: the format has no such part; missed; wrong: another layer is named"
)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's files, and the original that it was made of."""

    folder: Path
    original: Path

    @cached_property
    def files(self) -> Files:
        """The files as the checks read them."""
        gguf = next((file.name for file in self.folder.glob("*.gguf")), None)
        return Files(open_folder(self.folder, gguf_file=gguf), open_folder(self.original))

    def findings(self) -> set[tuple[str, str]]:
        """Return the layers of which `checkpoint_health` says something, and what."""
        # a GGUF file keeps settings of its own; the table is about the weights
        own = Files(self.files.folder) if self.files.folder.gguf_file else self.files
        found = problems_of(own, "checkpoint_health")[1]
        return {(each.layer, f"{each.tensor}: {each.what}") for each in found if not each.note}

    def sqnr(self, by: Kind) -> Mapping[str, float]:
        """Return the SQNR of each quantized layer in dB, of the tensor or of its worst channel."""
        modules = list(Files(open_folder(self.original)).folder.layers) if self.files.folder.gguf_file else ()
        capture = capture_weights(self.files, [Request(WEIGHTS, "weight", None, frozenset({ERROR}))], modules=modules)
        if capture.refused:
            layer, why = next(iter(capture.refused.items()))
            raise QsaError(f"{layer}: {why}")
        series = capture.select(WEIGHTS, "weight").weight_sqnr(by=by)
        return dict(zip(series.layers, series.values.tolist(), strict=True))


def environment(recipe: Recipe, cache: Path) -> Path:
    """Return the Python that has what a recipe needs: this one, or one in an environment above it."""
    if not recipe.needs:
        return Path(sys.executable)
    home = cache / "environments" / "+".join(recipe.needs)
    python, done = home / "bin" / "python", home / "done"
    if not done.exists():
        venv.create(home, with_pip=True, clear=True)
        own = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
        # what this environment has need not be installed twice, and what the library pins comes first
        (own / "zz_parent.pth").write_text(sysconfig.get_path("purelib"))
        subprocess.run([python, "-m", "pip", "install", "--quiet", *recipe.needs], check=True)
        done.touch()
    return python


def made(recipe: Recipe, cache: Path, small: bool) -> Checkpoint:
    """Make a checkpoint and its original, unless the cache has them.

    Raises:
        QsaError: it can't be made here, with the last line of what the library says.
    """
    original = cache / f"{'small' if small else 'original'}-{recipe.source}"
    if not original.exists():
        SOURCES[recipe.source](original, small)
    if small and recipe.name.startswith("gguf"):  # whose file can't be cut down afterwards
        whole, original = original, cache / "small-gguf"
        shutil.copytree(whole, original, dirs_exist_ok=True)
        keep(whole / "model.safetensors", original / "model.safetensors")
    folder = cache / ("small" if small else "made") / recipe.name.replace(" ", "_")
    log = folder.with_suffix(".log")
    if not (folder / "config.json").exists() and not any(folder.glob("*.gguf")) and not log.exists():
        with tempfile.TemporaryDirectory(dir=cache) as work:
            call = [
                environment(recipe, cache),
                Path(__file__).parent / "format_makers.py",
                recipe.name,
                original,
                "made",
            ]
            settings = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*map(str, call)], cwd=work, env=settings, capture_output=True, text=True, check=False
            )
            folder.parent.mkdir(exist_ok=True)
            if done.returncode == 0:
                shutil.rmtree(folder, ignore_errors=True)
                Path(work, "made").rename(folder)
            else:
                log.write_text(done.stdout + done.stderr)
    if log.exists():
        raise QsaError(f"not made: {log.read_text().strip().splitlines()[-1]}")
    return Checkpoint(folder, original)


def agreement(checkpoint: Checkpoint) -> str:
    """Say whether the rows are those that the library dequantizes, in its dtype; a dash where it has no reader here.

    A library that multiplies three numbers in float32 rounds twice; the rows, which are float64, are rounded once.
    """
    stored = checkpoint.folder / "dequantized"
    if not stored.exists():
        return "–"
    form, apart, far = checkpoint.files.format, 0, 0
    for name, expected in open_folder(stored).tensors.items():
        layer = name.removesuffix(".weight")
        rows = form.rows(form.layers_of([layer, *open_folder(checkpoint.original).layers])[layer])
        assert rows is not None
        rounded = rows.astype(np.float32).astype(np.float64).reshape(expected.shape)
        apart += int(np.count_nonzero(encoded(rounded, expected.dtype) != expected.raw()))
        far += int(np.count_nonzero(np.abs(rounded - expected.values()) > 2.0**-23 * np.abs(rounded)))
    return "equal" if not apart else f"{far} differ" if far else "one rounding"


def cell(
    healthy: Checkpoint, before: set[tuple[str, str]], sqnr: Mapping[str, Mapping[str, float]], damage: str
) -> str:
    """Return what finds a damage of a checkpoint's down projection in block 3."""
    fault, strength = DAMAGES[damage]
    folder = healthy.files.folder
    layer = next(filter(_is_damaged, FAULTS[fault].targets(folder)), None)
    if layer is None:
        return "–"
    names = healthy.files.format.layers_of(list(open_folder(healthy.original).layers))
    own = {layer, *(module for module, stored in names.items() if stored == layer)}

    def all_own(named: set[str]) -> bool:
        # the experts of a layer that lies packed in the files are sites of their own
        return all(name in own or re.sub(r"(?<=experts)\.\d+", "", name) in own for name in named)

    mutant = Mutant(folder)
    FAULTS[fault].inject(mutant, layer, strength)
    with tempfile.TemporaryDirectory() as work:
        damaged = Checkpoint(mutant.save(Path(work) / "damaged"), healthy.original)
        found = {layer for layer, _ in damaged.findings() - before}
        if found:
            return "S" if all_own(found) else "wrong"
        kinds: tuple[tuple[str, Kind], ...] = (("W", "tensor"), ("C", "channel"))
        for letter, by in kinds:
            lower = {layer for layer, value in damaged.sqnr(by).items() if not value >= sqnr[by][layer] - ROOM}
            if lower:
                return letter if all_own(lower) else "wrong"
    return "missed"


def _is_damaged(layer: str) -> bool:
    """Say whether a layer of the files is a down projection in block 3, which is the one that is damaged."""
    words = layer.split(".")
    return "3" in words[:3] and words[-1] in ("down_proj", "ffn_down")


FIXTURES = (
    "ct W8A8", "ct W4A16", "ct W4A16_ASYM", "ct FP8", "ct FP8_BLOCK", "ct NVFP4", "ct MXFP4", "ct MXFP8",
    "modelopt FP8_DEFAULT", "modelopt FP8_PER_CHANNEL_PER_TOKEN", "modelopt NVFP4_DEFAULT",
    "modelopt MXFP8_DEFAULT", "modelopt INT8_SMOOTHQUANT", "modelopt INT4_AWQ", "modelopt W4A8_AWQ_BETA",
    "gptq by auto-round", "gptq asym by auto-round", "gptq 3 bits by auto-round", "gptq v2",
    "gptq desc_act", "awq by auto-round", "awq gemv", "auto-round NVFP4", "auto-round MXFP4", "auto-round FP8 block",
    "gguf Q4_0", "gguf Q8_0", "gguf Q4_K", "gguf Q6_K", "gguf TQ2_0", "gguf MXFP4", "bnb int8", "bnb nf4",
    "bnb nf4 nested", "torchao int8wo", "torchao intx4 asym", "torchao fp8wo", "fp8 blocks", "fp8 blocks ue8m0",
    "fp8 tensor", "mxfp4 gpt-oss",
)  # fmt: skip
"""The rows that the tests look at in small, one for each layout of tensors."""
KEPT = re.compile(r"self_attn\.v_proj\.|\.experts\.")
"""The tensors that a fixture keeps of its checkpoint: those of one small projection of each block, or the experts."""


def save_fixture(recipe: Recipe, cache: Path, into: Path) -> None:
    """Write a small checkpoint of a format, and beside it what its library reads from one of its layers."""
    checkpoint = made(recipe, cache, small=True)
    folder = into / checkpoint.folder.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("config.json", "hf_quant_config.json", "quantization_config.json", "model.gguf"):
        if (checkpoint.folder / name).exists():
            shutil.copy(checkpoint.folder / name, folder / name)
    for file in checkpoint.folder.glob("*.safetensors"):
        keep(file, folder / file.name)
    for file in checkpoint.folder.glob("dequantized/*.safetensors"):
        keep(file, into / f"{folder.name}.expected.safetensors")


def keep(file: Path, target: Path) -> None:
    """Copy a safetensors file with `KEPT` of its tensors."""
    with safe_open(file, framework="pt") as content:
        names = [name for name in content.keys() if KEPT.search(name)]  # noqa: SIM118 it can't be iterated
        tensors = {name: content.get_tensor(name) for name in names}
        about = {key: text for key, text in (content.metadata() or {}).items() if key == "format" or KEPT.search(key)}
    save_file(tensors, target, metadata=about)


def row(recipe: Recipe, cache: Path) -> Iterator[str]:
    """Yield the cells of a format's row."""
    yield recipe.name
    yield recipe.origin
    try:
        checkpoint = made(recipe, cache, small=False)
        before = checkpoint.findings()
        sqnr = {"tensor": checkpoint.sqnr("tensor"), "channel": checkpoint.sqnr("channel")}
    except QsaError as error:
        yield str(error).splitlines()[0].replace(f"{cache}{os.sep}", "")
        return
    yield agreement(checkpoint)
    yield "no alarm" if not before else f"{len(before)} alarms: {min(before)[1]}"
    quantized = [value for value in sqnr["tensor"].values() if value < np.inf]
    yield f"{min(quantized):.1f} … {max(quantized):.1f}"
    for damage in DAMAGES:
        yield cell(checkpoint, before, sqnr, damage)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", help="beginnings of rows' names; all rows where there is none")
    parser.add_argument("--cache", type=Path, default=user_cache_path("pytest-qsa") / "formats")
    parser.add_argument("--fixtures", type=Path, help="write the small checkpoints of the tests into this folder")
    options = parser.parse_args()
    options.cache.mkdir(parents=True, exist_ok=True)
    if options.fixtures:
        for name in FIXTURES:
            if not options.names or name.startswith(tuple(options.names)):
                save_fixture(RECIPES[name], options.cache, options.fixtures)
        for source in SOURCES:
            (options.fixtures / source).mkdir(exist_ok=True)
            shutil.copy(options.cache / f"small-{source}" / "config.json", options.fixtures / source / "config.json")
            keep(
                options.cache / f"small-{source}" / "model.safetensors", options.fixtures / source / "model.safetensors"
            )
        return
    print("| " + " | ".join(["format", "made by", "numpy = library", "healthy", "SQNR [dB]", *DAMAGES]) + " |")
    print("|---" * (5 + len(DAMAGES)) + "|")
    for recipe in RECIPES.values():
        if not options.names or recipe.name.startswith(tuple(options.names)):
            print("| " + " | ".join(row(recipe, options.cache)) + " |", flush=True)
    print(LEGEND)


if __name__ == "__main__":
    main()
