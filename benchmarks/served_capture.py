"""A capture inside vLLM: its numbers beside transformers' (`table`), and what its hooks cost (`cost`).

`QSA_VLLM_PYTHON=… python benchmarks/served_capture.py table|cost [--model FOLDER] [--samples N] [--seq-len N]`. `cost`
runs the same requests with and without hooks in turn, in one process of vLLM's, and takes medians of five, of the
processor's seconds and of the clock's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROUNDS = 6
"""The first one warms up."""
BLOCKS, LINEARS = r"layers\.\d+$", "_proj$"
SITES = [(BLOCKS, "output"), (BLOCKS, "input"), (LINEARS, "input"), (LINEARS, "output")]


def inside(job_file: str) -> None:
    """Time a job in vLLM's own environment; print one JSON object."""
    import torch
    import vllm

    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    llm = vllm.LLM(**job["engine"], worker_extension_cls="pytest_qsa.engine.vllm.worker.CaptureExtension")
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job["samples"]]
    once = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    times: dict[str, list[tuple[float, float]]] = {"without": [], "sites": [], "sites and hidden states": []}
    for _ in range(ROUNDS):
        for name, found in times.items():
            own = {**job, "predictions": name != "sites", "wanted": job["wanted"]}
            Path(job_file).write_text(json.dumps(own), encoding="utf-8")
            if name != "without":
                llm.collective_rpc("qsa_attach", args=(job_file,))
            began = time.process_time(), time.perf_counter()
            llm.generate(prompts, once, use_tqdm=False)
            found.append((time.process_time() - began[0], time.perf_counter() - began[1]))
            if name != "without":
                llm.collective_rpc("qsa_collect", args=(job["folder"],))
    medians = {
        name: [statistics.median(each) for each in zip(*found[1:], strict=True)] for name, found in times.items()
    }
    print(json.dumps({"medians": medians, "threads": torch.get_num_threads()}), flush=True)


def cost(model: Path, samples: int, tokens: int, *, outputs: bool) -> None:
    """Print what a pass costs with and without hooks. `outputs`: of the linear layers these are reduced as well."""
    import numpy as np
    import torch

    from pytest_qsa.captures import MOMENTS, SCORES, TOKENS, Request
    from pytest_qsa.engine.heads import Head
    from pytest_qsa.engine.load.batches import token_ids
    from pytest_qsa.engine.load.models import Loaded
    from pytest_qsa.engine.load.tokenizer import load_tokenizer
    from pytest_qsa.engine.modules import blocks_of, layers_of, with_experts
    from pytest_qsa.engine.run.run_pass import run_pass, wanted_sites
    from pytest_qsa.engine.subject import subject_batches
    from pytest_qsa.engine.vllm import capture as capturing
    from pytest_qsa.engine.vllm.launch import PACKAGE, variables
    from pytest_qsa.engine.vllm.worker import HIDDEN

    own = _subject(model, samples, tokens, "vllm")
    empty = capturing.empty_subject(own)
    batches = subject_batches(own, Loaded(empty, load_tokenizer(own.path, {"trust_remote_code": False})))
    ids = [row.tolist() for batch in batches for row in token_ids(batch)]
    requests = [Request(BLOCKS, "output", None, frozenset({TOKENS, MOMENTS})),
                Request(LINEARS, "input", None, frozenset({TOKENS, MOMENTS}))]  # fmt: skip
    if outputs:
        requests.append(Request(LINEARS, "output", None, frozenset({TOKENS, MOMENTS})))
    wanted = wanted_sites(with_experts(layers_of(empty)), blocks_of(empty), requests)
    settings = capturing._settings(own, ids)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / PACKAGE.name).symlink_to(PACKAGE)
        job = folder / "job.json"
        content = {
            "engine": settings, "samples": ids, "blocks": blocks_of(empty), "folder": name, "predictions": True,
            "wanted": [[layer, site, sorted(map(str, each))] for (layer, site), each in wanted.items()],
        }  # fmt: skip
        job.write_text(json.dumps(content), encoding="utf-8")
        environment = variables(folder, capturing._variables(empty, settings))
        command = [os.environ["QSA_VLLM_PYTHON"], "-P", __file__, "inside", str(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=name)
        if done.returncode:
            sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
        result = json.loads(done.stdout.strip().splitlines()[-1])
        dtype = torch.bfloat16
        hidden = [capturing._states(folder / HIDDEN.format(index), dtype) for index in range(len(ids))]
    stored = capturing._stored_head(own, empty)
    assert stored is not None
    head = capturing.ServedHead(Head(capturing._read(stored[0], dtype), None, {}), empty.config, ids, hidden)
    scores: list[tuple[float, float]] = []
    for _ in range(ROUNDS):
        began = time.process_time(), time.perf_counter()
        run_pass(head, [torch.tensor([row]) for row in ids], [Request("", "logits", None, frozenset({SCORES}))])
        scores.append((time.process_time() - began[0], time.perf_counter() - began[1]))
    medians = {name: np.array(each) for name, each in result["medians"].items()}
    medians["their predictions, made here"] = np.median(scores[1:], axis=0)
    medians["sites and exact distributions"] = (
        medians["sites and hidden states"] + medians["their predictions, made here"]
    )
    print(f"{samples} × {tokens} tokens of {model.name}, {len(wanted)} sites, {result['threads']} threads")
    print(f"{'':40} {'of the processor':>18} {'by the clock':>18}")
    for name, seconds in medians.items():
        ratios = seconds / medians["without"]
        print(f"{name:40} " + " ".join(f"{s:8.3f} s {r:7.3f}" for s, r in zip(seconds, ratios, strict=True)))


def _subject(model: Path, samples: int, tokens: int, engine: str) -> Any:
    from pytest_qsa.suite import Data, Engine, Memory, Model, NamedSubject

    spec = Model(path=str(model), engine=Engine.model_validate({"name": engine}))
    return NamedSubject(model.name, spec, Data(num_samples=samples, seq_len=tokens), Memory(), Path.cwd())


def table(model: Path, samples: int, tokens: int) -> None:
    """Print how far the numbers of both engines are apart."""
    import numpy as np

    from pytest_qsa import engine
    from pytest_qsa.captures import ALL_STATISTICS, SCORES, Request

    requests = [Request(pattern, site, None, ALL_STATISTICS) for pattern, site in SITES]  # type: ignore[arg-type]
    requests.append(Request("", "logits", None, frozenset({SCORES})))
    ours, theirs = (
        engine.capture_subject(_subject(model, samples, tokens, name), requests) for name in ("vllm", "transformers")
    )
    print(f"{samples} × {tokens} tokens of {model.name}; vLLM ran it as {ours.provenance.executed_as}")
    print("| sites | outlier tokens | sites that differ | rms apart | token maxima equal | apart |")
    print("|---|---|---|---|---|---|")
    for pattern, site in SITES:
        one, other = (each.select(pattern, site) for each in (ours, theirs))  # type: ignore[arg-type]
        counts, known = (np.array(each.outlier_tokens(reduce="sum").values) for each in (one, other))
        rms = abs(np.array(one.rms().values) / np.array(other.rms().values) - 1)
        maxima = [
            np.concatenate([capture.sites[layer, site].token_max for layer in one.outlier_tokens().layers])  # type: ignore[index]
            for capture in (ours, theirs)
        ]
        apart = abs(maxima[0] / maxima[1] - 1)
        cells = (
            f"{'blocks' if pattern == BLOCKS else 'linears'}, {site}",
            f"{counts.sum():.0f} and {known.sum():.0f}",
            f"{(counts != known).sum()} of {len(counts)}",
            f"{np.median(rms):.2%}, at most {rms.max():.2%}",
            f"{(apart == 0).mean():.0%}",
            f"{np.median(apart):.2%}, p99 {np.quantile(apart, 0.99):.1%}",
        )
        print(f"| {' | '.join(cells)} |")
    values = [each.logits().perplexity().values[0] for each in (ours, theirs)]
    print(f"perplexity {values[0]:.4f} and {values[1]:.4f}, Δ ln {np.log(values[0] / values[1]):+.4f}")


def main() -> None:
    """Run one of the two."""
    if sys.argv[1:2] == ["inside"]:
        inside(sys.argv[2])
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["table", "cost"])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / ".demo" / "smollm2")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--outputs", action="store_true", help="cost: the outputs of the linear layers as well")
    given = parser.parse_args()
    if given.what == "table":
        table(given.model.absolute(), given.samples, given.seq_len)
    else:
        cost(given.model.absolute(), given.samples, given.seq_len, outputs=given.outputs)


if __name__ == "__main__":
    main()
