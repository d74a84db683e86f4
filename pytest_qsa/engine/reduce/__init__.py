"""Streaming reductions of tensors: kernels for the CPU and for CUDA, torch's operators as their oracle."""
