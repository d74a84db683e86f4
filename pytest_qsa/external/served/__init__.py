"""Served models as evidence: the log-probabilities of a prompt that an endpoint or a file tells."""
