"""A model larger than memory, read block by block."""
