"""Does the list of `qsa rank` lose less than chance? SmolLM2 in 4 bits, on windows that the ranking has not seen.

The first half of the shipped text ranks the units of a W4A16 checkpoint (round to nearest, groups of 64); what they say
to keep within a budget of bits is held against random sets of the same budget on the second half. A line of JSON a
measurement is appended to the file in `--work`, so that a later start goes on where an earlier one ended.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from common import ROOT, SMOLLM2
from requantizations import SCHEMES, nearest, original, write

from pytest_qsa import checkpoint, engine, metrics, suite, tools
from pytest_qsa.metrics import LEAST_WINDOWS
from pytest_qsa.tools.rank import Ranked, Ranking, estimated, mean_of


def subject_of(checkpoint: Path, text: Path, windows: int, tokens: int) -> suite.NamedSubject:
    """Return the checkpoint with SmolLM2 as its reference and windows of a text as its data."""
    model = suite.Model(path=str(checkpoint), reference=str(SMOLLM2))
    data = suite.Data(source=f"custom:{text}", num_samples=windows, seq_len=tokens)
    return suite.Subject("smollm2", model, data, suite.Memory(), ROOT).named


def texts(work: Path) -> tuple[Path, Path]:
    """Write the halves of the shipped text; return their files."""
    text = resources.files("pytest_qsa.suite.data").joinpath("sample.txt").read_text(encoding="utf-8")
    half = text.index("\n", len(text) // 2)
    paths = work / "ranking.txt", work / "held-out.txt"
    for path, part in zip(paths, (text[:half], text[half:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return paths


class Results:
    """What was measured so far: a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.found: dict[str, Any] = dict(map(json.loads, lines))

    def add(self, name: str, value: Any) -> None:
        """Keep a measurement."""
        self.found[name] = value
        with self._path.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps([name, value])}\n")


def ranking_of(results: Results, subject: suite.NamedSubject, quantized: tools.QuantizedUnits) -> Ranking:
    """Measure the units that aren't known yet, and return the ranking."""
    units = quantized.layers
    left = {name: layers for name, layers in units.items() if name not in results.found}
    if left or "whole" not in results.found or "errors" not in results.found:
        with engine.substitution_of(subject, quantized.weight) as measured:
            if "whole" not in results.found:
                results.add("whole", vars(mean_of(measured.together(quantized.modules))))
                results.add("errors", measured.local_errors(units))
            for name, windows in measured.alone(left):
                results.add(name, vars(mean_of(windows)))
    known = {name: metrics.Estimate(**results.found[name]) for name in (*units, "whole")}
    return ranking_by({name: known[name].value for name in units}, known, quantized)


def ranking_by(
    values: Mapping[str, float], known: Mapping[str, metrics.Estimate], quantized: tools.QuantizedUnits
) -> Ranking:
    """Return the units by the KL divergence of each; a measured one has its interval."""
    ranked = [
        Ranked(quantized.units[name], known.get(name, metrics.Estimate(value, math.nan, math.nan, 0)))
        for name, value in values.items()
    ]
    return Ranking(sorted(ranked, key=lambda each: -each.saved), known["whole"], LEAST_WINDOWS)


def few_measured(results: Results, names: Sequence[str]) -> dict[str, float]:
    """Return the KL divergences where the first, middle and last unit of a kind are measured, the others estimated."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(checkpoint.kind_of(name), []).append(name)
    chosen = [name for own in kinds.values() for name in (own[0], own[len(own) // 2], own[-1])]
    known = {name: results.found[name]["value"] for name in chosen}
    return {**known, **estimated(list(names), known, results.found["errors"])}


def chance(ranking: Ranking, bits: float, seed: int) -> list[tools.Unit]:
    """Return a random set of the same budget: units in a random order, those that still fit."""
    order = list(ranking.ranked)
    random.Random(seed).shuffle(order)
    return Ranking(order, ranking.whole, 0).within_bits(bits)


def main() -> None:
    """Print what is left of the KL divergence by the list and by chance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("rank-work"))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--bits", type=float, default=5.0)
    parser.add_argument("--sets", type=int, default=100)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    folder = options.work / "w4a16"
    if not folder.exists():
        scheme = next(scheme for scheme in SCHEMES if scheme.name == "w4a16")
        write(folder, scheme, original(), lambda _, weight: nearest(weight, scheme))
    ranking_text, held_out = texts(options.work)
    results = Results(options.work / f"{options.windows}x{options.tokens}.jsonl")
    subject = subject_of(folder, ranking_text, options.windows, options.tokens)
    assert isinstance(subject.reference, suite.NamedSubject)
    names = engine.layer_names(subject.reference.model, subject.reference.path, subject.memory, allow_code=False).all
    quantized = tools.QuantizedUnits(suite.files_of(subject), names)
    ranking = ranking_of(results, subject, quantized)
    values = few_measured(results, list(quantized.units))
    by_few = ranking_by(values, {"whole": ranking.whole}, quantized)
    few, bits = "3 of 30 measured", options.bits
    sets = {"none": [], "ranked": ranking.within_bits(bits), few: by_few.within_bits(bits)}
    sets |= {f"chance {seed}": chance(ranking, bits, seed) for seed in range(options.sets)}
    left = {name: kept for name, kept in sets.items() if f"{bits:g} {name}" not in results.found}
    if left:
        other = subject_of(folder, held_out, options.windows, options.tokens)
        with engine.substitution_of(other, cache(quantized.weight)) as measured:
            for name, kept in left.items():
                kept_layers = {layer for unit in kept for layer in unit.layers}
                kl = mean_of(measured.together([layer for layer in quantized.modules if layer not in kept_layers]))
                results.add(f"{bits:g} {name}", vars(kl))
                print(f"{name}: {kl.value:.4f} at {ranking.bits(kept):.3f} bits", flush=True)
    print(*tools.ranking_lines(ranking, 20), sep="\n")
    kls = {name: results.found[f"{bits:g} {name}"]["value"] for name in sets}
    by_chance = sorted(value for name, value in kls.items() if name.startswith("chance"))
    for name in ("none", "ranked", few):
        worse = f"below {sum(value > kls[name] for value in by_chance)} of {len(by_chance)} by chance"
        print(f"{name}: KL {kls[name]:.4f} at {ranking.bits(sets[name]):.3f} bits, {worse}")
    print(f"by chance: {by_chance[0]:.4f} … {by_chance[len(by_chance) // 2]:.4f} … {by_chance[-1]:.4f}")


if __name__ == "__main__":
    main()
