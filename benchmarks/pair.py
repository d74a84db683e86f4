"""What a comparison with a reference costs beside the bare forwards of both models: `python benchmarks/pair.py`.

SmolLM2's int8 checkpoint against SmolLM2, and two random Llamas of hidden 2048: the propagated error at the input and
output of every layer, and the divergence of what they predict; then the local error of every linear layer as well.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import SMOLLM2, arguments, medians, smollm2, token_batches, wide_llama
from overhead import bare
from torch import Tensor, nn

from pytest_qsa.captures import (
    AGREEMENT,
    ERROR,
    REFERENCE_SINKS,
    SCORES,
    LocalError,
    PredictionMargins,
    PredictionOverlap,
    Request,
)
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.reference.record import RecordOptions, record_model
from pytest_qsa.engine.reference.reference_file import ReferenceFile
from pytest_qsa.engine.reference.replay import ReplayedReference
from pytest_qsa.engine.run.run_pass import run_pass

NO_SINK = frozenset({ERROR, REFERENCE_SINKS})
PROPAGATED = [
    Request(r"layers\.", "input", None, NO_SINK),
    Request(r"layers\.", "output", None, NO_SINK),
    Request("", "logits", None, frozenset({AGREEMENT, SCORES})),
]
LOCAL = Request("_proj$", "output", None, frozenset({LocalError(32)}))
"""What sqnr, kl_divergence and local_sqnr ask for."""
DECISIONS = Request("", "logits", None, frozenset({PredictionMargins(), PredictionOverlap()}))
"""What margin_ratio, flips and overlap ask for beside."""
KEPT = [Request(r"layers\.\d+$", "output", None, NO_SINK), Request("", "logits", None, frozenset({AGREEMENT, SCORES}))]
"""What is asked of a recorded reference."""


def smollm2_int8() -> nn.Module:
    """Load SmolLM2's int8 checkpoint, whose products compressed-tensors emulates in floats."""
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(SMOLLM2.with_name("smollm2-int8"), dtype=torch.bfloat16)
    return model


def noisy(model: nn.Module) -> nn.Module:
    """Copy a model, each weight rounded to 8 bits a row."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                scale = parameter.abs().amax(1, keepdim=True) / 127
                parameter.copy_((parameter / scale).round() * scale)
    return other


def cases_of(model: nn.Module, reference: nn.Module, batches: list[Tensor]) -> dict[str, Callable[[], object]]:
    """Return the forwards of both models, and their comparisons."""
    for side in (model, reference):
        side.config.use_cache = False  # type: ignore[union-attr]

    def compared(requests: list[Request]) -> Callable[[], object]:
        return lambda: run_pass(model, batches, requests, [LiveReference(reference)])

    return {
        "model": bare(model, batches),
        "reference": bare(reference, batches),
        "propagated": compared(PROPAGATED),
        "local": compared([*PROPAGATED, LOCAL]),
        "decisions": compared([*PROPAGATED, DECISIONS]),
    }


def kept_cases(
    model: nn.Module, reference: nn.Module, batches: list[Tensor], folder: Path
) -> dict[str, Callable[[], object]]:
    """Return the model's forward, what its comparison with a recorded reference adds at least, and that comparison.

    At least: the reference's head over the hidden states that were recorded, and the softmax of both logits.
    """
    file = folder / "reference.qsa"
    file.write_bytes(record_model(reference, batches, KEPT, RecordOptions(with_head=True)).content.to_bytes())
    with torch.no_grad():
        states = [reference.model(batch).last_hidden_state for batch in batches]  # type: ignore[operator]

    def head() -> None:
        with torch.no_grad():
            for state in states:
                torch.log_softmax(reference.lm_head(state).float(), -1)  # type: ignore[operator]

    def replayed() -> object:
        return run_pass(model, batches, KEPT, [ReplayedReference(ReferenceFile.open(file), torch.device("cpu"))])

    return {"model": bare(model, batches), "head and softmax": head, "kept": replayed}


def measure(name: str, model: nn.Module, reference: nn.Module, batches: list[Tensor], repeats: int) -> None:
    """Print the ratios for one pair."""
    taken = medians(cases_of(model, reference, batches), repeats)
    both = taken["model"] + taken["reference"]
    print(f"{name:<14} bare forwards: model {taken['model']:.2f} s, reference {taken['reference']:.2f} s")
    for case, text in (
        ("propagated", "every site and KL"),
        ("local", "the linears' outputs, their local error and KL"),
    ):
        print(f"{name:<14} {text:<48} ÷ both bare forwards: {taken[case] / both:.3f}", flush=True)
    added = taken["decisions"] / taken["propagated"] - 1
    print(f"{name:<14} margins and overlap beside every site and KL: {added:+.1%} of the pair's time")
    with tempfile.TemporaryDirectory() as folder:
        taken = medians(kept_cases(model, reference, batches, Path(folder)), repeats)
    least = taken["model"] + taken["head and softmax"]
    text = "KL, sqnr of recorded rows of the blocks"
    print(f"{name:<14} {text:<48} ÷ its forward, a head and its softmax: {taken['kept'] / least:.3f}", flush=True)


def main() -> None:
    """Measure both pairs."""
    options = arguments(__doc__ or "")
    batches = token_batches(options.samples, options.seq_len)
    measure("SmolLM2, int8", smollm2_int8(), smollm2(), batches, options.repeats)
    wide = wide_llama()
    measure("Llama 2048×4", noisy(wide), wide, [batch % 32000 for batch in batches], options.repeats)


if __name__ == "__main__":
    main()
