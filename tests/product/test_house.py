"""`benchmarks/house.py` counts what it says, on a small package."""

from __future__ import annotations

import subprocess
import sys

import pytest

from support.paths import ROOT

pytestmark = pytest.mark.process

MODULES = {
    "__init__.py": '"""A package."""\n',
    "plugin.py": "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .suite import Suite\n",
    "suite/__init__.py": "",
    "suite/load.py": (
        '"""Load a suite."""\n'
        "import json  # the standard one is fast enough\n\n"
        "# A suite is small: nothing is streamed.\n"
        "LIMIT = 3\n"
        '"""How many."""\n\n\n'
        "def load(text):\n"
        '    """Load it."""\n'
        "    table = [1,\n        2]  # fmt: skip\n"
        "    return json.loads(text), table\n"
    ),
    "gate/__init__.py": "",
    "gate/load.py": "from ..suite import load as first\nfrom .. import suite\n\nLIMIT = first\n_LIMIT = suite\n",
    "checkpoint/__init__.py": "",
    "checkpoint/formats/gguf.py": "class Gguf: ...\n",
    "engine/__init__.py": "",
    "engine/formats/gguf.py": "from pytest_qsa.checkpoint import Gguf\n",
    "cli/diff.py": "from ..tools import diff\n\n\ndef run(): ...\n",
    "cli/plan.py": "def run(): ...\n",
    "tools/diff.py": "import torch\n",
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkout")
    for name, text in MODULES.items():
        path = folder / "pytest_qsa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def house(*words):
    command = [sys.executable, str(ROOT / "benchmarks" / "house.py"), *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_table_counts_modules_code_comments_and_edges(checkout):
    table = dict(line.split("  ", 1) for line in house(checkout).splitlines()[1:])
    value = {name.strip(): cells.split()[0] for name, cells in table.items()}
    assert value["rooms at the top"] == "6"
    assert value["loose modules"] == "2"
    assert value["modules"] == "13"
    assert value["code lines"] == str(3 + 6 + 4 + 1 + 1 + 2 + 1 + 1)  # plugin, load, gate, the formats, commands, tool
    assert value["comments"] == "2"
    assert value["fmt: skip"] == "1"
    assert value["import edges between rooms"] == "3"  # gate → suite, engine → checkpoint, cli → tools


def test_what_exists_twice_is_listed_but_for_pairs_that_belong_together(checkout):
    twice = house(checkout, "--rooms").partition("\nfile names that exist twice\n")[2]
    assert twice.split() == [
        *["load.py:", "gate/load.py,", "suite/load.py", "public", "names", "that", "exist", "twice"],
        *["LIMIT:", "gate/load.py,", "suite/load.py"],
    ]


def test_a_seed_draws_the_same_docstrings_and_comments_again(checkout):
    drawn = house(checkout, "--seed", 1)
    assert drawn == house(checkout, "--seed", 1)
    assert "pytest_qsa/suite/load.py:6\n    LIMIT: How many." in drawn
    assert "pytest_qsa/suite/load.py:2\n    import json  # the standard one is fast enough" in drawn
