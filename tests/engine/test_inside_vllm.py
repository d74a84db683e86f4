"""Captures inside a real vLLM: `make test-vllm` names its interpreter. In float32 its numbers are transformers'."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest

from pytest_qsa import engine
from pytest_qsa.captures import (
    AGREEMENT,
    ALL_STATISTICS,
    DRAFTS,
    ERROR,
    MOMENTS,
    OTHER_ENGINE,
    OTHER_PREDICTIONS,
    SCORES,
    TOKENS,
    Request,
)
from pytest_qsa.common import InfraError, VllmWords
from pytest_qsa.suite import Data, Memory, Model, Subject
from support.broken_kernel import interpreter
from support.checkpoints import save_glm_with_mtp, save_llama, save_moe, save_quantized_llama
from support.paths import ROOT

PYTHON = os.environ.get("QSA_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.process,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: `make test-vllm` makes its environment"),
]
BLOCKS, LINEARS, NORMS = r"layers\.\d+$", "_proj$", r"layernorm$|model\.norm$|mlp$|self_attn$"
SITES = [(BLOCKS, "input"), (BLOCKS, "output"), (LINEARS, "input"), (LINEARS, "output"), (NORMS, "input"),
         (NORMS, "output"), (r"embed_tokens$", "output")]  # fmt: skip
REQUESTS = [Request(pattern, site, None, ALL_STATISTICS) for pattern, site in SITES]


def subject(folder, tmp_path, tokens=40, samples=5, **engine_settings):
    settings = {"name": "vllm", "dtype": "float32", **engine_settings}
    return Subject(
        "subject",
        Model(path=str(folder), engine=settings),
        Data(num_samples=samples, seq_len=tokens),
        Memory(),
        tmp_path,
    )


def by_transformers(subject):
    return replace(subject, model=subject.model.model_copy(update={"engine": Model(path="x").engine}))


@pytest.fixture(scope="module")
def wide_llama(tmp_path_factory):
    """Return a small Llama whose heads are wide enough for vLLM's attention on a CPU."""
    return save_llama(tmp_path_factory.mktemp("checkpoints") / "wide", width=128)


@pytest.fixture(scope="module")
def expected(wide_llama, tmp_path_factory):
    return engine.capture_subject(by_transformers(subject(wide_llama, tmp_path_factory.mktemp("x"))), REQUESTS)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_num_batched_tokens": 32},
        {"tensor_parallel_size": 2, "max_num_batched_tokens": 48},
        {"pipeline_parallel_size": 2, "max_num_batched_tokens": 48},
    ],
    ids=["packed", "chunked", "tensor-parallel", "pipeline"],
)
def test_every_site_has_the_numbers_of_transformers(wide_llama, expected, tmp_path, settings):
    found = engine.capture_subject(subject(wide_llama, tmp_path, **settings), REQUESTS)
    assert set(found.sites) == set(expected.sites)
    assert found.modules == expected.modules
    assert [ids.tolist() for ids in found.tokens] == [ids.tolist() for ids in expected.tokens]
    for site, theirs in expected.sites.items():
        own = found.sites[site]
        np.testing.assert_allclose(own.token_max, theirs.token_max, rtol=2e-3, err_msg=str(site))
        np.testing.assert_allclose(own.moment("m2"), theirs.moment("m2"), rtol=2e-3, err_msg=str(site))
        np.testing.assert_allclose(own.channel_max, theirs.channel_max, rtol=2e-3, err_msg=str(site))
        assert own.sample.tolist() == theirs.sample.tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_experts_have_the_numbers_of_transformers(tmp_path, ranks):
    folder = save_moe(tmp_path / "moe", width=128)
    patterns = [*SITES[:2], *((r"mlp(\.experts|\.gate)?$", site) for site in ("input", "output"))]
    requests = [Request(pattern, site, None, frozenset({MOMENTS, TOKENS})) for pattern, site in patterns]
    requests.append(Request("", "logits", None, frozenset({SCORES})))
    own = subject(folder, tmp_path, tensor_parallel_size=ranks)
    found, theirs = (engine.capture_subject(each, requests) for each in (own, by_transformers(own)))
    assert len(found.sites) == len(theirs.sites) == 17
    for site, known in theirs.sites.items():
        if site[1] != "logits":
            np.testing.assert_allclose(found.sites[site].token_max, known.token_max, rtol=1e-4, err_msg=str(site))
            np.testing.assert_allclose(found.sites[site].moment("m2"), known.moment("m2"), rtol=1e-4, err_msg=str(site))
    np.testing.assert_allclose(found.logits().perplexity().values, theirs.logits().perplexity().values, rtol=1e-5)


def test_predictions_are_those_of_transformers(wide_llama, changed_wide_llama, tmp_path):
    served = subject(wide_llama, tmp_path)
    served = replace(served, model=served.model.model_copy(update={"reference": str(changed_wide_llama)}))
    requests = [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))]
    own = engine.capture_subject(served, requests).sites["logits", "logits"].scores
    theirs = engine.capture_subject(by_transformers(served), requests).sites["logits", "logits"].scores
    np.testing.assert_allclose(own[:, :3], theirs[:, :3], rtol=1e-3, atol=1e-4)


def test_the_error_of_recorded_tokens_is_that_of_transformers(wide_llama, changed_wide_llama, tmp_path):
    original = subject(wide_llama, tmp_path).named
    requests = [Request(pattern, "output", None, frozenset({ERROR})) for pattern in (BLOCKS, LINEARS)]
    content = engine.record_reference(by_transformers(original), requests, engine.RecordOptions(rows=6), tmp_path / "x")
    (tmp_path / "original.qsa").write_bytes(content.content.to_bytes())
    served = subject(changed_wide_llama, tmp_path, max_num_batched_tokens=32)
    served = replace(served, model=served.model.model_copy(update={"reference": "original.qsa"}))
    own, theirs = (engine.capture_subject(each, requests) for each in (served, by_transformers(served)))
    for pattern in (BLOCKS, LINEARS):
        found, expected = (each.select(pattern, "output").sqnr() for each in (own, theirs))
        np.testing.assert_allclose(found.values, expected.values, atol=0.05)
        assert {count for *_, count in found.intervals.values()} == {30}


@pytest.fixture(scope="module")
def changed_wide_llama(tmp_path_factory):
    def change(weights):
        weights["model.layers.2.mlp.down_proj.weight"] *= 3

    return save_llama(tmp_path_factory.mktemp("checkpoints") / "changed", change, width=128)


def test_int8_runs_by_vllms_kernel_and_says_which(wide_llama, tmp_path):
    folder = save_quantized_llama(tmp_path / "int8", wide_llama, "W8A8")
    own = subject(folder, tmp_path, dtype="bfloat16")
    found = engine.capture_subject(own, REQUESTS[:4])
    [(words, kind)] = found.provenance.execution.kinds.items()
    assert words.startswith("W8A8 by kernels: CompressedTensorsW8A8Int8/")
    assert kind.modules == 28
    theirs = engine.capture_subject(by_transformers(own), REQUESTS[:4])
    for site in theirs.sites:
        ratio = found.sites[site].moment("m2").sum() / theirs.sites[site].moment("m2").sum()
        assert abs(np.log(ratio)) < 0.1, site


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_quantized_head_predicts_as_vllms_kernel_runs_it(wide_llama, tmp_path, ranks):
    folder = save_quantized_llama(tmp_path / "int8", wide_llama, "W8A8", head=True)
    own = subject(folder, tmp_path, dtype="bfloat16", tensor_parallel_size=ranks, max_num_batched_tokens=48)
    own = replace(own, model=own.model.model_copy(update={"reference": str(wide_llama), "dtype": "bfloat16"}))
    requests = [Request("", "logits", None, frozenset({SCORES, AGREEMENT}))]
    found, theirs = (engine.capture_subject(each, requests) for each in (own, by_transformers(own)))
    [kind] = found.provenance.execution.kinds.values()
    assert kind.modules == 29
    own_scores, scores = (each.sites["logits", "logits"].scores for each in (found, theirs))
    np.testing.assert_allclose(np.nanmean(own_scores[:, 0]), np.nanmean(scores[:, 0]), atol=0.1)
    np.testing.assert_allclose(np.nanmean(own_scores[:, 2]), np.nanmean(scores[:, 2]), rtol=0.3)


def test_drafts_of_a_checkpoints_own_head_are_counted(tmp_path):
    own = subject(save_glm_with_mtp(tmp_path / "glm"), tmp_path, dtype="bfloat16")
    found = engine.capture_subject(own, [Request("", "logits", None, frozenset({DRAFTS})), REQUESTS[1]])
    drafts = found.sites["logits", "logits"].arrays["drafts"]
    assert drafts.shape == (5, 2)
    assert (drafts[:, 0] >= 15).all()  # 32 tokens, of which a draft gives one more at best
    assert (drafts[:, 1] <= drafts[:, 0]).all()
    assert 0 <= found.logits().mtp_acceptance().values[0] <= 1


def test_a_checkpoint_without_such_a_head_is_told_in_vllms_words(wide_llama, tmp_path):
    with pytest.raises(InfraError, match=r"vLLM can't run the checkpoint: .*Unsupported speculative method: 'mtp'"):
        engine.capture_subject(subject(wide_llama, tmp_path), [Request("", "logits", None, frozenset({DRAFTS}))])


@pytest.mark.real_model
def test_smollm2_has_the_outliers_of_transformers(tmp_path):
    own = subject(ROOT / ".demo" / "smollm2", tmp_path, tokens=128, samples=4, dtype="auto")
    found, theirs = (engine.capture_subject(each, REQUESTS[:4]) for each in (own, by_transformers(own)))
    for pattern, site in SITES[:4]:
        counts, known = (each.select(pattern, site).outlier_tokens().values for each in (found, theirs))
        assert sum(map(np.not_equal, counts, known)) <= 0.01 * len(known)
        rms, known = (np.array(each.select(pattern, site).rms().values) for each in (found, theirs))
        assert np.median(abs(rms / known - 1)) < 0.02


def test_a_wrong_kernel_is_found_and_a_wrong_file_is_not_one(wide_llama, changed_wide_llama, tmp_path):
    requests = [Request(LINEARS, "output", None, frozenset({MOMENTS, TOKENS, OTHER_ENGINE}))]
    broken = interpreter(tmp_path, PYTHON, "model.layers.1.mlp.down_proj", 1.1)
    own = replace(subject(wide_llama, tmp_path), vllm=VllmWords(str(broken)))
    requests = [*requests, Request("", "logits", None, frozenset({SCORES, OTHER_PREDICTIONS}))]
    found = engine.capture_subject(own, requests)
    gaps = found.select(LINEARS, "output").engine_gap()
    worst = gaps.layers[int(np.argmax(gaps.values))]
    assert worst == "model.layers.1.mlp.down_proj"
    assert max(gaps.values) > 6
    assert found.logits().engine_gap(stat="kl").values[0] > 6
    of_files = engine.capture_subject(subject(changed_wide_llama, tmp_path), requests)
    assert of_files.logits().engine_gap(stat="kl").values[0] < 0.1
    assert max(of_files.select(LINEARS, "output").engine_gap().values) < 6


def test_a_killed_worker_is_infra_and_leaves_no_process(wide_llama, tmp_path):
    own = subject(wide_llama, tmp_path, tensor_parallel_size=2)
    before = {each.pid for each in psutil.Process().children(recursive=True)}
    started = []

    def kill():
        while len(started) < 3:  # the program, and the two workers that it starts
            started[:] = [p for p in psutil.Process().children(recursive=True) if p.pid not in before]
            time.sleep(0.2)
        started[-1].kill()

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(InfraError, match="vLLM"):
        engine.capture_subject(own, REQUESTS[:1])
    assert [p for p in started if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 1_000_000}, "max_model_len"),
        ({"quantization": "awq"}, "vLLM can't run the checkpoint: .*config file for awq$"),
        ({"timeout": 1.0}, "vLLM took longer than model.engine.timeout, 1 s"),
    ],
    ids=["too-long", "another-quantization", "timeout"],
)
def test_what_vllm_refuses_is_said_in_its_own_words(wide_llama, tmp_path, settings, message):
    with pytest.raises(InfraError, match=message):
        engine.capture_subject(subject(wide_llama, tmp_path, **settings), REQUESTS[:1])


def test_a_kv_cache_that_is_too_small_is_told_in_vllms_words(wide_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    long = shutil.copytree(wide_llama, tmp_path / "long")
    settings = json.loads((long / "config.json").read_text()) | {"max_position_embeddings": 1_200_000}
    (long / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InfraError, match="larger than the available KV cache memory"):
        engine.capture_subject(subject(long, tmp_path, max_model_len=1_200_000), REQUESTS[:1])
    assert not [p for p in psutil.Process().children(recursive=True) if "vllm" in " ".join(p.cmdline()).lower()]
