"""Draws the pictures of the documentation from real pages: `make screenshots`.

It runs the demo's gate on the damaged checkpoint and an analysis of the int8 one, opens both pages in chromium, and
writes what a reader sees to docs/images/. Look at the pictures before you commit them.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
SUITE = "example_suites/smollm2.qsa.yaml"
DAMAGED = ".demo/smollm2-int8-damaged"
INT8 = ".demo/smollm2-int8"
PLOT = "details.card[data-text^='down-proj-drift'] figure"
COLOURS = 96
"""A page of text and plots looks the same in so many colours, in a third of the bytes."""


def report_of(folder: Path) -> Path:
    """Run the gate on the damaged checkpoint; return its report."""
    words = [sys.executable, "-m", "pytest", "-q", SUITE, f"--qsa-model={DAMAGED}", f"--qsa-output={folder}"]
    done = subprocess.run(words, cwd=ROOT, check=False)
    if done.returncode != 1:
        raise SystemExit(f"the gate ended with {done.returncode}, where it has to fail with 1")
    return folder / "report.html"


def analysis_of(folder: Path) -> Path:
    """Draw the inputs' magnitudes and the heat maps of the int8 checkpoint; return the page."""
    enabled = {"magnitude_input": "true", "magnitude_output": "false", "heatmap_3d": "true"}
    enabled |= {f"outlier_{kind}": "false" for kind in ("layer_wise", "position", "token")}
    words = [sys.executable, "-m", "pytest_qsa", "analyze", "configs/default.yaml", "--model.path", INT8]
    words += [word for name, value in enabled.items() for word in (f"--enabled.{name}", value)]
    words += ["--data.num_samples", "4", "--data.seq_len", "128", "--save_dir", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True)
    return folder / "analysis_report.html"


def take(shown: Page | Locator, name: str) -> None:
    """Write what a window or a part of its page shows to docs/images/NAME.png."""
    file = IMAGES / f"{name}.png"
    shown.screenshot(path=file)
    Image.open(file).convert("RGB").quantize(COLOURS).save(file, optimize=True)
    print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1e3:.0f} kB")


def main(report: Path | None) -> None:
    """Write all pictures, of this report or of a run of its own."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_file = (report or report_of(Path(folder))).resolve()
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        page = browser.new_page(viewport={"width": 1100, "height": 760})
        page.goto(page_file.as_uri())
        take(page, "report")
        take(page.locator(PLOT).first, "report-plot")
        phone = browser.new_page(viewport={"width": 390, "height": 760}, color_scheme="dark")
        phone.goto(page_file.as_uri())
        take(phone, "report-phone-dark")
        page.goto(analysis_of(Path(folder) / "analysis").resolve().as_uri())
        inputs = page.locator("figure.chart").first
        peak = inputs.locator("svg.depth-plot[role=img]").last
        peak.hover(position={"x": 212, "y": 60})  # near the peak, so that its values are read
        take(inputs, "analysis")
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else None)
