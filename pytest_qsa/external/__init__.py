"""Evals as evidence: what another program has measured, read from its file. Neither torch nor a model."""
