"""What the plugin costs a pytest run that doesn't use it, and a gate whose capture is cached.

`python benchmarks/plugin_cost.py`
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import ROOT, arguments, medians


def run(*words: str, cwd: Path) -> None:
    """Run a command; it has to succeed."""
    environment = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *words], cwd=cwd, env=environment, check=True, capture_output=True
    )


def main() -> None:
    """Print both, in milliseconds and as ratios."""
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


if __name__ == "__main__":
    main()
