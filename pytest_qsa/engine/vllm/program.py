"""The program that runs in vLLM's own environment: loads a model there, runs the samples, and leaves files.

`python -m pytest_qsa.engine.vllm.program JOB`. It ends, with all of its children, when whoever started it does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

RESULT = "result.json"
"""The file that says what was run, or why nothing was."""
EXTENSION = "pytest_qsa.engine.vllm.worker.CaptureExtension"


def main(job_file: str) -> None:
    """Run a job and write its result."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    try:
        result = run(job, job_file)
    except Exception as error:  # vLLM raises whatever its parts raise
        result = {"error": {"class": type(error).__name__, "text": str(error)}}
        _write(job, result)
        raise
    _write(job, result)


def run(job: dict[str, Any], job_file: str) -> dict[str, Any]:
    """Load the model, run every sample once, and return what vLLM says of the run."""
    import torch
    import vllm

    llm = vllm.LLM(**job["engine"], worker_extension_cls=EXTENSION)
    if job["engine"].get("pipeline_parallel_size", 1) > 1:
        # A dummy batch makes the buffers of a later stage. On a CPU vLLM makes none of its own when it runs eagerly.
        llm.collective_rpc("execute_dummy_batch")
    prompts: list[Any] = [{"prompt_token_ids": ids} for ids in job["samples"]]
    checked = _logprobs(llm, prompts[0], job["logprobs"]) if job["logprobs"] else None
    attached = llm.collective_rpc("qsa_attach", args=(job_file,))
    once = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, skip_reading_prefix_cache=True)
    llm.generate(prompts, once, use_tqdm=False)
    collected = llm.collective_rpc("qsa_collect", args=(job["folder"],))
    drafts = [_drafts(llm, prompt, job["drafts"]) for prompt in prompts] if job["drafts"] else []
    kind = "cpu"
    if torch.cuda.is_available():
        kind = "sm_{}{}".format(*torch.cuda.get_device_capability())
    return {
        "attached": attached,
        "collected": collected,
        "logprobs": checked,
        "drafts": drafts,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "device_class": kind,
    }


def _logprobs(llm: Any, prompt: Any, count: int) -> list[dict[int, float]]:
    """Return vLLM's own logprobs of a prompt's tokens, by position from the second on."""
    import vllm

    asked = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=count)
    (output,) = llm.generate([prompt], asked, use_tqdm=False)
    rows = [row for row in output.prompt_logprobs if row is not None]
    return [{token: each.logprob for token, each in row.items()} for row in rows]


def _drafts(llm: Any, prompt: Any, count: int) -> list[float]:
    """Have some tokens written behind a prompt; return how many were drafted for that, and how many accepted."""
    import vllm

    names = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"

    def counters() -> list[float]:
        found = {metric.name: metric.value for metric in llm.get_metrics() if metric.name in names}
        return [float(found[name]) for name in names]

    before = counters()
    greedy = vllm.SamplingParams(max_tokens=count, temperature=0.0, detokenize=False, ignore_eos=True)
    llm.generate([prompt], greedy, use_tqdm=False)
    return [after - earlier for after, earlier in zip(counters(), before, strict=True)]


def _write(job: dict[str, Any], result: dict[str, Any]) -> None:
    file = Path(job["folder"]) / RESULT
    file.with_suffix(".part").write_text(json.dumps(result), encoding="utf-8")
    file.with_suffix(".part").replace(file)


def _end_with_parent() -> None:
    """Kill this process and its children once the parent's end of the pipe is closed, however the parent ended."""
    os.read(sys.stdin.fileno(), 1)  # not by sys.stdin, whose lock the end of the interpreter would wait for
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":  # vLLM starts its workers by importing this module again
    main(sys.argv[1])
