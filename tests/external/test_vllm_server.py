"""A model that a real vLLM serves, as docs/served.md has it: `make test-vllm` names its interpreter."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest

from pytest_qsa import engine
from pytest_qsa.captures import AGREEMENT, SCORES, Request
from pytest_qsa.common import InfraError
from pytest_qsa.external import capture_served
from pytest_qsa.suite import Data, Memory, Model, Served, Subject
from support.checkpoints import save_llama

PYTHON = os.environ.get("QSA_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.process,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: `make test-vllm` makes its environment"),
]
VOCABULARY, TOKENS = 320, 24
PREDICTIONS = [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1", "VLLM_HOST_IP": "127.0.0.1", "TORCH_COMPILE_DISABLE": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("checkpoints") / "wide", width=128)


@pytest.fixture(scope="module")
def address(wide_llama, tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = f"--host 127.0.0.1 --port {port} --served-model-name small --enforce-eager --dtype float32"
    limits = f"--max-model-len 128 --max-num-seqs 4 --max-logprobs {VOCABULARY} --no-enable-prefix-caching"
    # Not `vllm serve`, which asks for a distribution of the name vllm.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(wide_llama)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ENVIRONMENT
    with (tmp_path_factory.mktemp("log") / "log.txt").open("w+") as log:
        server = subprocess.Popen(
            [*command, *words.split(), *limits.split()], stdout=log, stderr=log, env=environment, start_new_session=True
        )
        try:
            yield _ready(f"http://127.0.0.1:{port}", server, log)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _ready(url, server, log):
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return f"{url}/v1"
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    raise AssertionError(log.read()[-3000:])


def subject(address, top, reference, tmp_path):
    model = Model(served=Served(url=address, top_logprobs=top), reference=str(reference))
    return Subject("served", model, Data(num_samples=2, seq_len=TOKENS), Memory(), tmp_path)


def test_a_server_that_tells_all_logprobs_has_the_numbers_of_the_checkpoint(address, wide_llama, tmp_path):
    exact = capture_served(subject(address, VOCABULARY, wide_llama, tmp_path), PREDICTIONS)
    local = Subject("local", Model(path=str(wide_llama)), Data(num_samples=2, seq_len=TOKENS), Memory(), tmp_path)
    own = engine.capture_subject(local, [Request("", "logits", None, frozenset({SCORES}))])
    scores = exact.sites["logits", "logits"].scores
    np.testing.assert_allclose(scores[:, 0], own.sites["logits", "logits"].scores[:, 0], rtol=1e-3, atol=1e-4)
    assert np.nanmax(abs(scores[:, 2])) < 1e-4


ASK = """
import json, sys
from pathlib import Path
from pytest_qsa.captures import AGREEMENT, SCORES, Request
from pytest_qsa.external import bounded, capture_served
from pytest_qsa.suite import Data, Memory, Model, Served, Subject
url, reference, tokens = sys.argv[1:]
model = Model(served=Served(url=url, top_logprobs=20), reference=reference)
subject = Subject("served", model, Data(num_samples=2, seq_len=int(tokens)), Memory(), Path.cwd())
asked = capture_served(subject, [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))])
print(json.dumps([each.sites["logits", "logits"].scores.tolist() for each in bounded(asked)]))
"""


def test_gates_that_ask_at_once_get_the_same_bounds(address, wide_llama, tmp_path):
    # Processes, for threads that load models at once leave transformers without tied weights.
    command = [sys.executable, "-c", ASK, address, str(wide_llama), str(TOKENS)]
    asking = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    every = [json.loads(each.communicate()[0].splitlines()[-1]) for each in asking]
    for bounds in every:
        np.testing.assert_allclose(np.array(bounds), np.array(every[0]), rtol=1e-3, atol=1e-4)


def test_more_logprobs_than_the_server_tells_is_said_in_its_words(address, wide_llama, tmp_path):
    with pytest.raises(InfraError, match=r"answered 400: .*max allowed"):
        capture_served(subject(address, VOCABULARY + 1, wide_llama, tmp_path), PREDICTIONS)
