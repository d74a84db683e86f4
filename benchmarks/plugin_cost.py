"""What the plugin costs a pytest run that doesn't use it, a gate whose capture is cached, and a gate's first run.

`python benchmarks/plugin_cost.py`. The first run of a suite on SmolLM2 (2 × 128 tokens) stands beside a plain script
that loads the model and runs as many tokens, whole processes. All are measured in the environment of this Python: for
the package alone, take that of an environment with nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, SMOLLM2, arguments, medians, usual_suite

SAMPLES, TOKENS = 2, 128
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
path, file, samples, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
model, tokenizer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), AutoTokenizer.from_pretrained(path)
ids = tokenizer(open(file, encoding="utf-8").read(), return_tensors="pt").input_ids
with torch.no_grad():
    for sample in range(samples):
        model(ids[:, sample * tokens : (sample + 1) * tokens])
"""


def first_run(folder: Path, repeats: int) -> dict[str, float]:
    """Return the seconds of a gate's first run, and of a script that only loads and runs the model."""
    suite, cache, sample = folder / "first.qsa.yaml", folder / "first", ROOT / "pytest_qsa" / "suite" / "data"
    suite.write_text(usual_suite(SMOLLM2.resolve(), SAMPLES, TOKENS), encoding="utf-8")
    words = [sys.executable, "-c", PLAIN, SMOLLM2.resolve(), sample / "sample.txt", SAMPLES, TOKENS]

    def plain() -> None:
        subprocess.run([*map(str, words)], cwd=folder, check=True, capture_output=True)

    def gate() -> None:
        shutil.rmtree(cache, ignore_errors=True)
        options = ("-p", "pytest_qsa.plugin", "-p", "syrupy", "--qsa-jobs", "99", "--qsa-cache", str(cache))
        run(*options, str(suite), cwd=folder)

    return medians({"plain": plain, "gate": gate}, repeats)


def run(*words: str, cwd: Path) -> None:
    """Run a command; it has to succeed."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words], cwd=cwd, env=environment, check=True, capture_output=True
    )


def main() -> None:
    """Print all three, in milliseconds, seconds and as a ratio."""
    options = arguments(__doc__ or "", repeats=15)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "test_nothing.py").write_text("def test_nothing(): pass\n")
        # An empty plugin instead of none: for any `-p` pytest looks through the entry points of all installed packages,
        # which a run without `-p` does as well where plugins load by themselves.
        Path(folder, "empty_plugin.py").touch()
        plain = ("-p", "no:cacheprovider")
        taken = medians(
            {
                "without": lambda: run(*plain, "-p", "empty_plugin", cwd=Path(folder)),
                "with": lambda: run(*plain, "-p", "pytest_qsa.plugin", cwd=Path(folder)),
            },
            options.repeats,
        )
        cost = 1000 * (taken["with"] - taken["without"])
        print(f"a run without gates: {cost:+.1f} ms of {1000 * taken['without']:.0f} ms")
        suite = ROOT / "example_suites" / "smollm2.qsa.yaml"
        thresholds = iter(range(1, 1000))

        def gate(*more: str) -> None:
            options = ("-p", "pytest_qsa.plugin", "-p", "syrupy", "--qsa-cache", folder, "--qsa-report", "never")
            edited = ("--qsa-set", f"assertions.residual-outliers.max={next(thresholds)}")
            run(*options, str(suite), *edited, *more, cwd=ROOT)

        taken = medians({"measured": lambda: gate("-k", "not files and not unquantized"), "all": gate}, options.repeats)
        print(f"an unchanged subject with an edited threshold: {taken['measured']:.2f} s")
        print(f"the same with the static checks, which read the files of it and of its reference: {taken['all']:.2f} s")
        taken = first_run(Path(folder), min(5, options.repeats))
        ratio = taken["gate"] / taken["plain"]
        print(f"first run of a suite: {taken['gate']:.2f} s, a plain script {taken['plain']:.2f} s: {ratio:.2f}")


if __name__ == "__main__":
    main()
