"""The pass inside vLLM: a process of its own interpreter, hooks in its workers, and the capture of what they saw."""
