"""Capture → one number per layer: the registry of metrics, `Series` and `Selection`. numpy only."""
