"""The documentation site: it builds without a warning, fetches nothing, and draws its formulas."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from pytest_qsa.metrics import METRICS
from support.paths import ROOT

STRICT = ("--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "--builder", "html")


def build(source, site):
    words = [sys.executable, "-m", "sphinx", *STRICT, "--doctree-dir", str(site / "doctrees"), str(source), str(site)]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Build the site as `make docs` does."""
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT / "docs", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_makefile_builds_the_site_as_strictly_as_this_test():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [option for option in STRICT if option not in makefile] == []


@pytest.mark.process
def test_every_document_is_a_page_that_can_be_searched(site):
    documents = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert documents <= {path.stem for path in site.glob("*.html")}
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert [name for name in documents if f'"{name}"' not in index] == []


@pytest.mark.process
def test_pages_fetch_nothing(site):
    for page in site.glob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="([^"]+)"', page.read_text("utf-8"))
        assert [url for url in loaded if url.startswith(("http", "//"))] == [], page.name


@pytest.mark.process
def test_formulas_are_drawn_without_a_script(site):
    page = (site / "metrics.html").read_text(encoding="utf-8")
    assert page.count("<math") >= 20
    assert "<msqrt" in page
    assert "$" not in re.sub(r"<(code|pre|script).*?</\1>", "", page, flags=re.DOTALL)


@pytest.mark.process
def test_a_broken_link_fails_the_build(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/conf.py").write_bytes((ROOT / "docs/conf.py").read_bytes())
    (tmp_path / "docs/index.md").write_text("# A\n\n[b](nowhere.md) and [c](#no-such-heading)\n")
    done = build(tmp_path / "docs", tmp_path / "site")
    assert done.returncode == 1
    assert "nowhere.md" in done.stderr
    assert "no-such-heading" in done.stderr


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_is_documented_with_its_parameters_and_their_defaults(metric):
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(rf"^\| `{metric}(?:\((.*?)\))?`(?:, `|.*?\|)(.*)$", text, flags=re.MULTILINE)
    assert rows, f"docs/metrics.md has no row that begins with `{metric}`"
    shown = {"none": "null", "true": "true", "false": "false"}
    defaults = {
        name: shown.get(str(p.default).lower(), f"{p.default:g}" if isinstance(p.default, (int, float)) else p.default)
        for name, p in METRICS[metric].parameters.items()
    }
    assert rows[0][0] == ", ".join(f"{name}={value}" for name, value in defaults.items())
