"""What the documentation shows is what there is: its suites load, its code runs, its options and metrics exist."""

import re
from pathlib import Path

import models
import pytest
import torch
import yaml

from pytest_qsa.config import load_suite
from pytest_qsa.config.suite import ASSERTIONS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def test_the_suite_of_the_readme_is_sound(tmp_path):
    (text,) = blocks(README, "yaml")
    (tmp_path / "gate.qsa.yaml").write_text(text)
    assert [assertion.id for assertion in load_suite(tmp_path / "gate.qsa.yaml").assertions] == [
        "residual-outliers",
        "down-proj-drift",
    ]


@pytest.mark.parametrize("document", ["suites.md", "tiers-and-waivers.md", "baselines.md", "bounds.md", "evals.md"])
def test_the_suites_of_a_document_are_sound(tmp_path, document):
    files = {}
    for text in blocks((ROOT / "docs" / document).read_text(encoding="utf-8"), "yaml"):
        files[tmp_path / re.match(r"# (\S+\.qsa\.yaml)\n", text)[1]] = text
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert all(load_suite(path).assertions for path in files)


def test_the_python_tests_of_the_readme_run(own_project, llama):
    tests, fixtures = blocks(README, "python")
    own_project.write("test_gate.py", tests)
    own_project.write(
        "gate.qsa.yaml",
        f"model: {{name: llama, path: {llama}}}\ndata: {{num_samples: 2, seq_len: 32}}\n"
        "assertions: [{id: a, metric: nonfinite, layers: x, site: input, max: 0}]\n",
    )
    arguments = ("test_gate.py", "--qsa-config=gate.qsa.yaml", "--qsa-report=never")
    assert own_project.pytest(*arguments, "--snapshot-update").code == 0
    assert own_project.pytest(*arguments).code == 0
    compile(fixtures, "README.md", "exec")


def test_the_library_is_used_as_documented(tmp_path, monkeypatch):
    example = "\n".join(blocks((ROOT / "docs" / "python.md").read_text(encoding="utf-8"), "python"))
    monkeypatch.chdir(tmp_path)
    names = {"model": models.llama(), "batches": [models.token_batch(2, 12)], "tokenizer": None}
    exec(compile(example, "docs/python.md", "exec"), names)
    assert names["counts"].layers == names["cap"].output(r"layers\.\d+$").layers
    assert torch.is_grad_enabled()


def test_the_default_configuration_has_every_key_with_its_default():
    from pytest_qsa.config import Data, Memory, Visualization

    written = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text(encoding="utf-8"))
    for section, defaults in (("visualization", Visualization()), ("data", Data()), ("memory", Memory())):
        assert written[section] == defaults.model_dump()


def test_the_default_configuration_is_one_that_qsa_analyze_takes(llama, capsys):
    from pytest_qsa.cli import main

    config = str(ROOT / "configs" / "default.yaml")
    assert main(["analyze", "--config", config, "--model.path", str(llama), "--dry-run"]) == 0
    assert "magnitude_input" in capsys.readouterr().out


def test_every_key_of_the_pictures_is_documented():
    from pytest_qsa.config import Visualization

    text = (ROOT / "docs" / "analyze.md").read_text(encoding="utf-8")
    sections = {name: type(value) for name, value in Visualization()}
    keys = [key for kind in sections.values() for key in getattr(kind, "model_fields", {})]
    assert [name for name, kind in sections.items() if name not in text] == []
    assert [key for key in keys if not re.search(rf"\b{key}\b|`_?{key.partition('_')[2]}`", text)] == []


def test_every_metric_is_documented():
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [name for name in ASSERTIONS if not re.search(rf"`{name}[`(]", text)] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/benchmarks.md", "docs/analyze.md"])
def test_every_file_that_a_document_names_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^)#:]+)\)", text) + re.findall(
        r"`((?:pytest_qsa|benchmarks|tests|docs|configs)/[\w./]+)`", text
    )
    named += re.findall(r"(?:python|pytest) ((?:benchmarks|tests)/[\w.]+)", text)
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_option_of_the_readme_exists_and_none_is_missing():
    documented = set(re.findall(r"--qsa-[a-z-]+", README))
    source = (ROOT / "pytest_qsa" / "options.py").read_text(encoding="utf-8")
    assert documented == set(re.findall(r'"(--qsa-[a-z-]+)"', source))
