"""How near `--qsa-plan` comes: its estimates against runs, each a process of its own.

`python benchmarks/estimates.py --folder DIR` makes a random Llama there (12 blocks, 1.4 GB) and runs a gate on it in
memory and streamed from disk; so it does with the checkpoints of `make demo`. Peak resident memory and seconds of the
whole process, ÷ those that the plan says. Run it with OMP_NUM_THREADS=1: seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from larger_than_memory import make_checkpoint

from pytest_qsa.checkpoint.folder import Folder
from pytest_qsa.engine.load.outline import this_machine
from pytest_qsa.suite import MeasuredAssertion, load_suite, weight_files
from pytest_qsa.tools.estimates import Setting, Work, settings_of, sizes_of

RUN = """
import pathlib, pytest, re, sys
code = pytest.main(sys.argv[1:])
print(re.search("VmHWM:.*", pathlib.Path("/proc/self/status").read_text())[0])
sys.exit(code)
"""
SUITE = r"""
model: {{name: m, path: {path}}}
data: {{num_samples: 8, seq_len: 256}}
assertions:
  - {{id: outliers, metric: outlier_tokens, layers: 'layers\.\d+$', site: output, max: 9999}}
  - {{id: drift, metric: magnitude, stat: median, layers: (o|up|down)_proj$, site: input, max: 9999}}
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
    print("| checkpoint | memory: | peak ÷ estimate | time ÷ estimate |\n|---|---|---|---|")
    for path in (options.demo / "smollm2", options.demo / "smollm2-int8", large):
        for row in rows_of(path.resolve()):
            print(row)


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made: Any = PreTrainedTokenizerFast
    made(tokenizer_object=tokenizer).save_pretrained(folder)


def rows_of(path: Path) -> list[str]:
    """Run each setting that the plan offers for a checkpoint on the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        suite = Path(folder) / "a.qsa.yaml"
        suite.write_text(SUITE.format(path=path), encoding="utf-8")
        return [_row(path, setting, *_run(suite, setting)) for setting in _settings(suite) if setting.gpu is None]


def _settings(suite: Path) -> list[Setting]:
    loaded = load_suite(suite)
    file = loaded.suite
    assert file.model is not None
    folder = Path(str(file.model.path))
    sizes = sizes_of(Folder(folder), file.model)
    requests = [assertion.request for assertion in loaded.assertions if isinstance(assertion, MeasuredAssertion)]
    work = Work.of(file.data, requests, sizes)
    return settings_of(sizes, work, this_machine(sizes.dtype, weight_files(folder)[0]))


def _run(suite: Path, setting: Setting) -> tuple[int, float]:
    """Return the peak resident bytes and the CPU seconds, which other processes don't lengthen, of a gate's process."""
    memory = [f"--qsa-set=memory.{key}={value}" for key, value in setting.memory.model_dump().items()]
    words = [sys.executable, "-c", RUN, "-q", str(suite), "--qsa-no-cache", "--qsa-report=never", *memory]
    began = _cpu_seconds()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the run failed: {done.stdout}")
    return 1024 * int(done.stdout.split()[-2]), _cpu_seconds() - began


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _row(path: Path, setting: Setting, peak: int, seconds: float) -> str:
    return f"| {path.name} | `{setting.text}` | {peak / setting.host:.2f} | {seconds / setting.seconds:.2f} |"


if __name__ == "__main__":
    main()
