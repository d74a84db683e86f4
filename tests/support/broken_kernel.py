"""Stands before vLLM's program: multiplies the output of one linear layer of vLLM by a factor, as a wrong kernel would.

`python broken_kernel.py LAYER FACTOR` makes the interpreter of such an environment, a script that `--qsa-vllm-python`
can name; the script calls this file again.
"""

import os
import runpy
import sys
from pathlib import Path


def interpreter(folder, python, layer, factor):
    """Write a program that stands for an interpreter in whose vLLM a layer is multiplied by a factor."""
    script = Path(folder) / "broken-python"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = -I ]; then exec {python} "$@"; fi\nexec {python} -P {__file__} {layer} {factor} "$@"\n'
    )
    script.chmod(0o755)
    return script


def _break(layer, factor):
    from vllm.model_executor.layers import linear

    def broken(kind):
        forward = kind.forward

        def multiplied(self, *args, **kwargs):
            output = forward(self, *args, **kwargs)
            if self.prefix != layer:
                return output
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        kind.forward = multiplied

    for kind in (linear.RowParallelLinear, linear.ColumnParallelLinear):
        broken(kind)


if __name__ == "__main__":
    _, layer, factor, _, _, module, job = sys.argv  # -P -m MODULE JOB
    sys.path.insert(0, os.environ["PYTHONPATH"])
    _break(layer, float(factor))
    sys.argv = [module, job]
    runpy.run_module(module, run_name="__main__")
