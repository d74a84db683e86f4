"""The Python form of a suite, for what YAML cannot say.

`pytest example_suites --qsa-config example_suites/smollm2.qsa.yaml`
"""

import pytest


@pytest.mark.qsa(layers=r"layers\.\d+$", site="output")
def test_outliers_stay_in_the_middle_of_the_network(qsa):
    counts = qsa.output(r"layers\.\d+$").outlier_tokens(threshold=64)
    assert counts <= 1
    assert qsa.output(r"layers\.[0-9]$").outlier_tokens(threshold=64) == 0


@pytest.mark.qsa(layers=r"mlp\.down_proj$", site="input")
def test_down_proj_input_has_not_drifted(qsa, qsa_baseline):
    assert qsa.input(r"mlp\.down_proj$").magnitude("median") == qsa_baseline(rel=0.1)
