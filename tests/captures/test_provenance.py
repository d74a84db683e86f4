"""The provenance of a run keeps its JSON, and says itself in the same words everywhere."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from pytest_qsa.captures.provenance import (
    UNKNOWN_MODEL,
    UNKNOWN_RUN,
    DataProvenance,
    Execution,
    ModelProvenance,
    Provenance,
    since_text,
)

SHA = f"sha256:{'ab12' * 16}"
MODEL = {
    "path": "checkpoints/int8", "class": "LlamaForCausalLM", "dtype": "bfloat16", "device": "cpu",
    "device_class": "cpu", "attention": "sdpa", "versions": {"torch": "2.9", "transformers": "5.0"},
    "tokenizer": "Fast, 49,152 entries, sha256 12", "weights": SHA,
}  # fmt: skip
DATA = {
    "source": "sample", "subset": None, "column": None, "num_samples": 8, "seq_len": 512, "seed": 0,
    "add_special_tokens": True, "fingerprint": SHA,
}  # fmt: skip
EXECUTION = {
    "forward": True, "kinds": {"W8A8 emulated": {"modules": 28, "first": "model.layers.0.mlp.up_proj"}},
    "idle": ["lm_head"], "idle_experts": 1,
}  # fmt: skip
RUNS = {
    "a pass": {"model": MODEL, "data": DATA, "execution": EXECUTION, "unmatched": ["lm_head"], "samples": [0, 2, 8]},
    "a hub id": {"model": {**MODEL, "revision": "0f5a"}},
    "a factory": {"model": {**MODEL, "tokenizer": None, "weights": None}},
    "a fixture": {"model": {**MODEL, "path": ""}, "data": {"source": "fixture", "fingerprint": SHA}},
    "a server": {
        "model": {
            "path": "http://a", "served": "m by vllm", "logprobs": 5, "outside": None, "tail": "as_reference",
            "versions": {}, "weights": None,
        },
        "reference": {"path": "checkpoints/float"},
    },
    "files": {"model": {"path": "a", "files": 2, "tensors": 30, "quantization": "gptq 4"}},
    "evals": {"model": {"path": "a"}, "evals": {"file": "results.json", "version": "1"}},
    "a kept reference": {"model": MODEL, "rows": 4, "kept": "float.qsa"},
    "nothing": {},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_the_json_of_a_run_is_read_and_written_without_a_change(name):
    assert Provenance.of(RUNS[name]).plain() == RUNS[name]
    assert Provenance.of(json.loads(json.dumps(RUNS[name]))) == Provenance.of(RUNS[name])


def test_a_newer_files_keys_are_no_error():
    newer = {"model": {**MODEL, "speed": 3}, "data": {**DATA, "shard": 1}, "weather": "fine"}
    found = Provenance.of(newer)
    assert found.model == ModelProvenance.of(MODEL)
    assert found.data.settings["shard"] == 1


def test_nothing_known_says_nothing():
    assert (UNKNOWN_RUN.plain(), UNKNOWN_RUN.facts(), UNKNOWN_RUN.summary("m"), str(UNKNOWN_MODEL)) == ({}, {}, "", "")
    assert str(DataProvenance()) == ""


def test_a_run_is_summed_up_in_one_line():
    run = Provenance.of({**RUNS["a pass"], "reference": {"path": "checkpoints/float"}})
    assert run.summary("int8") == (
        "int8: checkpoints/int8 (sha256 ab12ab12ab12); LlamaForCausalLM bfloat16 on cpu, executed as W8A8 emulated "
        "(28 modules); 1 module of experts saw no token; against checkpoints/float; "
        "8 × 512 tokens of sample, seed 0 (sha256 ab12ab12ab12)"
    )
    recorded = replace(run, rows=4).summary("int8")
    assert "; against checkpoints/float, recorded with 4 tokens of a sample at each layer; 8 × 512" in recorded
    assert Provenance.of(RUNS["files"]).summary("a") == "a: a; 30 tensors in 2 files, gptq 4; no forward"
    assert Provenance.of(RUNS["a server"]).summary("m") == (
        "m: http://a; m by vllm, 5 logprobs of each position; against checkpoints/float"
    )
    assert Provenance.of(RUNS["a fixture"]).summary("m").endswith("batches of the fixture (sha256 ab12ab12ab12)")


def test_fewer_threads_than_torch_would_take_are_said():
    with_threads = [
        Provenance.of({**RUNS["a pass"], "model": {**MODEL, "threads": text}}).summary("m") for text in ("1 of 2", "2")
    ]
    assert [" on cpu with 1 of 2 threads, " in text for text in with_threads] == [True, False]
    assert "threads" not in with_threads[1]


def test_how_a_model_was_executed_is_said_in_words():
    assert str(Execution(forward=False)) == "nothing, no forward ran"
    assert str(Execution(forward=True)) == "float"


def test_a_baselines_header_leaves_out_the_folders_of_one_machine():
    header = ModelProvenance.of({**MODEL, "path": "/home/me/int8"}).for_baseline()
    assert header == {
        "model": "int8", "weights": SHA, "dtype": "bfloat16", "device": "cpu", "torch": "2.9", "transformers": "5.0",
        "device_class": "cpu", "format": "none",
    }  # fmt: skip
    assert ModelProvenance.of_baseline(header).for_baseline() == header


def test_a_baseline_says_what_is_different_now():
    then = ModelProvenance.of(MODEL)
    now = ModelProvenance.of({**MODEL, "weights": None, "dtype": "float32", "versions": {"torch": "2.9"}})
    made = "changed since the baseline of checkpoints/int8 (sha256 ab12ab12ab12): "
    assert since_text(then, then) == f"{made}weights unchanged; versions, dtype and device unchanged"
    assert since_text(then, now) == f"{made}dtype was bfloat16, is float32; transformers was 5.0, is None"
    other = replace(then, weights=f"sha256:{'cd34' * 16}")
    told = "weights (sha256 ab12ab12ab12 → sha256 cd34cd34cd34); versions, dtype and device unchanged"
    assert since_text(then, other) == made + told
