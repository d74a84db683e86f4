"""A checkpoint on disk: streamed block by block, against the pass in memory and against accelerate's own disk offload.

`python benchmarks/larger_than_memory.py --folder DIR` makes a random Llama there (0.09 GB a block, 4 times what a
streamed pass may take) and runs each variant in a process of its own, in turns, `--repeats` times: seconds of the pass,
of the processor in it and of load and pass together, the process's peak resident memory, and the bytes of weights that
were read. `--cold` drops the checkpoint from the page cache before each run; `--only streamed memory` leaves variants
out. On a machine with other work set OMP_NUM_THREADS, else the pass takes what is free.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIANTS = ("memory", "streamed", "accelerate")
LARGEST_UNITS = 2 * 32000 * 2048 * 2 / 1e6
"""The embedding and the head, MB."""


def main() -> None:
    """Run all variants, or, with `--variant`, one of them in this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=38)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--variant", choices=(*VARIANTS, "imports"))
    options = parser.parse_args()
    if options.variant:
        print(json.dumps(measured(options)))
        return
    if not (options.folder / "config.json").exists():
        make_checkpoint(options.folder, options.blocks)
    compare(options)


def make_checkpoint(folder: Path, blocks: int) -> None:
    """Write a random Llama of hidden 2048 in bfloat16, its head apart from its embedding, in shards of 1 GB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=blocks, num_attention_heads=16,
        num_key_value_heads=8, vocab_size=32000, tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="1GB")
    drop(folder)  # the page cache holds what was written in smaller pages than what was read, as a user's files are


def measured(options: argparse.Namespace) -> dict[str, float]:
    """Run one variant over random tokens; the checkpoint is loaded before the clock starts."""
    import torch

    from pytest_qsa.captures import COUNTS, TOKENS, Request
    from pytest_qsa.engine.load import models
    from pytest_qsa.engine.run.run_pass import run_pass
    from pytest_qsa.suite import Memory, Model

    if options.variant == "imports":
        return {"resident": resident()}
    memory = Memory(device="cpu", offload_device="disk" if options.variant == "streamed" else "cpu")
    if options.variant == "accelerate":
        models._placement = lambda *_: {"device_map": {"": "disk"}}
    with counted() as materialised:
        begin = time.perf_counter()
        loaded = models.load_model(Model(path=str(options.folder)), str(options.folder), memory, allow_code=False)
        tokens = torch.Generator().manual_seed(0)
        batches = [torch.randint(0, 32000, (1, options.seq_len), generator=tokens) for _ in range(options.samples)]
        requests = [Request(r"layers\.\d+$", "output", None, frozenset({TOKENS, COUNTS})),
                    Request("lm_head", "input", None, frozenset({TOKENS})),
                    Request("lm_head", "output", None, frozenset({TOKENS}))]  # fmt: skip
        start, processor = time.perf_counter(), time.process_time()
        capture = run_pass(loaded.model, batches, requests, stream=loaded.stream)
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    import hashlib

    digest = float(int(hashlib.sha256(capture.to_bytes()).hexdigest()[:12], 16))
    read = loaded.stream.shards.bytes_read if loaded.stream else materialised[0]
    loaded.close()
    return {"seconds": seconds, "processor": processor, "load": start - begin, "whole": start - begin + seconds,
            "resident": resident(), "read": float(read), "digest": digest}  # fmt: skip


def resident() -> float:
    """Return the peak resident memory of this process in MB; `ru_maxrss` would begin with that of its parent."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the bytes that accelerate's hooks read from disk."""
    from accelerate.utils.offload import OffloadedWeightsLoader

    read, original = [0], OffloadedWeightsLoader.__getitem__

    def get(self: Any, key: str) -> Any:
        tensor = original(self, key)
        read[0] += tensor.nbytes
        return tensor

    OffloadedWeightsLoader.__getitem__ = get
    try:
        yield read
    finally:
        OffloadedWeightsLoader.__getitem__ = original


def compare(options: argparse.Namespace) -> None:
    """Print a table of medians and the ratios that the goals are stated in."""
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    imports = one(options, "imports")["resident"]
    allowed = imports + LARGEST_UNITS + 400 + options.samples * options.seq_len * 2048 * 2 / 1e6
    for _ in range(options.repeats):
        for name in options.only:
            if options.cold:
                drop(options.folder)
            runs[name].append(one(options, name))
    middle = {
        name: {key: statistics.median(run[key] for run in found) for key in found[0]} for name, found in runs.items()
    }
    print(f"checkpoint {size / 1e9:.2f} GB, {options.samples} × {options.seq_len} tokens, cold: {options.cold}")
    print(f"imports alone: {imports:.0f} MB; allowed {allowed:.0f} MB: the file is {size / 1e6 / allowed:.2f} × that")
    for name, values in middle.items():
        print(
            f"{name:>10}: {values['seconds']:.2f} s, of the processor {values['processor']:.2f}, with the load "
            f"{values['whole']:.2f}, peak {values['resident']:.0f} MB, read {values['read'] / size:.3f} × the file, "
            f"digest {values['digest']:.0f}"
        )
    for one_, other, what in (("streamed", "memory", "seconds"), ("streamed", "memory", "whole"),
                              ("accelerate", "streamed", "seconds"), ("accelerate", "streamed", "read")):  # fmt: skip
        if one_ in middle and other in middle:
            turns = " ".join(f"{mine[what] / its[what]:.2f}" for mine, its in zip(runs[one_], runs[other], strict=True))
            print(f"{one_} ÷ {other}, {what}: {middle[one_][what] / middle[other][what]:.2f} (by turn: {turns})")


def one(options: argparse.Namespace, variant: str) -> dict[str, float]:
    """Run one variant in a process of its own."""
    command = [sys.executable, __file__, "--folder", str(options.folder), "--variant", variant,
               "--samples", str(options.samples), "--seq-len", str(options.seq_len)]  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, check=False)
        if done.returncode:
            errors.seek(0)
            sys.exit(f"{variant}: {errors.read()[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def drop(folder: Path) -> None:
    """Ask the kernel to forget the checkpoint's pages."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


if __name__ == "__main__":
    main()
