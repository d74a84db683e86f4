"""How a gate's cost grows, and the model of cost that `--qsa-plan` computes with.

`python benchmarks/growth.py --folder DIR` measures small random Llamas in bfloat16, one axis at a time: samples, tokens
of a sample, layers, hidden size and vocabulary. Each shape runs a forward, the usual suite, every site, and a pair with
KL divergence and local errors; then a gate is judged by more and more assertions, and a capture is merged from the
parts of more and more ranks. Processor seconds of one thread, medians of `--repeats`, in turns.

It fits the seconds of each amount of `pytest_qsa.tools.estimates.COSTS` to what it measured, prints them, how near they
come, and what they say of larger models; `--picture FILE` draws the curves. Lines of JSON in DIR keep what is done.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from common import in_turns, random_llama
from overhead import bare
from pair import LOCAL, PROPAGATED, noisy

from pytest_qsa.captures import COUNTS, SINKS, TOKENS, LayerNames, Request, merge
from pytest_qsa.common import shown_time
from pytest_qsa.engine.load.outline import product_rate
from pytest_qsa.engine.reference.live import LiveReference
from pytest_qsa.engine.run.run_pass import run_pass
from pytest_qsa.suite import Data, Machine
from pytest_qsa.tools.checkpoint_sizes import Sizes, unit_of
from pytest_qsa.tools.estimates import COSTS, Setting, Work, seconds_of, settings_of, shown_bytes

BLOCKS, LINEARS = r"layers\.\d+$", r"(q|o|up|down)_proj$"
LARGEST = frozenset({TOKENS, SINKS})
USUAL = [
    Request(BLOCKS, "output", None, LARGEST),
    Request(LINEARS, "input", None, LARGEST),
    Request(LINEARS, "output", None, LARGEST),
]
EVERY = [Request(r"layers\.", site, None, LARGEST | {COUNTS}) for site in ("input", "output")]
CASES: Mapping[str, list[Request]] = {
    "forward": [], "usual suite": USUAL, "every site": EVERY, "pair": [*PROPAGATED, LOCAL],
}  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """A Llama and its data: windows and their tokens; blocks, channels, and words of the vocabulary."""

    samples: int = 2
    tokens: int = 128
    layers: int = 4
    hidden: int = 512
    vocabulary: int = 4096


AXES: Mapping[str, Sequence[int]] = {
    "samples": (1, 2, 4, 8), "tokens": (64, 128, 256, 512, 1024), "layers": (2, 4, 8, 16),
    "hidden": (256, 512, 1024, 2048), "vocabulary": (4096, 16384, 49152),
}  # fmt: skip
ASSERTIONS, RANKS = (1, 250, 500, 1000), (1, 2, 4, 8)
LARGE: Mapping[str, tuple[float, float, int, int, int, int, int]] = {
    "Llama 3 8B": (6.98e9, 6.98e9, 32, 4096, 14336, 4096, 128256),
    "Llama 3 70B": (68.5e9, 68.5e9, 80, 8192, 28672, 8192, 128256),
    "DeepSeek V3 671B": (669e9, 36.7e9, 61, 7168, 18432, 24576, 129280),
}
"""Parameters in the blocks, those that a token meets, blocks, hidden, intermediate, attention, vocabulary."""


def sizes_of(model: torch.nn.Module, shape: Shape) -> Sizes:
    """Return what the plan would read in the files of a model."""
    units = Counter[str]()
    for name, parameter in model.named_parameters():
        units[unit_of(name.rpartition(".")[0])] += parameter.numel()
    layers = tuple(name for name, module in model.named_modules() if name and any(True for _ in module.parameters()))
    return Sizes(
        architecture="LlamaForCausalLM", method="none", dtype="bfloat16", stored=2 * sum(units.values()), files=1,
        units=units, active={}, layers=LayerNames(layers, frozenset()), tied=False, hidden=shape.hidden,
        intermediate=inner(shape.hidden), attention=shape.hidden, vocabulary=shape.vocabulary,
    )  # fmt: skip


def inner(hidden: int) -> int:
    """Return the channels inside an MLP, as a Llama has them."""
    return hidden * 11 // 4


def measured(shape: Shape, repeats: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each case of a shape: its seconds, and the amounts of work that the plan counts."""
    model = random_llama(
        hidden_size=shape.hidden, intermediate_size=inner(shape.hidden), num_hidden_layers=shape.layers,
        num_attention_heads=8, vocab_size=shape.vocabulary,
    )  # fmt: skip
    model.config.use_cache = False  # type: ignore[union-attr]
    reference, sizes = noisy(model), sizes_of(model, shape)
    batches = [torch.randint(0, shape.vocabulary, (1, shape.tokens)) for _ in range(shape.samples)]

    def runs(name: str, requests: list[Request]) -> Callable[[], object]:
        pair = [LiveReference(reference)] if name == "pair" else []
        return lambda: run_pass(model, batches, requests, pair)

    functions = {name: runs(name, requests) if requests else bare(model, batches) for name, requests in CASES.items()}
    rate = product_rate(torch.bfloat16, torch.device("cpu"), 512, 2048, 2048)
    taken = in_turns(functions, repeats, time.process_time)
    data = Data(num_samples=shape.samples, seq_len=shape.tokens)
    for name, requests in CASES.items():
        work = Work.of(data, requests, sizes)
        if name == "forward":  # the head runs for every sample, and nothing is reduced
            work = replace(work, logits=True)
        amounts = Counter(work.reductions)
        for _ in range(2 if name == "pair" else 1):
            amounts.update(work.amounts(sizes))
        yield {"seconds": statistics.median(taken[name]), "rate": rate, "amounts": dict(amounts), "case": name}


def judged(folder: Path, repeats: int) -> Iterator[tuple[int, float]]:
    """Yield a number of assertions, and the processor's seconds of a gate that judges them from a kept capture."""
    model = folder / "llama"
    if not (model / "config.json").exists():
        from estimates import save_tokenizer

        random_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8).save_pretrained(
            model
        )  # type: ignore[operator]
        save_tokenizer(model)
    for count in ASSERTIONS:
        suite = folder / f"{count}.qsa.yaml"
        line = "  - {{id: a{}, metric: outlier_tokens, layers: 'layers\\.\\d+$', site: output, max: 9999}}\n"
        text = f"model: {{name: m, path: {model}}}\ndata: {{num_samples: 2, seq_len: 32}}\nassertions:\n"
        suite.write_text(text + "".join(line.format(index) for index in range(count)), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--qsa-report=never", str(suite)]
        environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        times = [_processor(command, environment) for _ in range(repeats + 1)]
        yield count, statistics.median(times[1:])  # the first one keeps the capture


def _processor(command: Sequence[str], environment: Mapping[str, str]) -> float:
    before = os.times()
    subprocess.run(command, env=dict(environment), check=True, capture_output=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def merged(repeats: int) -> Iterator[tuple[int, float]]:
    """Yield a number of ranks, and the seconds of all their parts of one pass and of merging them, every site."""
    model = random_llama(hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8)
    model.config.use_cache = False  # type: ignore[union-attr]
    batches = [torch.randint(0, 32000, (1, 128)) for _ in range(8)]

    def split(ranks: int) -> Callable[[], object]:
        share = len(batches) // ranks
        return lambda: merge(
            [run_pass(model, batches[at : at + share], EVERY, first_sample=at) for at in range(0, len(batches), share)]
        )

    taken = in_turns({str(ranks): split(ranks) for ranks in RANKS}, repeats, time.process_time)
    yield from ((int(ranks), statistics.median(times)) for ranks, times in taken.items())


def fitted(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the costs that fit the rows best by relative squares, none negative; those of no row stay."""
    names = [name for name in COSTS if any(row["amounts"].get(name) for row in rows)]
    table = np.array([[_amount(row, name) for name in names] for row in rows])
    seconds = np.array([row["seconds"] for row in rows])
    table /= seconds[:, None]
    kept = list(range(len(names)))
    while True:
        found = np.linalg.lstsq(table[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            break
        kept = [at for at, value in zip(kept, found, strict=True) if value > found.min()]
    zero = dict.fromkeys(names, 0.0)
    return {**COSTS, **zero, **{names[at]: float(value) for at, value in zip(kept, found, strict=True)}}


def _amount(row: Mapping[str, Any], name: str) -> float:
    amount: float = row["amounts"].get(name, 0)
    return amount / row["rate"] if name == "products" else amount


def in_the_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the rows in Markdown, with what the plan's own costs say of them."""
    yield "| axis | | " + " | ".join(CASES) + " |\n|---|---" + "|---" * len(CASES) + "|"
    for axis, values in AXES.items():
        for value in values:
            own = {row["case"]: row for row in rows if row["shape"] == asdict(replace(Shape(), **{axis: value}))}
            cells = [
                f"{row['seconds']:.3g} s ({seconds_of(row['amounts'], row['rate']) / row['seconds']:.2f})"
                for row in own.values()
            ]
            yield f"| {axis} | {value} | {' | '.join(cells)} |"


def of_large_models() -> Iterator[str]:
    """Yield what the plan says of large models on one node and on sixteen, which share the samples, in Markdown.

    A node here: 64 cores of 200 GFLOP/s each, 512 GB of memory, files that are read at 2 GB/s.
    """
    node = Machine(64, 512 * 10**9, 480 * 10**9, (), {"cpu": 64 * 2e11}, 2e9)
    yield "| model | suite | `memory:` | peak | one node | sixteen | beside the forwards |\n" + 7 * "|---" + "|"
    for name, model in LARGE.items():
        sizes = sizes_of_large(name, model)
        for text, requests in (("usual", USUAL), ("every site", EVERY), ("a pair", [*PROPAGATED, LOCAL])):
            reference = sizes if text == "a pair" else None
            works = [Work.of(Data(num_samples=count, seq_len=2048), requests, sizes, tests=20) for count in (64, 4)]
            one, sixteen = (_fastest(settings_of(sizes, work, node, reference)) for work in works)
            rate, models = node.rates["cpu"] / node.cores, 1 if reference is None else 2
            beside = seconds_of(works[0].reductions, rate) / (models * seconds_of(works[0].amounts(sizes), rate))
            times = " | ".join(shown_time(each.seconds) for each in (one, sixteen))
            yield f"| {name} | {text} | `{one.text}` | {shown_bytes(one.host)} | {times} | + {beside:.1%} |"


def sizes_of_large(name: str, model: tuple[float, float, int, int, int, int, int]) -> Sizes:
    """Return the sizes of a model that isn't here, with the linear layers of a Llama in each block."""
    parameters, active, layers, hidden, intermediate, attention, vocabulary = model
    units = {f"model.layers.{index}": round(parameters / layers) for index in range(layers)}
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    norms = ["input_layernorm", "post_attention_layernorm"]
    names = [f"{unit}.{part}" for unit in units for part in (*parts, *norms)]
    outer = {"model.embed_tokens": vocabulary * hidden, "lm_head": vocabulary * hidden}
    return Sizes(
        architecture=name, method="none", dtype="bfloat16", stored=round(2 * (parameters + 2 * vocabulary * hidden)),
        files=1, units={**outer, **units}, active=dict.fromkeys(units, active / parameters),
        layers=LayerNames((*units, *names), frozenset()), tied=False, hidden=hidden, intermediate=intermediate,
        attention=attention, vocabulary=vocabulary,
    )  # fmt: skip


def _fastest(settings: Sequence[Setting]) -> Setting:
    return min((each for each in settings if each.fits and not each.note), key=lambda each: each.seconds)


LABELS = {
    "samples": "samples", "tokens": "tokens of a sample", "layers": "blocks", "hidden": "hidden size",
    "vocabulary": "words of the vocabulary", "assertions": "assertions, the whole process",
    "ranks": "ranks, together: every site of 8 samples",
}  # fmt: skip


def draw(results: Mapping[str, Any], file: Path) -> None:
    """Draw a panel for each axis, seconds over what grows: both logarithmic, but for assertions and ranks."""
    from matplotlib.figure import Figure
    from PIL import Image

    from pytest_qsa.report.plots.style import GROUP_STYLES, styled

    def drawn() -> None:
        figure = Figure(figsize=(9, 8), layout="constrained")
        panels = [*figure.subplots(4, 2).flat]
        for (axis, label), axes in zip(LABELS.items(), panels, strict=False):
            lines = dict(_lines(results, axis))
            for (name, points), (colour, marker, dash) in zip(lines.items(), GROUP_STYLES, strict=False):
                axes.plot(*zip(*points, strict=True), color=colour, marker=marker, linestyle=dash, label=name)
            axes.set(title=label, ylabel="seconds")
            ticks = sorted({x for points in lines.values() for x, _ in points})
            if axis in AXES:
                axes.set(xscale="log", yscale="log", ylim=(0.008, 1.2))
                axes.set_yticks([0.01, 0.03, 0.1, 0.3, 1], ["0.01", "0.03", "0.1", "0.3", "1"])
                axes.minorticks_off()
            else:
                axes.set_ylim(0)
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        panels[-1].axis("off")
        panels[-1].legend(*panels[0].get_legend_handles_labels(), loc="center")
        figure.savefig(file, dpi=100)
        Image.open(file).convert("RGB").quantize(64).save(file, optimize=True)

    styled(drawn)()


def _lines(results: Mapping[str, Any], axis: str) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    if axis in ("assertions", "ranks"):
        yield axis, [(x, y) for x, y in results[axis]]
        return
    for case in CASES:
        shapes = {x: asdict(replace(Shape(), **{axis: x})) for x in AXES[axis]}
        yield (
            case,
            [
                (x, row["seconds"])
                for x, shape in shapes.items()
                for row in results["rows"]
                if row["shape"] == shape and row["case"] == case
            ],
        )


def main() -> None:
    """Measure what isn't measured, fit, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    file = options.folder / "growth.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"rows": []}

    def keep() -> None:
        file.write_text(json.dumps(results), encoding="utf-8")

    shapes = dict.fromkeys(replace(Shape(), **{axis: value}) for axis, values in AXES.items() for value in values)
    for shape in shapes:
        if not any(row["shape"] == asdict(shape) for row in results["rows"]):
            results["rows"] += [{**row, "shape": asdict(shape)} for row in measured(shape, options.repeats)]
            keep()
    if "assertions" not in results:
        results["assertions"] = list(judged(options.folder, options.repeats))
        keep()
    if "ranks" not in results:
        results["ranks"] = list(merged(options.repeats))
        keep()
    for line in in_the_table(results["rows"]):
        print(line)
    for name in ("assertions", "ranks"):
        print(f"{name}: " + ", ".join(f"{x}: {y:.3g} s" for x, y in results[name]))
    costs = fitted(results["rows"])
    (few, least), *_, (many, most) = results["assertions"]
    costs["tests"] = (most - least) / (many - few)
    print(json.dumps({name: float(f"{cost:.2g}") for name, cost in costs.items()}, indent=4))
    ratios = [seconds_of(row["amounts"], row["rate"], costs) / row["seconds"] for row in results["rows"]]
    print(f"the fit ÷ measured: {min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}")
    for line in of_large_models():
        print(line)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
