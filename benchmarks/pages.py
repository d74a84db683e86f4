"""How long the pages take to open, and whether they fit: `python benchmarks/pages.py [PAGE.html …]`.

Without a page: the report of the damaged SmolLM2, that of three checkpoints held against one suite, the page of an
analysis with everything enabled (4 × 128 tokens), and a report of 10,000 layers and one assertion, without and with a
baseline. Each is opened in headless chromium at three widths, with all that is
folded opened afterwards. The time is the processor's, of the page's own thread until it is loaded, so that other work
on the machine doesn't count.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import ROOT
from playwright.sync_api import Browser, sync_playwright

from pytest_qsa.metrics import PlainQuery
from pytest_qsa.report.report import to_plain, write_report
from pytest_qsa.verdicts.verdict import Kind, Row, Verdict

WIDTHS = (390, 768, 1440)
DEMO, SUITE = ROOT / ".demo", ROOT / "example_suites" / "smollm2.qsa.yaml"
THREE = [f"--qsa-model={name}={DEMO / name}" for name in ("smollm2", "smollm2-int8", "smollm2-int8-damaged")]
ANALYSIS = ("distribution", "heatmap_3d", "percentile_range", "magnitude_weight")


def pages_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield what each page is, and the page."""
    for name, models in (("report, one checkpoint", THREE[-1:]), ("report, three checkpoints", THREE)):
        target = folder / str(len(models))
        words = ["pytest", "-q", str(SUITE), *models, f"--qsa-output={target}", "--qsa-report=always"]
        subprocess.run([sys.executable, "-m", *words], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
        yield name, target / "report.html"
    enabled = [word for section in ANALYSIS for word in (f"--enabled.{section}", "true")]
    words = ["pytest_qsa", "analyze", "configs/default.yaml", "--model.path", str(DEMO / "smollm2-int8"), *enabled]
    size = ["--data.num_samples", "4", "--data.seq_len", "128", "--save_dir", str(folder / "analysis")]
    subprocess.run([sys.executable, "-m", *words, *size], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    yield "analysis, everything enabled", folder / "analysis" / "analysis_report.html"
    for name, spread in (("bound", 0.0), ("baseline", 0.1)):
        yield f"report, 10,000 layers, one {name}", of_many_layers(folder / name, spread)


def of_many_layers(folder: Path, spread: float) -> Path:
    """Write the report of an assertion on 10,000 experts. `spread`: of the baseline's tolerance; 0 for one bound."""
    made = random.Random(0)
    rows = []
    for index in range(10_000):
        value, baseline = made.lognormvariate(0, 0.5), made.lognormvariate(0, 0.5)
        low, high = (baseline - spread, baseline + spread) if spread else (None, 4.0)
        name = f"model.layers.{index // 256}.mlp.experts.{index % 256}.down_proj"
        rows.append(Row(name, value, low, high, baseline if spread else None, max(value - high, 0.0), index))
    rows.sort(key=lambda row: -row.excess)
    query = PlainQuery(text="rms at the output of 'experts'", metric="rms", site="output")
    verdict = Verdict("rms", "random", Kind.REGRESSION, "rms: too large", query=query, rows=rows, bound="max 4")
    return write_report([to_plain(verdict)], folder, {"command": "pytest", "version": "0", "counts": {}})


def measured(browser: Browser, file: Path) -> tuple[list[float], int, list[str]]:
    """Return the seconds that each width took, the most pixels by which a width is exceeded, and the errors."""
    seconds, beyond, errors = [], 0, []
    for width in WIDTHS:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        clock = page.context.new_cdp_session(page)
        clock.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(file.resolve().as_uri(), timeout=300_000)
        page.wait_for_function("!document.querySelector('script[data-packed]')", timeout=300_000)
        metrics = {each["name"]: each["value"] for each in clock.send("Performance.getMetrics")["metrics"]}
        seconds.append(metrics["ThreadTime"])
        page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
        page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        beyond = max(beyond, page.evaluate("document.documentElement.scrollWidth") - width)
        page.close()
    return seconds, beyond, errors


def main() -> None:
    """Print a row a page."""
    print("| page | size | main thread at 390, 768, 1440 px | beyond the width | errors |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        given = [(Path(word).name, Path(word)) for word in sys.argv[1:]]
        for name, file in given or pages_in(Path(folder)):
            seconds, beyond, errors = measured(browser, file)
            times = ", ".join(f"{each:.2f}" for each in seconds)
            size = f"{file.stat().st_size / 1e6:.2f} MB"
            print(f"| {name} | {size} | {times} s | {beyond} px | {len(errors)} {'; '.join(errors[:3])} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main()
