"""What the documentation says of options, keys, files and metrics is what there is; its blocks: test_documents.py."""

import re

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from pytest_qsa.checkpoint import format_of, open_folder
from pytest_qsa.metrics import METRICS
from pytest_qsa.suite import ASSERTIONS
from support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def test_the_default_configuration_has_every_key_with_its_default():
    from pytest_qsa.suite import Data, Memory, Visualization

    written = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text(encoding="utf-8"))
    for section, defaults in (("visualization", Visualization()), ("data", Data()), ("memory", Memory())):
        assert written[section] == defaults.model_dump()


def test_the_default_configuration_is_one_that_qsa_analyze_takes(llama, capsys):
    from pytest_qsa.cli import main

    config = str(ROOT / "configs" / "default.yaml")
    assert main(["analyze", "--config", config, "--model.path", str(llama), "--dry-run"]) == 0
    assert "magnitude_input" in capsys.readouterr().out


def test_every_key_of_the_pictures_is_documented():
    from pytest_qsa.suite import Visualization

    text = (ROOT / "docs" / "analyze.md").read_text(encoding="utf-8")
    sections = {name: type(value) for name, value in Visualization()}
    keys = [key for kind in sections.values() for key in getattr(kind, "model_fields", {})]
    assert [name for name, kind in sections.items() if name not in text] == []
    assert [key for key in keys if not re.search(rf"\b{key}\b|`_?{key.partition('_')[2]}`", text)] == []


def test_every_metric_is_documented():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in ASSERTIONS if not re.search(rf"`{name}[`(]", text)] == []


def test_every_metric_is_on_the_page_of_one_family():
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").glob("metrics-*.md")}
    named = [name for text in pages.values() for name in re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)]
    assert sorted(named) == sorted(name for name, metric in METRICS.items() if not metric.origin)


@pytest.mark.parametrize(
    "document",
    ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))],
)
def test_every_file_that_a_document_names_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"`((?:pytest_qsa|benchmarks|tests|docs|configs)/[\w./]+)`", text
    )
    named += re.findall(r"(?:python|pytest) ((?:benchmarks|tests)/[\w.]+)", text)
    folders = (ROOT, (ROOT / document).parent)  # a link is relative to its page
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_every_option_on_the_page_of_options_exists_and_none_is_missing():
    documented = set(re.findall(r"--qsa-[a-z-]+", OPTIONS))
    source = (ROOT / "pytest_qsa" / "gate" / "options.py").read_text(encoding="utf-8")
    assert documented == set(re.findall(r'"(--qsa-[a-z-]+)"', source))


def test_the_documented_format_reads_a_checkpoint_of_its_own(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(from pytest_qsa import Format.*?)```", page, flags=re.DOTALL)[1], {})
    codes = np.array([[7, -14], [3, 0]], dtype=np.int8)
    tensors = {"layers.0.up.weight": codes, "layers.0.up.weight_scale": np.array([[0.5], [2.0]], dtype=np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "sevenths"}}')
    stored = format_of(open_folder(tmp_path))
    assert stored.label == "sevenths"
    assert stored.rows("layers.0.up").tolist() == [[0.5, -1.0], [6 / 7, 0.0]]


def test_every_function_that_the_page_on_the_code_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = page.partition("## From a suite to a report")[2]
    named = re.findall(r"`([\w/]+\.py)`(?:: `([\w.]+)`)?", walks.partition("## What a change takes")[0])
    assert len(named) > 30
    missing = []
    for file, name in named:
        path = ROOT / "pytest_qsa" / file
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        found = [re.search(rf"(def|class) {part}\b", source) for part in name.split(".") if part]
        if not source or not all(found):
            missing.append(f"{file}: {name}")
    assert missing == []
