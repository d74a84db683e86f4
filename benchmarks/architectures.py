"""Architectures and modalities by what is done with them: each works, or is refused in one line.

Each small random checkpoint of tests/support/architectures.py is listed by `qsa layers`, gets the suite that `qsa init`
writes, is gated by it, drawn by `qsa analyze` with every picture, and captured once more streamed from disk, whose
bytes are compared with those of the pass in memory. A cell of the table is `works`, or the line that the user reads.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from common import ROOT

STEPS = ("layers", "init", "gate", "analyze", "disk")
SEEN = {"llava": "pictures", "gemma3": "pictures", "qwen2_audio": "sounds"}
"""What models run on that also read texts alone."""
if find_spec("torchvision"):  # else a text has to do for Qwen-VL, whose processors need it
    SEEN |= {"qwen2_5_vl": "pictures", "qwen3_vl": "pictures"}
DATA = ["--data.num_samples", "4", "--data.seq_len", "48"]
FIRST = "first.qsa.yaml"
CONFIG = "analyze.yaml"
EVERY_PICTURE = ("magnitude_weight", "heatmap_3d", "distribution", "percentile_range")


def names() -> list[str]:
    """Return the names of the architectures."""
    return list(_makers()["ALL"])


def _makers() -> dict[str, Any]:
    sys.path.insert(0, str(ROOT / "tests"))
    return runpy.run_path(str(ROOT / "tests" / "support" / "architectures.py"))


def made(name: str, folder: Path) -> Path:
    """Make the checkpoint of an architecture, with its processor or tokenizer, unless it is there."""
    if not (folder / name / "done").exists():
        torch.manual_seed(0)
        makers = _makers()
        makers["saved"](name, folder / name)
        (folder / name / "done").touch()
    return folder / name


def step(name: str, checkpoint: Path) -> int:
    """Do one step in a folder beside the checkpoint; return its exit code."""
    from pytest_qsa.cli import main

    work = checkpoint.parent / f"{checkpoint.name}-work"
    work.mkdir(exist_ok=True)
    os.chdir(work)
    path, source = f"../{checkpoint.name}", SEEN.get(checkpoint.name, "sample")
    if name == "layers":
        return main(["layers", path])
    if name == "init":
        return main(
            ["init", path, "-o", FIRST, "--force", "--parts", "2", "--passes", "1", "--data.source", source, *DATA]
        )
    if name == "gate":
        # With its own baselines, and a second time without writing any.
        return _pytest("--snapshot-update", FIRST) or _pytest(FIRST)
    if name == "analyze":
        enabled = "".join(f"    {picture}: true\n" for picture in EVERY_PICTURE)
        Path(CONFIG).write_text(
            f"model: {{path: {path}}}\ndata: {{source: {source}, num_samples: 2, seq_len: 48}}\n"
            f"visualization:\n  dpi: 40\n  enabled:\n{enabled}"
        )
        return main(["analyze", "--config", CONFIG])
    return _streamed(path)


def _pytest(*arguments: str) -> int:
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--qsa-report=never", "--qsa-no-cache"]
    return int(pytest.main([*options, *arguments]))


def _streamed(path: str) -> int:
    """Capture in memory and streamed from disk what the first suite asks for, and compare the two."""
    from pytest_qsa.captures import Capture
    from pytest_qsa.cli import main

    for place in ("cpu", "disk"):
        options = ["--config", FIRST, "--memory.offload_device", place, "-o", f"{place}.qsa"]
        if code := main(["capture", *options]):
            return code
    memory, disk = (Capture.load(f"{place}.qsa") for place in ("cpu", "disk"))
    for site, numbers in memory.sites.items():
        for array, values in numbers.arrays.items():
            if values.tobytes() != disk.sites[site].arrays[array].tobytes():
                print(f"the {site[1]} of {site[0]}: {array} streamed from disk is not that in memory", file=sys.stderr)
                return 1
    return 0


def _caught(work: Callable[[], int], answer: Any) -> None:
    out, code = io.StringIO(), 70
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = work()
        except BaseException as error:  # a traceback is what the table has to show
            print(f"TRACEBACK {type(error).__name__}: {error}")
    answer.send((code, out.getvalue()))


def outcome(name: str, checkpoint: Path, log: Path | None) -> str:
    """Do a step in a process of its own, forked from this one; return `works`, or the line that says why not."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=_caught, args=(lambda: step(name, checkpoint), theirs))
    process.start()
    code, text = ours.recv()
    process.join()
    if log is not None:
        log.mkdir(parents=True, exist_ok=True)
        (log / f"{checkpoint.name}-{name}.txt").write_text(f"{text}\nexit {code}\n")
    if code == 0:
        return "works"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).strip().splitlines()
    said = [line for line in plain if re.search(r"TRACEBACK|^E? *(INFRA|ANOMALOUS|REGRESSION)|^(qsa|ERROR): ", line)]
    last = [line for line in said if not re.search(r"\[\d+/\d+\]", line)]  # how far the command was
    return f"{code}: {(last or plain or ['nothing is said'])[0].strip()}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all, {', '.join(names())}")
    parser.add_argument("--folder", type=Path, default=Path("build/architectures"), help="where all of it is made")
    parser.add_argument("--steps", nargs="*", default=STEPS, choices=STEPS)
    parser.add_argument("--log", type=Path, help="a folder for what each step says")
    options = parser.parse_args(arguments)
    # What each process would import again.
    import transformers

    import pytest_qsa.engine.api
    import pytest_qsa.engine.subject
    import pytest_qsa.report.plots.figures  # noqa: F401

    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    folder = options.folder.absolute()
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache" / str(time.time_ns()))  # captures of another version are none
    print(f"| architecture | {' | '.join(options.steps)} |\n|---|{'---|' * len(options.steps)}")
    began = time.monotonic()
    for name in options.names or names():
        cells = [outcome(each, made(name, folder), options.log) for each in options.steps]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
