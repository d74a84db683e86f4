"""A quant that KL divergence and perplexity pass and that has lost its stop token: SmolLM2 in W8A16, one head row off.

`python benchmarks/broken_boundary.py [--factor 0.9] [--work FOLDER]`. The healthy quant and the broken one differ in
one row of the untied head, that of the token that ends an answer. The reference's answers are kept in FOLDER.
`--generation` prints what `generation` says of both, and of the int8 checkpoint of `make demo`, instead.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import ROOT, smollm2
from decisions import GROUP, rounded

import pytest_qsa
from pytest_qsa import AnomalyError
from pytest_qsa.captures import GENERATION, LOGITS, Capture
from pytest_qsa.engine import Loaded, load_model, loaded_from_fixture, tokenizer_at, windows
from pytest_qsa.engine.load.answers import answer_batches, batched, eos_of, unbatched
from pytest_qsa.engine.load.generation import Prompts
from pytest_qsa.metrics import answered
from pytest_qsa.suite import Data, Memory, Model, Subject

PROMPTS, MOST = 87, 64
STATISTICS = ["kl_divergence", "ln_ppl_ratio", "margin_ratio", "boundary_tokens"]
OF_ANSWERS = ("ended", "length_ratio", "repetition", "valid_json", "markup_kept", "diverged_at")


def broken(model: torch.nn.Module, token: int, factor: float) -> torch.nn.Module:
    """Return a copy whose head is untied and has one row times a factor."""
    copied: Any = copy.deepcopy(model)
    copied.lm_head.weight = torch.nn.Parameter(copied.lm_head.weight.detach().clone())
    with torch.no_grad():
        copied.lm_head.weight[token] *= factor
    made: torch.nn.Module = copied
    return made


def print_generation(reference: Any, factor: float, work: Path) -> None:
    """Print a row of `generation` for each quant, with the processor's time that its answers took."""
    folder = ROOT / ".demo" / "smollm2"
    tokenizer = tokenizer_at(str(folder))
    prompts = Prompts.of(Subject("smollm2", Model(path=str(folder)), Data(), Memory(), ROOT))
    healthy = rounded(reference, 8)
    quants: dict[str, Callable[[], Loaded]] = {
        "W8A16": lambda: loaded_from_fixture(healthy, tokenizer),
        f"W8A16, head row × {factor:g}": lambda: loaded_from_fixture(
            broken(healthy, eos_of(reference)[0], factor), tokenizer
        ),
        "int8, of `make demo`": lambda: load_model(
            Model(path=f"{folder}-int8"), f"{folder}-int8", Memory(), allow_code=False
        ),
    }
    began = time.process_time()
    theirs = prompts.answers_by(loaded_from_fixture(reference, tokenizer), "the reference")
    ends = sum(answer.ended for answer in theirs)
    print(f"the reference: {ends} of {len(theirs)} answers end; {time.process_time() - began:.0f} s", flush=True)
    print(f"| quant | {' | '.join(OF_ANSWERS)} | processor's time |", flush=True)
    print(f"|{'---|' * (len(OF_ANSWERS) + 2)}")
    for name, load in quants.items():
        began, loaded = time.process_time(), load()
        numbers = answered(prompts.answers_by(loaded, name), theirs)
        took = time.process_time() - began
        capture = Capture({(GENERATION, LOGITS): numbers})
        capture.save(work / f"{len(list(work.glob('*.qsa')))}.qsa")
        cells = []
        for stat in OF_ANSWERS:
            try:
                series = capture.logits().series("generation", stat=stat)
                low, high, count = series.intervals[GENERATION]
                cells.append(f"{series.values[0]:.2f} ({low:.2f} … {high:.2f}, of {count})")
            except AnomalyError as error:
                cells.append(str(error).partition(",")[0])
        print(f"| {name} | {' | '.join(cells)} | {took:.0f} s |", flush=True)


def main() -> None:
    """Print a row for each quant and each text."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=0.9)
    parser.add_argument("--work", type=Path, default=Path("broken-boundary"))
    parser.add_argument("--generation", action="store_true")
    given = parser.parse_args()
    folder, reference = ROOT / ".demo" / "smollm2", smollm2()
    tokenizer = tokenizer_at(str(folder))
    assert tokenizer is not None
    given.work.mkdir(parents=True, exist_ok=True)
    if given.generation:
        print_generation(reference, given.factor, given.work)
        return
    kept = given.work / "answers.json"
    if not kept.exists():
        wanted = {"source": "prompts", "num_samples": PROMPTS, "seq_len": 512, "answers": {"max_new_tokens": MOST}}
        data = Data.model_validate(wanted)
        made = answer_batches(data, tokenizer, ROOT, loaded_from_fixture(reference, tokenizer), "SmolLM2")
        kept.write_text(json.dumps(unbatched(made)))
    subject = Subject("smollm2", Model(path=str(folder)), Data(num_samples=16, seq_len=128), Memory(), ROOT)
    texts: dict[str, list[Any]] = {
        "sample, 16 × 128": [torch.tensor([ids]) for ids in windows(subject, tokenizer)],
        f"its own answers to {PROMPTS} prompts": batched(json.loads(kept.read_text()), 1),
    }
    healthy = rounded(reference, 8)
    quants = {"healthy": healthy, f"head row × {given.factor:g}": broken(healthy, eos_of(reference)[0], given.factor)}
    print(f"| W8A16, groups of {GROUP} | text | KL | perplexity ÷ | `margin_ratio` | recall | missed | spurious |")
    print("|---|---|---|---|---|---|---|---|")
    for quant, model in quants.items():
        for text, batches in texts.items():
            logits = pytest_qsa.capture(
                model, batches, sites=[("", "logits")], statistics=STATISTICS, reference=reference, tokenizer=tokenizer
            ).logits()
            columns = [
                f"{logits.kl_divergence().values[0]:.4f}", f"{logits.ln_ppl_ratio().values[0]:.4f} (ln)",
                f"{logits.margin_ratio().values[0]:.3f}",
            ]  # fmt: skip
            for stat in ("recall", "missed", "spurious"):
                try:
                    columns.append(f"{logits.boundary_tokens(stat).values[0]:.3f}")
                except pytest_qsa.AnomalyError:
                    columns.append("too few")
            print(f"| {quant} | {text} | {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
