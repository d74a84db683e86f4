"""Plots of a capture and of a verdict. matplotlib's object interface and Agg only."""
