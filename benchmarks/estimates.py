"""How near `--qsa-plan` comes: its estimates against runs, each a process of its own.

`python benchmarks/estimates.py --folder DIR` makes a random Llama there (12 blocks, 1.4 GB) and runs a gate on it in
memory and streamed from disk; so it does with the checkpoints of `make demo`, and with the quantized one held against
its original (KL divergence, SQNR of the blocks). Peak resident memory, seconds of the processor and seconds by the
clock, of the whole process, ÷ those that the plan says. On a busy machine the third says whether the plan knows it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import usual_suite
from larger_than_memory import make_checkpoint

from pytest_qsa.checkpoint.folder import Folder
from pytest_qsa.engine.load.outline import this_machine
from pytest_qsa.suite import MeasuredAssertion, load_suite, weight_files
from pytest_qsa.tools.checkpoint_sizes import sizes_of
from pytest_qsa.tools.estimates import Setting, Work, settings_of

RUN = """
import pathlib, pytest, re, sys
code = pytest.main(sys.argv[1:])
print(re.search("VmHWM:.*", pathlib.Path("/proc/self/status").read_text())[0])
sys.exit(code)
"""
COMPARED = r"""
model: {{name: m, path: {path}, reference: {reference}}}
data: {{num_samples: 8, seq_len: 256}}
assertions:
  - {{id: close, metric: sqnr, layers: 'layers\.\d+$', site: output, min: -999}}
  - {{id: predictions, metric: kl_divergence, max: 9999}}
"""


def main() -> None:
    """Print a row for each checkpoint and setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--demo", type=Path, default=Path(".demo"))
    options = parser.parse_args()
    large = options.folder / "llama"
    if not (large / "config.json").exists():
        make_checkpoint(large, 12)
        save_tokenizer(large)
    print("| checkpoint | memory: | peak ÷ estimate | processor's time ÷ estimate | time ÷ estimate |")
    print("|---|---|---|---|---|")
    original, quantized = (options.demo.resolve() / name for name in ("smollm2", "smollm2-int8"))
    for path in (original, quantized, large.resolve()):
        print_rows(path.name, usual_suite(path, 8, 256))
    print_rows("smollm2-int8 against smollm2", COMPARED.format(path=quantized, reference=original))


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer).save_pretrained(folder)


def print_rows(name: str, text: str) -> None:
    """Run each setting on the CPU that the plan offers for a suite, and print a row of it."""
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "a.qsa.yaml"
        suite.write_text(text, encoding="utf-8")
        for index in (index for index, setting in enumerate(_settings(suite)) if setting.gpu is None):
            # The plan of now, for what else runs changes while the rows are made.
            setting = _settings(suite)[index]
            peak, processor, clock = _run(suite, setting)
            ratios = (peak / setting.host, processor / setting.processor, clock / setting.seconds)
            print(f"| {name} | `{setting.text}` | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |", flush=True)


def _settings(suite: Path) -> list[Setting]:
    loaded = load_suite(suite)
    file = loaded.suite
    assert file.model is not None
    folder = Path(str(file.model.path))
    sizes, original = sizes_of(Folder(folder), file.model), file.model.reference
    reference = sizes_of(Folder(Path(str(original))), file.model) if original else None
    requests = [assertion.request for assertion in loaded.assertions if isinstance(assertion, MeasuredAssertion)]
    work = Work.of(file.data, requests, sizes, tests=len(requests))
    return settings_of(sizes, work, this_machine(sizes.dtype, weight_files(folder)[0]), reference)


def _run(suite: Path, setting: Setting) -> tuple[int, float, float]:
    """Return the peak resident bytes of a gate's process, its seconds of the processor, and those by the clock."""
    memory = [f"--qsa-set=memory.{key}={value}" for key, value in setting.memory.model_dump().items()]
    words = [sys.executable, "-c", RUN, "-q", str(suite), "--qsa-no-cache", "--qsa-report=never", "--qsa-jobs=99"]
    began, started = _cpu_seconds(), time.perf_counter()
    done = subprocess.run([*words, *memory], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stdout}")
    return 1024 * int(done.stdout.split()[-2]), _cpu_seconds() - began, time.perf_counter() - started


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
