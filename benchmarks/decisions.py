"""What is left of SmolLM2's decisions at fewer bits: round to nearest in groups of 64, the head kept.

`python benchmarks/decisions.py`; the last row is the int8 checkpoint of `make demo`.
"""

from __future__ import annotations

import copy

import torch
from common import ROOT, smollm2
from transformers import AutoModelForCausalLM

import pytest_qsa
from pytest_qsa.engine import tokenizer_at, windows
from pytest_qsa.suite import Data, Memory, Model, Subject

GROUP = 64
STATISTICS = ["kl_divergence", "margin_ratio", "overlap"]


def rounded(model: torch.nn.Module, bits: int) -> torch.nn.Module:
    """Return a copy whose linear layers in the blocks are rounded to nearest, symmetric, a scale a group of inputs."""
    copied = copy.deepcopy(model)
    most = 2 ** (bits - 1) - 1
    with torch.no_grad():
        for module in copied.get_submodule("model.layers").modules():
            if isinstance(module, torch.nn.Linear):
                groups = module.weight.float().view(len(module.weight), -1, GROUP)
                scale = groups.abs().amax(2, keepdim=True) / most
                codes = (groups / scale).round().clamp(-most - 1, most)
                module.weight.copy_((codes * scale).flatten(1))
    return copied


def main() -> None:
    """Print a row for each number of bits."""
    folder = ROOT / ".demo" / "smollm2"
    reference = smollm2()
    data = Data(num_samples=16, seq_len=128)
    subject = Subject("smollm2", Model(path=str(folder)), data, Memory(), ROOT)
    tokenizer = tokenizer_at(str(folder))
    assert tokenizer is not None
    batches = [torch.tensor([ids]) for ids in windows(subject, tokenizer)]
    int8 = AutoModelForCausalLM.from_pretrained(f"{folder}-int8", dtype=torch.bfloat16)
    models = {f"{bits} bits, groups of {GROUP}": rounded(reference, bits) for bits in (8, 4, 3, 2)} | {"W8A8": int8}
    print("| SmolLM2 | `margin_ratio` | `flips` | `flips` from 2 | `overlap` | KL |")
    print("|---|---|---|---|---|---|")
    for name, model in models.items():
        logits = pytest_qsa.capture(
            model, batches, sites=[("", "logits")], statistics=STATISTICS, reference=reference
        ).logits()
        columns = (
            f"{logits.margin_ratio().values[0]:.3f}", f"{logits.flips().values[0]:.1%}",
            f"{logits.flips(margin_from=2.0).values[0]:.1%}", f"{logits.overlap().values[0]:.3f}",
            f"{logits.kl_divergence().values[0]:.4f}",
        )  # fmt: skip
        print(f"| {name} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
