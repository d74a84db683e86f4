"""A gate on a model with a quantized KV cache, and one on what enters the cache."""

from __future__ import annotations

import pytest

from support.projects import suite

pytestmark = pytest.mark.process


def test_a_gate_on_a_quantized_kv_cache_compares_the_model_with_itself_and_has_baselines_of_its_own(own_project, llama):
    own_project.write(
        "gate.qsa.yaml",
        suite(
            f"{llama}, kv_cache: int8_per_token_head, reference: self",
            "id: close, metric: kl_divergence, max: 1",
            "id: not-the-same, metric: kl_divergence, max: 0",
            "id: kept, metric: absmax, layers: self_attn$, site: key, baseline: {rel: 0.1}",
            "id: other-layers, metric: absmax, layers: mlp$, site: key, max: 1",
        ),
    )
    run = own_project.pytest("gate.qsa.yaml", "--snapshot-update", "--qsa-report=never")
    assert run.outcomes["gate.qsa.yaml::close"] == "passed"
    assert run.first_line("gate.qsa.yaml::not-the-same").startswith("REGRESSION not-the-same: logits: ")
    ran = run.labelled("gate.qsa.yaml::not-the-same")["ran"][0]
    assert "its KV cache rounded to int8_per_token_head; against itself without that;" in ran
    assert "no layer matches 'mlp$'" in run.first_line("gate.qsa.yaml::other-layers")
    (kept,) = own_project.folder.rglob("kept.json")
    assert "llama@kv-int8_per_token_head" in kept.parts
