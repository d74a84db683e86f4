"""Two model versions compared, from captures, baselines or reports: `qsa diff`. No model, no torch."""
