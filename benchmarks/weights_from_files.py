"""Weights that are read from files: seconds and memory of `weight_sqnr` without a model.

`python benchmarks/weights_from_files.py --folder DIR` compares SmolLM2 in int8 with its original, and a random
checkpoint of 2.1 G parameters, which it makes in DIR and deletes: int8 with a scale a row (2 GB) against bfloat16
(4 GB). Each runs in a process of its own that imports no torch, once to bring the files into the page cache and then
`--repeats` times. Memory is the process's own, RssAnon, without the pages of the files that are mapped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEMO = Path(__file__).parent.parent / ".demo"
HIDDEN, INNER, BLOCKS = 4096, 11008, 10
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INNER),
}


def main() -> None:
    """Print a row for each pair of checkpoints; with `--pair` measure one in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the large checkpoint is made, which takes 6 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--pair", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pair:
        print(json.dumps(measured(*options.pair)))
        return
    print("| checkpoint, against | weights | layers | s | M weights a second | memory, MB |\n|---|---|---|---|---|---|")
    print(row("SmolLM2 int8, bfloat16", DEMO / "smollm2-int8", DEMO / "smollm2", options.repeats))
    if options.folder is not None:
        made = options.folder / "weights-from-files"
        try:
            save_pair(made)
            print(row("random, int8 2 GB, bfloat16 4 GB", made / "int8", made / "bfloat16", options.repeats))
        finally:
            shutil.rmtree(made, ignore_errors=True)


def row(name: str, own: Path, reference: Path, repeats: int) -> str:
    """Run a pair in processes of their own; return the row of medians."""
    command = [sys.executable, __file__, "--pair", str(own), str(reference)]
    runs = [json.loads(subprocess.run(command, capture_output=True, check=True).stdout) for _ in range(repeats + 1)][1:]
    of: dict[str, Any] = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    speed, count = of["weights"] / of["seconds"] / 1e6, of["weights"] / 1e6
    return f"| {name} | {count:,.0f} M | {of['layers']:.0f} | {of['seconds']:.1f} | {speed:.0f} | {of['memory']:.0f} |"


def measured(own: Path, reference: Path) -> dict[str, float]:
    """Compare all weights of a checkpoint with the reference's, in this process."""
    from pytest_qsa.captures import ERROR, Request
    from pytest_qsa.checkpoint import Files, Folder, capture_weights

    files = Files(Folder(own), Folder(reference))
    before, began = resident(), time.perf_counter()
    with peak() as most:
        capture = capture_weights(files, [Request("_proj$", "weight", None, frozenset({ERROR}))])
        series = capture.weight("_proj$").weight_sqnr()
    seconds = time.perf_counter() - began
    assert (series.values > 20).all()
    assert "torch" not in sys.modules
    weights = float(sum(np.prod(numbers.shape) for numbers in capture.sites.values()))
    return {"layers": len(series.layers), "weights": weights, "seconds": seconds, "memory": most[0] - before}


def resident() -> float:
    """Return the memory of this process that no file backs, MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


@contextmanager
def peak() -> Iterator[list[float]]:
    """Look at this process's memory every 5 ms; the one number of the list is the most."""
    most, ended = [resident()], threading.Event()

    def look() -> None:
        while not ended.wait(0.005):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield most
    finally:
        ended.set()
        watcher.join()


def save_pair(folder: Path) -> None:
    """Write a random model's linear layers in bfloat16, and in int8 as compressed-tensors does; a file a block."""
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    scheme = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": groups}
    for name, config in (("int8", {"quantization_config": scheme}), ("bfloat16", {})):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = np.random.default_rng(0)
    for block in range(BLOCKS):
        original, quantized = {}, {}
        for layer, shape in SHAPES.items():
            name, x = f"model.layers.{block}.{layer}", generator.standard_normal(shape, dtype=np.float32)
            scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
            original[f"{name}.weight"] = ("BF16", (x.view(np.uint32) >> 16).astype(np.uint16))
            quantized[f"{name}.weight"] = ("I8", np.rint(x / scale).astype(np.int8))
            quantized[f"{name}.weight_scale"] = ("F32", scale)
        save(folder / "bfloat16" / f"model-{block}.safetensors", original)
        save(folder / "int8" / f"model-{block}.safetensors", quantized)


def save(path: Path, tensors: Mapping[str, tuple[str, NDArray[Any]]]) -> None:
    """Write a safetensors file by hand, for numpy has no bfloat16."""
    header, end = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in tensors.values():
            file.write(array.tobytes())


if __name__ == "__main__":
    main()
