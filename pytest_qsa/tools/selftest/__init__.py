"""Mutation testing of a gate: faults put into lazy copies of a checkpoint, and what the suite says of each."""
