"""The blocks of the documentation, run in order in a user's project of their own, on small stand-ins for the models.

What a block may be is told in CONTRIBUTING.md.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pytest_qsa.cli import main
from pytest_qsa.suite import load_suite

from .checkpoints import save_adapter, save_gguf
from .paths import ROOT

BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```", re.M | re.S)
RUN = ("yaml", "console", "bash", "python")
SCHEMAS = {".github/workflows/": "github-workflows", ".gitlab-ci.yml": "gitlab-ci"}
SMALL = ("--qsa-set=data.num_samples=4", "--qsa-set=data.seq_len=64")
SMALLER = {
    "analyze": {"--save_dir": ["pictures"], "--dpi": ["40"], "--data.num_samples": ["2"], "--data.seq_len": ["32"]},
    "capture --for-reference": {"--data.num_samples": ["4"], "--data.seq_len": ["64"]},
    "calibrate": {"--parts": ["2"], "--passes": ["1"]},
    "init": {"--parts": ["2"], "--passes": ["1"]},
    "selftest": {"--faults": ["nan_scale"], "--bisect": ["none"], "--": ["-k", "files"]},
}
"""What a command is cut down to where the page does not say it: small pictures, little data, a fault of the files."""

GATE = r"""
model: {name: my-model-int8, path: checkpoints/my-model-int8, reference: checkpoints/my-model}
data: {source: sample, num_samples: 4, seq_len: 64}
assertions:
  - {id: files, metric: checkpoint_health}
  - {id: residual-outliers, metric: outlier_tokens, layers: 'layers\.\d+$', site: output, max: 1}
  - {id: drift, metric: magnitude, stat: median, layers: down_proj$, site: output, baseline: {rel: 0.1}}
"""
ANALYSIS = "model: {path: checkpoints/my-model}\ndata: {num_samples: 2, seq_len: 32}\nvisualization: {dpi: 40}\n"
GGUF_FILE = "my-model-Q4_K_M.gguf"
AUTHOR = ("-c", "user.name=reader", "-c", "user.email=reader@example.org")
NAMES = "import pytest\nimport torch\nfrom stand_in import MyModel\n"
STAND_IN = """
from transformers import AutoModelForCausalLM

def MyModel():
    return AutoModelForCausalLM.from_pretrained("checkpoints/my-model")
"""


WHEN = "2026-11-01T10-00-00.000000"
MULTIPLE = ("arc_challenge", "hellaswag", "winogrande")


def _write_evals(project, model):
    """Write what lm-eval leaves of a model that answers 1,600 of 2,000 questions, with `--log_samples`; and a score."""
    exact = {"exact_match,strict-match": 0.8, "exact_match_stderr,strict-match": 0.009}
    results = {"gsm8k": exact} | {task: {"acc,none": 0.7, "acc_stderr,none": 0.01} for task in MULTIPLE}
    whole = {"results": results, "n-samples": {"gsm8k": {"original": 2000, "effective": 2000}}}
    project.write(f"evals/{model}/results_{WHEN}.json", json.dumps(whole | {"model_name": f"checkpoints/{model}"}))
    shared = {"filter": "strict-match", "metrics": ["exact_match"]}
    shift = "int8" in model  # it has others of the first hundred right, and as many
    right = [float((index + shift * (index < 100)) % 5 > 0) for index in range(2000)]
    lines = [
        json.dumps({"doc_id": index, "prompt_hash": f"p{index}", **shared, "exact_match": each})
        for index, each in enumerate(right)
    ]
    project.write(f"evals/{model}/samples_gsm8k_{WHEN}.jsonl", "\n".join(lines) + "\n")


@dataclass(frozen=True)
class Block:
    """A fenced block. `reason`: why it is only checked, not run; empty where it is run."""

    language: str
    text: str
    reason: str
    line: int

    @property
    def file(self):
        """The file that its first line names, `# gates/a.qsa.yaml`."""
        named = re.match(r"# (\S+\.(?:ya?ml|py))\n", self.text)
        return named[1] if named else None

    @property
    def commands(self):
        """The words of each command, without the prompt and what stands behind a #."""
        lines = self.text.replace("\\\n", " ").splitlines()
        typed = [line.removeprefix("$ ") for line in lines if line.startswith("$ ") or self.language == "bash"]
        return [words for words in (shlex.split(line, comments=True) for line in typed) if words]


def blocks_of(page):
    """Return the blocks of a page that are code."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(match["language"], match["text"], match["reason"] or "", text.count("\n", 0, match.start()) + 1)
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if block.language in RUN]


def pages():
    """Return every page that has a block to run."""
    return [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if blocks_of(page)]


@dataclass
class Reader:
    """Someone who types what a page says, in a project that has what the page speaks of."""

    project: object
    page: Path
    names: dict = field(default_factory=dict)
    waiting: list = field(default_factory=list)

    def prepare(self, checkpoints):
        """Make what every page may use. `checkpoints`: the stand-ins, in float and in int8."""
        text = self.page.read_text(encoding="utf-8")
        folder = self.project.folder / "checkpoints"
        folder.mkdir()
        for name in {"my-model", "my-model-int8", *re.findall(r"checkpoints/([\w-]+)", text)}:
            if name.endswith("-gguf"):
                (save_gguf(folder / name, checkpoints["float"]) / "model.gguf").rename(folder / name / GGUF_FILE)
            elif name.endswith("-lora"):
                save_adapter(folder / name, checkpoints["float"])
            else:
                (folder / name).symlink_to(checkpoints["int8" if "int8" in name else "float"])
        self.project.write("gate.qsa.yaml", GATE)
        budgets = GATE.replace("checkpoints/", "../checkpoints/").partition("  - {id: drift")[0]
        self.project.write("gates/gate.qsa.yaml", budgets)
        self.project.write("suite.qsa.yaml", GATE.replace("samples: 4, seq_len: 64", "samples: 64, seq_len: 16"))
        for name in ("old.qsa", "new.qsa"):
            shutil.copy(checkpoints["capture"], self.project.folder / name)
        self.project.write("my.yaml", ANALYSIS)
        subprocess.run(["git", "init", "-q"], cwd=self.project.folder, check=True)
        if "origin/main" in text:  # where the gates are those of this very commit
            for words in (
                ("add", "gates"),
                ("commit", "-qm", "gates"),
                ("update-ref", "refs/remotes/origin/main", "HEAD"),
            ):
                subprocess.run(["git", *AUTHOR, *words], cwd=self.project.folder, check=True)
        if "evals/" in text:
            for model in ("my-model", "my-model-int8"):
                _write_evals(self.project, model)
            for name, accuracy in (("house", 0.745), ("house-base", 0.75)):
                score = {"summary": {"accuracy": accuracy, "accuracy_stderr": 0.004}}
                self.project.write(f"evals/{name}.json", json.dumps(score))
        self.project.write("stand_in.py", STAND_IN)
        shutil.copytree(ROOT / "configs", self.project.folder / "configs")
        shutil.copytree(ROOT / "example_suites/team", self.project.folder / "example_suites/team")

    def follow(self, block):
        """Do what a block says."""
        getattr(self, f"_{block.language.replace('bash', 'console')}")(block)

    def finish(self):
        """Run the suites that the page shows and no command of it ran."""
        if self.waiting:
            self._pytest(*dict.fromkeys(self.waiting), "--snapshot-update")

    def _yaml(self, block):
        assert block.file, "begin the block with the name of its file, `# gate.qsa.yaml`"
        path = self.project.write(block.file, block.text)
        schema = next((name for front, name in SCHEMAS.items() if block.file.startswith(front)), None)
        if schema:
            words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", str(path)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout
            self._check_jobs(yaml.safe_load(block.text))
        elif block.file.endswith((".qsa.yaml", ".qsa.yml")) and not path.parent.name.startswith("_"):
            if not (self.project.folder / "conftest.py").exists():  # it may define the metrics of the suite
                assert load_suite(path).assertions
            self.waiting += [] if block.reason else [block.file]

    def _check_jobs(self, content):
        """Collect what the jobs would run: their options and their paths are those of this project."""
        scripts = re.findall(r"^\s*(pytest .*|qsa .*)$", "\n".join(_scripts(content)), flags=re.MULTILINE)
        actions = [step for step in _steps(content) if "/pytest-qsa@" in step.get("uses", "")]
        inputs = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))["inputs"]
        assert all(set(step["with"]) <= set(inputs) for step in actions)
        scripts += [f"pytest {step['with']['suites']} {step['with'].get('args', '')}" for step in actions]
        assert scripts
        for script in scripts:
            words = shlex.split(re.sub(r"\$\{[^}]*\}|\"?\$\w+\"?", "", script))
            if words[0] == "pytest":
                run = self.project.pytest("--co", "-q", *words[1:])
                assert run.code == 0, run.out

    def _console(self, block):
        for words in block.commands:
            self._type(words, block.reason)

    def _type(self, words, reason):
        program, *arguments = words
        if program == "torchrun":  # its ranks are tests/engine/test_ranks.py's; here is what each of them runs
            program, arguments = "qsa", arguments[arguments.index("pytest_qsa") + 1 :]
        if program == "pytest":
            self._pytest(*arguments, *(["--co"] if reason else []))
        elif program == "qsa":
            self._qsa(arguments, reason)
        elif program == "git":
            subprocess.run(words, cwd=self.project.folder, check=True)
        elif program == "make":
            assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
        elif "install" in arguments:
            _check_requirement(arguments[-1])
        elif program == "python":
            assert (ROOT / arguments[0]).exists()
        else:
            assert reason, f"tests/support/documents.py knows no program '{program}'"

    def _pytest(self, *arguments):
        self.waiting = [name for name in self.waiting if name not in arguments]
        run = self.project.pytest(*arguments, *SMALL)
        assert run.code in (0, 1), run.out
        for nodeid, report in run.reports.items():
            kinds = [kind for kind in ("INFRA", "ANOMALOUS", "SUITE") if f"E   {kind}" in report["text"]]
            assert not kinds, f"{nodeid}\n{report['text']}"
            assert report["outcome"] != "error", report["text"]
        return run

    def _qsa(self, arguments, reason):
        command, *given = arguments
        smaller = SMALLER.get(f"{command} --for-reference" if "--for-reference" in given else command, {})
        more = [word for name, values in smaller.items() if name not in given for word in (name, *values)]
        if command == "selftest" and self.page.stem != "selftest":
            more = ["--list"]  # a run costs seconds: one page has it
        assert main([command, "--help"] if reason else [command, *given, *more]) in (0, 1)

    def _python(self, block):
        name = self.page.stem.lower().replace("-", "_")
        if block.reason:
            compile(block.text, str(self.page), "exec")
        elif block.file == "conftest.py":
            self.project.write(block.file, block.text)
            run = self._pytest("gate.qsa.yaml", "--snapshot-update")
            assert not [warning for warning in run.warnings if "pytest_qsa_" in warning["text"]], run.warnings
        elif "@pytest.fixture" in block.text:
            self.project.write("fixtures/conftest.py", NAMES + block.text)
            test = self.project.read(f"test_{name}.py")
            self.project.write(f"fixtures/test_own_{name}.py", test)
            self._pytest("fixtures", "--snapshot-update")
        elif re.search(r"^def test_", block.text, flags=re.MULTILINE):
            self.project.write(f"test_{name}.py", block.text)
            self._pytest(f"test_{name}.py", "--qsa-config=gate.qsa.yaml", "--snapshot-update")
        else:
            exec(compile(block.text, str(self.page), "exec"), self.names)


def _steps(content):
    """Return the steps of a workflow of GitHub; none of another service's pipeline."""
    return [step for job in content.get("jobs", {}).values() for step in job["steps"]]


def _scripts(content):
    """Yield the shell scripts of a pipeline, wherever they stand in it."""
    if isinstance(content, dict):
        for key, value in content.items():
            if key in ("run", "script") and not isinstance(value, dict):
                yield "\n".join(value) if isinstance(value, list) else value
            else:
                yield from _scripts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _scripts(value)


def _check_requirement(requirement):
    """Check that what is installed is this package, with extras that it has."""
    name, _, extra = requirement.rstrip("]").partition("[")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert name == known["name"]
    assert not extra or extra in known["optional-dependencies"]
