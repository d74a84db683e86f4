"""What a user would pick instead, side by side: time, memory, and which faults each finds.

`python benchmarks/instead.py --others PYTHON`. The checkpoint is SmolLM2 in int8 of `make demo`, held against SmolLM2,
on 4 × 128 tokens of `sample`. Each method is a process of its own. It runs on the healthy checkpoint (time by the clock
and by the processor, peak memory: medians of `--repeats`), then once on each of 16 copies with a fault of `qsa
selftest` at default strength. `--others` is the Python of an environment with lm-eval and xllamacpp. What counts as
found:

* ours: the gate that `qsa init` writes is red;
* lm-eval, a perplexity task of the same text: more than 1.02 times the healthy checkpoint's, as teams gate it, or no
  number;
* llama.cpp's server, the perplexity of the same tokens from its `n_probs`, the same bound. It reads the checkpoint as a
  GGUF in Q8_0, which is written before and isn't timed;
* plain hooks, which keep the outputs of all linear layers of both models: the SQNR of some layer is 3 dB below the
  healthy checkpoint's; torch.ao's numeric suite the same, with its own loggers;
* the seed's way, a forward for each statistic: a layer's outlier count differs, or a magnitude by more than 10 %.

Lines of JSON in `--folder` keep what is done, so that a later start goes on.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common import SMOLLM2

INT8 = SMOLLM2.with_name("smollm2-int8")
ALLOWED = f"--qsa-allow-path={SMOLLM2.resolve().parent}"
"""The suite lies elsewhere than the checkpoints."""
SAMPLES, TOKENS = 4, 128
FAULTS = (
    "scale_layer", "scale_channel", "zero_scale", "nan_scale", "weights_constant", "rows_permuted", "scales_swapped",
    "zero_point_shifted", "layer_unquantized", "weights_exchanged", "norm_scaled", "embedding_zeroed",
    "outlier_clipped", "signs_lost", "layer_copied", "rope_interleaved",
)  # fmt: skip
"""The faults that change what an int8 model computes."""
TASK = """\
task: qsa_sample
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""
Numbers = Mapping[str, float]


class Run(NamedTuple):
    """A process: seconds by the clock and of the processor, peak bytes, its exit code and what it printed."""

    seconds: float
    processor: float
    peak: int
    code: int
    output: str


def run(words: Sequence[object], **environment: str) -> Run:
    """Run a process and measure it."""
    started, variables = time.perf_counter(), {**os.environ, **environment}
    with subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, process.returncode, output)


# What a method runs in its own process; it prints its numbers as the last line.


@functools.cache
def _batches() -> list[Any]:
    from common import token_batches

    return token_batches(SAMPLES, TOKENS)


def _model(checkpoint: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)


def _sqnr(signal: Any, other: Any) -> float:
    signal, other = signal.float(), other.float()
    noise = float((signal - other).square().sum())
    return 10 * math.log10(float(signal.square().sum()) / noise) if noise else 200.0


def with_hooks(checkpoint: Path) -> Numbers:
    """Return the SQNR of each linear layer's output, from hooks that keep all of them."""
    import torch
    from torch import nn

    kept: list[dict[str, Any]] = []
    for each in (_model(checkpoint), _model(SMOLLM2)):
        found: dict[str, list[Any]] = {}
        for name, module in each.named_modules():
            if isinstance(module, nn.Linear):
                keep = found.setdefault(name, [])
                module.register_forward_hook(lambda _, args, output, keep=keep: keep.append(output.detach().clone()))
        with torch.no_grad():
            for batch in _batches():
                each(batch)
        kept.append({name: torch.cat(values, 1) for name, values in found.items()})
    return {name: _sqnr(kept[1][name], kept[0][name]) for name in kept[1]}


def with_numeric_suite(checkpoint: Path) -> Numbers:
    """Return the SQNR of each layer that torch.ao's numeric suite matches."""
    import torch
    import torch.ao.ns._numeric_suite as suite

    model, reference = _model(checkpoint), _model(SMOLLM2)
    suite.prepare_model_outputs(reference, model)
    with torch.no_grad():
        for batch in _batches():
            model(batch)
            reference(batch)
    matched = suite.get_matching_activations(reference, model)
    pairs: dict[str, tuple[Any, Any]] = {name: (each["float"], each["quantized"]) for name, each in matched.items()}
    return {name: _sqnr(torch.cat(theirs, 1), torch.cat(own, 1)) for name, (theirs, own) in pairs.items()}


def seeds_way(checkpoint: Path) -> Numbers:
    """Return the outlier counts and the median magnitudes, each pattern and statistic by a pass of its own."""
    import seeds_way as seed
    import torch

    model, batches = _model(checkpoint), _batches()
    found: dict[str, float] = {}
    for pattern in seed.MAGNITUDES:
        for site in ("input", "output"):
            rows = seed.with_hooks(model, batches, pattern, site, seed.top_and_median)
            found |= {f"{name} {site}": float(torch.stack(values)[:, 3].mean()) for name, values in rows.items()}
    for _ in ("layer-wise", "position", "token"):
        counts = seed.with_hooks(model, batches, seed.BLOCKS, "output", seed.outlier_count)
    return found | {f"{name} outliers": float(torch.stack(values).sum()) for name, values in counts.items()}


IN_PROCESS: Mapping[str, Callable[[Path], Numbers]] = {
    "plain hooks": with_hooks, "torch.ao numeric suite": with_numeric_suite, "the seed's way": seeds_way,
}  # fmt: skip


PERPLEXITIES = ("lm-eval", "llama.cpp's server")


def numbers_of(method: str, done: Run) -> Numbers | None:
    """Return what a method measured; None where it printed no number."""
    if method == "lm-eval":
        cells = [line.split("|") for line in done.output.splitlines() if "|word_perplexity|" in line]
        return {"perplexity": float(cells[0][7])} if cells else None
    lines = [line for line in done.output.splitlines() if line.startswith("{")]
    # A server's log may go on in the same line.
    found: Numbers | None = json.JSONDecoder().raw_decode(lines[-1])[0] if lines else None
    return found


def alarms(method: str, done: Run, healthy: Run) -> bool:
    """Say whether a method finds a fault."""
    if method == "pytest-qsa":
        return done.code == 1
    now, known = numbers_of(method, done), numbers_of(method, healthy)
    assert known is not None
    if now is None or any(not math.isfinite(value) for value in now.values()):
        return True
    if method in PERPLEXITIES:
        return now["perplexity"] > 1.02 * known["perplexity"]
    if method == "the seed's way":
        counts = [name for name in known if name.endswith("outliers")]
        return any(now[name] != known[name] for name in counts) or any(
            abs(now[name] / known[name] - 1) > 0.1 for name in known if name not in counts and known[name]
        )
    return any(now.get(name, -math.inf) < value - 3 for name, value in known.items())


Start = Callable[[Sequence[Path]], Iterator[Run]]
"""Runs a method on checkpoints."""


def commands(folder: Path, others: str) -> dict[str, Start]:
    """Return how each method starts. `others`: the Python of lm-eval and of xllamacpp."""
    suite, results = folder / "gate.qsa.yaml", folder / "results"

    def ours(checkpoint: Path) -> Run:
        options = ["-q", "--qsa-no-cache", "--qsa-report=always", "--qsa-jobs=99", "-p", "no:cacheprovider"]
        more = [f"--qsa-output={results}", f"--qsa-model={checkpoint}", ALLOWED]
        return run([sys.executable, "-m", "pytest", suite, *options, *more])

    def evaluated(checkpoint: Path) -> Run:
        words = [others, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", 1, "--tasks"]
        model = f"pretrained={checkpoint},dtype=bfloat16"
        return run([*words, "qsa_sample", "--include_path", folder, "--model_args", model], HF_DATASETS_OFFLINE="1")

    def served(checkpoint: Path) -> Run:
        from llama_server import write_gguf

        file = folder / "gguf" / f"{'healthy' if checkpoint == INT8 else checkpoint.parent.name}.gguf"
        if not file.exists():
            write_gguf(checkpoint, file)
        return run([others, Path(__file__).with_name("llama_server.py"), file, folder / "tokens.json"])

    def own(method: str, checkpoints: Sequence[Path]) -> Iterator[Run]:
        done = run([sys.executable, __file__, "--method", method, "--checkpoints", *checkpoints])
        lines = [line for line in done.output.splitlines() if line.startswith("{") or line == "null"]
        yield from [done._replace(output=line) for line in lines] or [done] * len(checkpoints)

    def each(start: Callable[[Path], Run]) -> Start:
        return lambda checkpoints: map(start, checkpoints)

    return {
        "pytest-qsa": each(ours),
        "lm-eval": each(evaluated),
        "llama.cpp's server": each(served),
        **{method: functools.partial(own, method) for method in IN_PROCESS},
    }


def print_numbers(method: str, checkpoints: Sequence[Path]) -> None:
    """Print what a method measures of each checkpoint, a line each; null for one that it can't run."""
    for checkpoint in checkpoints:
        try:
            print(json.dumps(dict(IN_PROCESS[method](checkpoint))), flush=True)
        except (RuntimeError, ValueError, KeyError):
            traceback.print_exc()
            print("null", flush=True)


def write_task(folder: Path) -> None:
    """Write the task of lm-eval, with the text of the same tokens; and these for llama.cpp."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2)
    texts = [tokenizer.decode(batch[0]) for batch in _batches()]
    (folder / "tokens.json").write_text(json.dumps([batch[0].tolist() for batch in _batches()]), encoding="utf-8")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "task.yaml").write_text(TASK.format(file=folder / "texts.jsonl"), encoding="utf-8")


def write_suite(folder: Path) -> None:
    """Let `qsa init` write the suite, and make its baselines."""
    suite = folder / "gate.qsa.yaml"
    if not suite.exists():
        data = ["--data.num_samples", SAMPLES, "--data.seq_len", TOKENS]
        done = run(
            [
                sys.executable,
                "-m",
                "pytest_qsa",
                "init",
                INT8,
                "--reference",
                SMOLLM2,
                "-o",
                suite,
                "--no-answers",
                *data,
            ]
        )
        if done.code:
            raise SystemExit(done.output)
    if not (folder / "qsa_baselines").exists():
        run([sys.executable, "-m", "pytest", suite, "--snapshot-update", "--qsa-report=never", ALLOWED, "-q"])


def copies(folder: Path, wanted: Sequence[str]) -> Iterator[tuple[str, Path]]:
    """Yield a copy of the checkpoint with each fault; it is linked to the original but for what the fault changes."""
    from pytest_qsa.checkpoint import open_folder
    from pytest_qsa.tools.selftest.faults import FAULTS as ALL
    from pytest_qsa.tools.selftest.mutant import Mutant

    source = open_folder(INT8)
    for name in wanted:
        fault, copy = ALL[name], folder / "copies" / name / INT8.name
        if not copy.exists():
            layers = list(fault.targets(source))
            mutant = Mutant(source)
            fault.inject(mutant, layers[len(layers) // 2], fault.default)
            copy.parent.mkdir(parents=True, exist_ok=True)
            mutant.save(copy)
        yield name, copy


def main() -> None:
    """Run what is missing, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/qsa-instead"))
    parser.add_argument("--others", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--faults", nargs="*", default=FAULTS)
    parser.add_argument("--only", nargs="*", help="these methods")
    parser.add_argument("--method", choices=IN_PROCESS, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoints", type=Path, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        print_numbers(options.method, options.checkpoints)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / ".git").mkdir(exist_ok=True)  # the root of what the suite may read
    methods = {k: v for k, v in commands(options.folder, options.others).items() if k in (options.only or [k])}
    if not (options.folder / "tokens.json").exists():
        write_task(options.folder)
    if "pytest-qsa" in methods:
        write_suite(options.folder)
    runs = options.folder / "runs.jsonl"
    healthy = [("", index, INT8) for index in range(options.repeats)]
    faulty = [(fault, 0, checkpoint) for fault, checkpoint in copies(options.folder, options.faults)]
    for wanted in [*batched(healthy, 1), *batched(faulty, 4)]:
        for method, start in methods.items():
            done = {tuple(row["key"]) for row in rows_of(runs)}
            left = [each for each in wanted if (method, *each[:2]) not in done]
            checkpoints = [each[2] for each in left]
            for (fault, index, _), each in zip(left, start(checkpoints) if left else (), strict=True):
                with runs.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps({"key": [method, fault, index], "run": each._asdict()}) + "\n")
    for line in table(rows_of(runs), options.faults):
        print(line)


def batched(cases: Sequence[tuple[str, int, Path]], size: int) -> Iterator[Sequence[tuple[str, int, Path]]]:
    """Yield the cases in groups, each done before the next one begins."""
    yield from (cases[start : start + size] for start in range(0, len(cases), size))


def rows_of(runs: Path) -> list[Mapping[str, Any]]:
    """Return what is done."""
    return [json.loads(line) for line in runs.read_text(encoding="utf-8").splitlines()] if runs.exists() else []


def table(rows: Sequence[Mapping[str, Any]], faults: Sequence[str]) -> Iterator[str]:
    """Yield what each method takes on the healthy checkpoint, and what it finds, in Markdown."""
    yield "| | time | of the processor | peak memory | faults found | missed |\n|---|---|---|---|---|---|"
    for method in dict.fromkeys(row["key"][0] for row in rows):
        own = [row for row in rows if row["key"][0] == method]
        sound = [Run(**row["run"]) for row in own if not row["key"][1]]
        if sound[0].code or (method != "pytest-qsa" and numbers_of(method, sound[0]) is None):
            last = next((line for line in reversed(sound[0].output.splitlines()) if line.strip()), "no output")
            yield f"| {method} | can't run: {last[:120]} | | | | |"
            continue
        taken, processor = (statistics.median(times) for times in list(zip(*sound, strict=True))[:2])
        peak = statistics.median(each.peak for each in sound)
        tried = {row["key"][1]: Run(**row["run"]) for row in own if row["key"][1] in faults}
        found = [fault for fault, done in tried.items() if alarms(method, done, sound[0])]
        missed = ", ".join(f"`{fault}`" for fault in tried if fault not in found)
        cells = (
            f"{taken:.1f} s",
            f"{processor:.1f} s",
            f"{peak / 1e6:.0f} MB",
            f"{len(found)} of {len(tried)}",
            missed,
        )
        yield f"| {method} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
